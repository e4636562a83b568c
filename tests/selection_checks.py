"""Checks of block-size selection on two processes, each against one process with the same global batches."""

import copy
import json
import warnings

import torch
import torch.distributed as dist
from distributed_checks import assert_same_on_all_ranks, whole_state
from distributed_trainer_checks import fsdp, state_on_cpu
from tiny_selection import TwoLayers, callback_in, callback_of, digits, groups_of, vit
from tiny_training import arguments, batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForImageClassification, Trainer
from two_processes import main

from kron_hf import BlockSizeCallback, KronLinear
from kron_hf.selection import BlockSizeSelector, KronCandidates, replace_by_chosen
from kron_hf.sharding import is_sharded, local

STEPS = 20  # drops after 6 and 10 steps in validation mode
GLOBAL_BATCH = 8
# A resumed run agrees in all bits without clipping. That sums the squared norms of all gradients: the zeros of gated
# candidates, which a resumed run has no more, make it add the others in another order, and the last bit may differ.
UNCLIPPED = {"per_device_eval_batch_size": 4, "max_grad_norm": 0.0}


class Loss(nn.Module):
    """FSDP2 and DDP act on forward calls of the whole model."""

    def __init__(self, seed=0):
        super().__init__()
        self.inner = TwoLayers(seed)

    def forward(self, x, labels):
        return self.inner(x, labels)["loss"]


def wrapped(model, way):
    if way == "alone":
        return model
    if way == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.inner.fc1, model.inner.fc2) if way == "fsdp2" else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def place(way):
    return (1, 0) if way == "alone" else (dist.get_world_size(), dist.get_rank())


def part(step, way, size=8):
    processes, process = place(way)
    x, labels = (value.chunk(processes)[process] for value in batch(step, size).values())
    return x.double(), labels


class Run:
    def __init__(self, way, mode, seed=0, scope="global"):
        self.way, self.model = way, Loss(seed).double()
        self.wrapped = wrapped(self.model, way)
        self.optimizer = torch.optim.AdamW(groups_of(self.wrapped))
        # Each process evaluates its share; the mean over the processes counts. DDP's own forward would synchronise.
        self.selector = BlockSizeSelector(
            self.wrapped, total_steps=STEPS, evaluate=self.held_out, mode=mode, scope=scope, start=0.0, restart=True
        )

    def held_out(self):
        model = self.model if self.way == "ddp" else self.wrapped
        return float(model(*part(99, self.way, 32)))

    def steps(self, numbers):
        for step in numbers:
            self.wrapped.zero_grad()  # the model's, as Trainer calls it: its parameters must be the optimizer's
            self.wrapped(*part(step, self.way)).backward()
            self.optimizer.step()
        return self


def started(way, mode, **options):
    run = Run(way, mode, **options)
    run.selector.attach(run.optimizer)
    return run


def assert_equals_one_process(run, alone):
    assert run.selector.done
    assert run.selector.state_dict()["alive"] == alone.selector.state_dict()["alive"]
    assert [e["step"] for e in run.selector.result.events] == [e["step"] for e in alone.selector.result.events]
    assert [e["dropped"] for e in run.selector.result.events] == [e["dropped"] for e in alone.selector.result.events]
    # Sharded layers leave their empty tensors out.
    state, expected = (
        {name: value for name, value in whole.items() if value.numel()}
        for whole in (whole_state(run.model), alone.model.state_dict())
    )
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert_same_on_all_ranks(list(state.values()))


def assert_gated(run):
    """Dropped candidates: whole, zero, without state, in no group, and none of them moves."""
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    gone = 0
    for layer in (run.model.inner.fc1, run.model.inner.fc2):
        for key in layer.keys:
            for factor in layer.layer(key).parameters():
                assert factor.numel() > 0
                if key not in layer.alive:
                    gone += 1
                    assert not local(factor).any()
                    assert id(factor) not in held
                    assert factor not in run.optimizer.state
    assert gone == 12


