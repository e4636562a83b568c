"""Checks of Trainer and Accelerate on two processes: DDP and FSDP2, checkpoints to and from one process."""

import warnings

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from tiny_training import arguments
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification
from two_processes import main

from kron_hf import KronConfig, KronConv2d, Sparsifier, get_kron_model
from kron_hf.sharding import gather, is_sharded
from kron_hf.sparsity.pruning import block_masks, kron_layers, model_sparsity
from kron_hf.trainer.kron_trainer import KronTrainer

TARGET = 0.6
TO_TARGET = {"target_sparsity": TARGET}
STEPS, SAVE_STEPS = 40, 15  # pruned after 10 steps, frozen after 20
GLOBAL_BATCH = 8


def vit(seed=0, **kron):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=4,
    )
    return get_kron_model(ViTForImageClassification(config), KronConfig(block_size=4, rank=1, **kron)).double()


def images(size=32):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
    return [{"pixel_values": p, "labels": int(p[0, 0, :4].argmax())} for p in pixels]


def trainer(folder, processes, seed=0, model=None, method=TO_TARGET, **options):
    """The same global batches, whatever the number of processes."""
    options = {"per_device_train_batch_size": GLOBAL_BATCH // processes, "max_steps": STEPS, **options}
    args = arguments(folder, **{"save_strategy": "steps", "save_steps": SAVE_STEPS, **options})
    state_on_cpu(allow_fsdp="fsdp" in options)
    return KronTrainer(vit(seed) if model is None else model, args, train_dataset=images(), **method)


def state_on_cpu(allow_fsdp):
    """Makes Accelerate forget the last run, and offer FSDP, which it ignores on CPU; torch's FSDP2 runs there."""
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=True)
    if allow_fsdp:
        state.distributed_type = DistributedType.MULTI_GPU


def fsdp(state_dict_type, **config):
    wrap = {"transformer_layer_cls_to_wrap": ["ViTLayer"], "state_dict_type": state_dict_type}
    return {"fsdp": True, "fsdp_config": {"version": 2, **wrap, **config}}


def whole_state(model):
    state = model.state_dict()
    return dict(zip(state, gather(list(state.values())), strict=True))


def assert_equal_runs(one, other, exact=True):
    expected = whole_state(other.model)
    for name, value in whole_state(one.model).items():
        if exact:
            assert torch.equal(value, expected[name]), name
        else:
            torch.testing.assert_close(value, expected[name])


def assert_trained_on_two(run, wrapper):
    assert run.accelerator.num_processes == dist.get_world_size() == 2
    assert isinstance(run.model_wrapped, wrapper)
    masks = block_masks(kron_layers(run.model))
    for mask in masks:
        copies = [torch.empty_like(mask, dtype=torch.int32) for _ in range(2)]
        dist.all_gather(copies, mask.int())
        assert torch.equal(copies[0], copies[1])
    sparsity = model_sparsity(run.model)
    assert TARGET <= sparsity < TARGET + 0.01
    assert run.state.log_history[-1]["sparsity"] == sparsity
    return sparsity


def train_and_resume(folder, wrapper, **options):
    whole = trainer(folder / "whole", 2, **options)
    whole.train()
    sparsity = assert_trained_on_two(whole, wrapper)
    for at in (15, 30):
        resumed = trainer(folder / f"resumed{at}", 2, seed=1, **options)
        resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{at}"))
        assert_equal_runs(resumed, whole)
    whole.save_model(str(folder / "saved"))
    return {"sparsity": sparsity}


def ddp(folder):
    return train_and_resume(folder, DistributedDataParallel)


def ddp_accumulated_and_checkpointed(folder):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": True}
    return train_and_resume(folder, DistributedDataParallel, **options)


def fsdp2_full(folder):
    return train_and_resume(folder, FSDPModule, **fsdp("FULL_STATE_DICT"))


def fsdp2_sharded(folder):
    return train_and_resume(folder, FSDPModule, **fsdp("SHARDED_STATE_DICT"))


def fsdp2_l1(folder):
    """The penalty under FSDP2 equals that under DDP."""
    runs = []
    for name, options in (("ddp", {}), ("fsdp2", fsdp("FULL_STATE_DICT"))):
        runs.append(trainer(folder / name, 2, method={"l1": 0.3}, save_steps=STEPS, **options))
        runs[-1].train()
    masks = [block_masks(kron_layers(run.model)) for run in runs]
    assert all(torch.equal(mask, other) for mask, other in zip(*masks, strict=True))
    expected = whole_state(runs[0].model)
    for name, value in whole_state(runs[1].model).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    sparsity = model_sparsity(runs[0].model)
    assert 0.2 < sparsity < 0.9
    return {"sparsity": sparsity}


def straight_through(folder):
    """The shadow comes back with the optimizer's state, but not from FSDP2's sharded checkpoints: that warns."""
    method = {**TO_TARGET, "sparsity_options": {"regrowth": "straight_through", "interval": 6}}  # the last prunes at 12
    for name, options in {"full": fsdp("FULL_STATE_DICT"), "sharded": fsdp("SHARDED_STATE_DICT")}.items():
        whole = trainer(folder / name, 2, method=method, **options)
        whole.train()
        resumed = trainer(folder / f"{name}-resumed", 2, seed=1, method=method, **options)
        with warnings.catch_warnings(record=True) as caught:
            resumed.train(resume_from_checkpoint=str(folder / name / "checkpoint-15"))
        lost = [str(warning.message) for warning in caught if "kron_shadow" in str(warning.message)]
        assert len(lost) == (name == "sharded"), lost
        assert_trained_on_two(resumed, FSDPModule)
        if name != "sharded":
            assert_equal_runs(resumed, whole)