def equality(way):
    chosen = {}
    for mode in ("validation", "penalty"):
        for scope in ("global", "layer"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # 10 steps are few for the penalty
                alone = started("alone", mode, scope=scope).steps(range(STEPS))
                run = started(way, mode, scope=scope).steps(range(STEPS))
            assert_equals_one_process(run, alone)
            assert_gated(run)
            chosen[f"{mode} {scope}"] = run.selector.state_dict()["alive"]
    return chosen


def ddp(folder):
    return equality("ddp")


def fsdp2(folder):
    return equality("fsdp2")


def fsdp2_as_one_group(folder):
    """All layers belong to the root, which holds whole parameters after an evaluation."""
    chosen = equality("fsdp2 as one group")
    run = started("fsdp2 as one group", "validation").steps(range(STEPS))
    with torch.no_grad():
        run.held_out()
    assert not any(map(is_sharded, run.wrapped.parameters()))
    BlockSizeCallback._replace(run.wrapped)  # when the training ends with an evaluation
    assert isinstance(run.model.inner.fc1, KronCandidates)
    assert all(map(is_sharded, run.wrapped.parameters()))
    return chosen


def norms_beside_whole_parameters(folder):
    """A layer that is not sharded, or not at the moment, counts once."""
    run, alone = started("fsdp2", "validation"), started("alone", "validation")
    run.model.inner.fc1.unshard()
    assert not is_sharded(run.model.inner.fc1.layer("2x2_rank1").s)
    assert is_sharded(run.model.inner.fc2.layer("2x2_rank1").s)
    torch.testing.assert_close(run.selector.norms(), alone.selector.norms())


def chosen_after_ddp(folder):
    run = started("ddp", "validation").steps(range(STEPS))
    before = run.model.inner.fc1.dense_weight()
    replace_by_chosen(run.model)
    assert type(run.model.inner.fc1) is KronLinear
    assert torch.equal(run.model.inner.fc1.dense_weight(), before)


def resume(folder):
    """As in Trainer: the weights are loaded before the model is wrapped."""
    for at in (7, 12):
        whole = started("ddp", "validation").steps(range(at))
        saved = copy.deepcopy([whole.model.state_dict(), whole.optimizer.state_dict()])
        text = json.dumps(whole.selector.state_dict(), sort_keys=True)
        whole.steps(range(at, STEPS))
        resumed = Run.__new__(Run)
        resumed.way, resumed.model = "ddp", Loss(seed=1).double()
        resumed.model.load_state_dict(saved[0])
        resumed.wrapped = DistributedDataParallel(resumed.model)
        living = [p for p in resumed.wrapped.parameters() if p.requires_grad]
        resumed.optimizer = torch.optim.AdamW(
            [
                {**group, "params": [p for p in group["params"] if p.requires_grad]}
                for group in groups_of(resumed.wrapped)
            ]
        )
        assert sum(len(group["params"]) for group in resumed.optimizer.param_groups) == len(living)
        options = {"total_steps": STEPS, "evaluate": resumed.held_out, "start": 0.0, "restart": True}
        resumed.selector = BlockSizeSelector(resumed.wrapped, **options)
        resumed.selector.load_state_dict(json.loads(text))
        resumed.optimizer.load_state_dict(saved[1])
        resumed.selector.attach(resumed.optimizer)
        resumed.steps(range(at, STEPS))
        expected = whole.model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def rows(part):
    return [{**row, "pixel_values": row["pixel_values"].double()} for row in part]


def trainer(folder, processes, seed=0, model=None, **options):
    """The same global batches, whatever the number of processes."""
    options = {
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "max_steps": STEPS,
        "warmup_steps": 2,
        **options,
    }
    args = arguments(folder, **{"save_strategy": "steps", "save_steps": 4, "logging_steps": 2, **options})
    state_on_cpu(allow_fsdp="fsdp" in options)
    model = without_dropout(vit(seed)) if model is None else model
    callback = callback_of()
    callback.eval_dataset, callback.eval_batches = rows(digits()[48:]), 16 // args.per_device_eval_batch_size
    return Trainer(model, args, train_dataset=rows(digits()[:48]), callbacks=[callback])


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.double()


def trainer_ddp(folder):
    run = trainer(folder / "whole", 2, **UNCLIPPED)
    run.train()
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    assert not any(isinstance(module, KronCandidates) for module in run.model.modules())
    assert_same_on_all_ranks([value for value in run.model.state_dict().values() if value.numel()])
    for at in (8, 12):
        for start in ("fresh", "loaded"):
            checkpoint = str(folder / "whole" / f"checkpoint-{at}")
            model = None
            if start == "loaded":
                model = without_dropout(AutoModelForImageClassification.from_pretrained(checkpoint))
            resumed = trainer(folder / f"{start}{at}", 2, seed=1, model=model, **UNCLIPPED)
            resumed.train(resume_from_checkpoint=checkpoint)
            expected = run.model.state_dict()
            for name, value in resumed.model.state_dict().items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=lambda t, n=name: f"{n}: {t}")
            assert callback_in(resumed).config == callback_in(run).config
    run.save_model(str(folder / "saved"))
    (folder / "config.json").write_text(json.dumps(callback_in(run).config.modules))
    return [event["losses_without"] for event in callback_in(run).result.events]


def trainer_fsdp2(folder):
    kind = fsdp("FULL_STATE_DICT") | UNCLIPPED
    run = trainer(folder / "whole", 2, **kind)
    run.train()
    assert isinstance(run.model_wrapped, FSDPModule)
    callback = callback_in(run)
    assert callback.result.done
    layers = [module for module in run.model.modules() if isinstance(module, KronCandidates)]
    assert {len(layer.alive) for layer in layers} == {1}
    resumed = trainer(folder / "resumed", 2, seed=1, **kind)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-8"))
    expected = whole_state(run.model)
    assert all(torch.equal(value, expected[name]) for name, value in whole_state(resumed.model).items())
    run.save_model(str(folder / "saved"))
    (folder / "config.json").write_text(json.dumps(callback.config.modules))


def trainer_clipped(folder):
    """Zero gradients of gated candidates count nothing in the norm."""
    for name, kind in {"ddp": {}, "fsdp2": fsdp("FULL_STATE_DICT")}.items():
        run = trainer(folder / name, 2, **(kind | UNCLIPPED | {"max_grad_norm": 1.0}))
        run.train()
        assert max(log["grad_norm"] for log in run.state.log_history if "grad_norm" in log) > 1
        resumed = trainer(folder / f"{name}-resumed", 2, seed=1, **(kind | UNCLIPPED | {"max_grad_norm": 1.0}))
        resumed.train(resume_from_checkpoint=str(folder / name / "checkpoint-8"))
        expected = {key: value for key, value in whole_state(run.model).items() if value.numel()}
        for key, value in whole_state(resumed.model).items():
            if value.numel():
                torch.testing.assert_close(value, expected[key], msg=lambda text, at=(name, key): f"{at}: {text}")


CHECKS = [
    "ddp",
    "fsdp2",
    "fsdp2_as_one_group",
    "norms_beside_whole_parameters",
    "chosen_after_ddp",
    "resume",
    "trainer_ddp",
    "trainer_fsdp2",
    "trainer_clipped",
]

if __name__ == "__main__":
    main(globals())