def convolutions(folder):
    """The patch embedding converted, too; under FSDP2 it belongs to the root. Both ways train the same model."""
    options = {"target_modules": ["projection", "fc1", "fc2"], "block_size_pattern": {"projection": (2, 1)}}
    runs = []
    for wrapper, more in ((DistributedDataParallel, {}), (FSDPModule, fsdp("FULL_STATE_DICT"))):
        whole = trainer(folder / wrapper.__name__, 2, model=vit(**options), **more)
        assert [type(layer) for layer in kron_layers(whole.model)].count(KronConv2d) == 1
        whole.train()
        assert_trained_on_two(whole, wrapper)
        resumed = trainer(folder / f"{wrapper.__name__}-resumed", 2, model=vit(1, **options), **more)
        resumed.train(resume_from_checkpoint=str(folder / wrapper.__name__ / "checkpoint-15"))
        assert_equal_runs(resumed, whole)
        runs.append(whole)
    assert_equal_runs(runs[1], runs[0], exact=False)


def bf16(folder):
    """Mixed precision of Trainer, over weights in float32."""
    for wrapper, options in ((DistributedDataParallel, {}), (FSDPModule, fsdp("FULL_STATE_DICT"))):
        run = trainer(folder / wrapper.__name__, 2, model=vit().float(), bf16=True, save_steps=STEPS, **options)
        run.train_dataset = [{**row, "pixel_values": row["pixel_values"].float()} for row in images()]
        run.train()
        assert_trained_on_two(run, wrapper)
        assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


def resume_what_one_process_saved(folder):
    """`folder / "one"` has been written by one process."""
    for at in (15, 30):
        resumed = trainer(folder / f"ddp{at}", 2, seed=1)
        resumed.train(resume_from_checkpoint=str(folder / "one" / f"checkpoint-{at}"))
        assert_trained_on_two(resumed, DistributedDataParallel)
        resumed.save_model(str(folder / f"ddp{at}" / "saved"))


def fsdp2_begins_from_a_pruned_checkpoint(folder):
    """Also with weights on rank 0 alone; the zeros that one process saved stay."""
    saved = folder / "one" / "checkpoint-40"
    for efficient in (False, True):
        model = ViTForImageClassification.from_pretrained(saved)
        options = fsdp("FULL_STATE_DICT", cpu_ram_efficient_loading=efficient)
        run = trainer(folder / f"run{efficient}", 2, model=model, **options)
        run.train()
        expected = ViTForImageClassification.from_pretrained(saved)
        for layer, other in zip(kron_layers(run.model), kron_layers(expected), strict=True):
            assert is_sharded(layer.s)
            assert torch.equal(layer.block_mask, other.block_mask)


def accelerate_state(folder):
    """Accelerate's own save_state and load_state: a run that stops and goes on equals one that does not."""
    for kind in ("DDP", "FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        states = []
        for stop in (None, 15):
            accelerator, model, optimizer, sparsifier = prepared(kind, 0)
            steps(accelerator, model, optimizer, range(STEPS if stop is None else stop))
            if stop is not None:
                accelerator.save_state(str(folder / kind))
                accelerator, model, optimizer, sparsifier = prepared(kind, 1)
                accelerator.load_state(str(folder / kind))
                assert sparsifier.step_count == stop
                steps(accelerator, model, optimizer, range(stop, STEPS))
            assert sparsifier.frozen
            states.append(whole_state(accelerator.unwrap_model(model)))
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def prepared(kind, seed):
    state_on_cpu(allow_fsdp=kind != "DDP")
    plugin = None
    if kind != "DDP":
        wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["ViTLayer"]}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind, **wrap)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.num_processes == 2
    model = vit(seed)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    sparsifier = Sparsifier(model, target_sparsity=TARGET, total_steps=STEPS)
    sparsifier.attach(optimizer)
    accelerator.register_for_checkpointing(sparsifier)
    return accelerator, model, optimizer, sparsifier


def steps(accelerator, model, optimizer, numbers):
    data = images()
    for number in numbers:
        rows = [data[(number * 8 + accelerator.process_index * 4 + i) % len(data)] for i in range(4)]
        pixels = torch.stack([row["pixel_values"] for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        accelerator.backward(model(pixel_values=pixels, labels=labels).loss)
        optimizer.step()
        optimizer.zero_grad()


ALONE = ["resume_what_one_process_saved", "fsdp2_begins_from_a_pruned_checkpoint"]
DDP = ["ddp", "ddp_accumulated_and_checkpointed"]
FSDP2 = ["fsdp2_full", "fsdp2_sharded", "fsdp2_l1"]
REGROWTH = ["straight_through"]
CHECKS = [*DDP, *FSDP2, *REGROWTH, "convolutions", "bf16", "accelerate_state", *ALONE]

if __name__ == "__main__":
    main(globals())
