"""Checks of masks and penalties on two processes, each against one process with the same global batch."""

import copy
import json

import torch
import torch.distributed as dist
from tiny_convs import UnevenConv
from tiny_training import batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from two_processes import main

from kron_hf import KronLinear, Sparsifier, copy_masks, kron_summary
from kron_hf.sharding import gather, local, shard_of
from kron_hf.sparsity.pruning import block_masks, kron_layers, model_sparsity

STEPS = 40  # the ramp starts after step 2, prunes after 10, freezes at 20


class Uneven(nn.Module):
    """S of 5 and 1 block rows and ranks 3 and 1: shards of different sizes, and empty ones on the second process."""

    def __init__(self, seed=0, checkpointing=False):
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = KronLinear(16, 20, block_size=(4, 4), rank=3)
        self.norm = nn.LayerNorm(20)
        self.fc2 = KronLinear(20, 16, block_size=(16, 4), rank=1)
        self.head = nn.Linear(16, 4)
        self.checkpointing = checkpointing

    def features(self, x):
        return torch.tanh(self.fc2(torch.tanh(self.norm(self.fc1(x)))))

    def forward(self, x, labels):
        features = checkpoint(self.features, x, use_reentrant=False) if self.checkpointing else self.features(x)
        return nn.functional.cross_entropy(self.head(features).float(), labels)


def shard(model, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.fc1, model.fc2):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


TARGET = {"target_sparsity": 0.5}
L1 = {"l1": 1.0}
STRAIGHT = {**TARGET, "regrowth": "straight_through", "interval": 3}
GROUPS = {"group_penalty": 0.75, "groups": "both"}


def sparsifier_of(model, method, total_steps=STEPS):
    return Sparsifier(model, total_steps=total_steps, **method)


def part(step, dtype, ranks=1, rank=0, accumulate=1):
    """The micro-batches of one process in a step whose global batch is `batch(step)`."""
    data = batch(step)
    chunks = [value.chunk(ranks * accumulate) for value in data.values()]
    own = slice(rank * accumulate, (rank + 1) * accumulate)
    return [(x.to(dtype), labels) for x, labels in zip(*(chunk[own] for chunk in chunks), strict=True)]


def train(model, optimizer, steps, dtype, parallel=True, accumulate=1):
    place = (dist.get_world_size(), dist.get_rank()) if parallel else (1, 0)
    for step in steps:
        optimizer.zero_grad()
        micro_batches = part(step, dtype, *place, accumulate)
        for number, (x, labels) in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            elif isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = last
            (model(x, labels) / accumulate).backward()
        optimizer.step()


def one_process(method, dtype, kind=Uneven, **options):
    model = kind().to(dtype)
    optimizer = adamw(model)
    sparsifier_of(model, method).attach(optimizer)
    train(model, optimizer, range(STEPS), dtype, parallel=False, **options)
    return model


def two_processes(way, method, dtype, accumulate=1, kind=Uneven, **options):
    model = kind(**options).to(dtype)
    wrapped = DistributedDataParallel(model) if way == "ddp" else shard(model)
    optimizer = adamw(wrapped)
    sparsifier_of(wrapped, method).attach(optimizer)
    train(wrapped, optimizer, range(STEPS), dtype, accumulate=accumulate)
    return model


def whole_state(model):
    state = model.state_dict()
    return dict(zip(state, gather(list(state.values())), strict=True))


def assert_same_on_all_ranks(tensors):
    for tensor in tensors:
        copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, tensor.contiguous())
        assert all(torch.equal(copies[0], each) for each in copies)


def assert_equals_one_process(model, alone, exact_mask):
    masks, expected = block_masks(kron_layers(model)), block_masks(kron_layers(alone))
    assert_same_on_all_ranks([mask.int() for mask in masks])
    if exact_mask:
        assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))
    reference = alone.state_dict()
    for name, value in whole_state(model).items():
        torch.testing.assert_close(value, reference[name], msg=lambda text, name=name: f"{name}: {text}")
    return max(float((v - reference[n]).abs().max()) for n, v in whole_state(model).items() if v.numel())


def equality(way, method, dtype, kind=Uneven, **options):
    alone = one_process(method, dtype, kind)
    assert 0.2 < model_sparsity(alone) < 0.8
    model = two_processes(way, method, dtype, kind=kind, **options)
    largest = assert_equals_one_process(model, alone, exact_mask=dtype == torch.float64)
    return {"sparsity": model_sparsity(model), "largest difference": largest}


def ddp_target(folder):
    return {str(dtype): equality("ddp", TARGET, dtype) for dtype in (torch.float64, torch.float32)}


def fsdp2_target(folder):
    return {str(dtype): equality("fsdp2", TARGET, dtype) for dtype in (torch.float64, torch.float32)}


def ddp_l1(folder):
    return {str(dtype): equality("ddp", L1, dtype) for dtype in (torch.float64, torch.float32)}


def fsdp2_l1(folder):
    return {str(dtype): equality("fsdp2", L1, dtype) for dtype in (torch.float64, torch.float32)}


def straight_through(folder):
    return {way: equality(way, STRAIGHT, torch.float64) for way in ("ddp", "fsdp2")}


def group_penalties(folder):
    """Rows are whole on a process; FSDP2 sums the columns."""
    methods = {"target": TARGET | GROUPS, "l1": L1 | GROUPS}
    return {
        f"{way} {name}": equality(way, method, torch.float64)
        for way in ("ddp", "fsdp2")
        for name, method in methods.items()
    }


def convolutions(folder):
    return {
        f"{way} {name}": equality(way, method, torch.float64, UnevenConv)
        for way in ("ddp", "fsdp2")
        for name, method in (("target", TARGET), ("l1", L1), ("straight", STRAIGHT), ("groups", TARGET | GROUPS))
    }


def gradient_accumulation(folder):
    return {way: equality(way, TARGET, torch.float64, accumulate=2) for way in ("ddp", "fsdp2")}


def gradient_checkpointing(folder):
    return {way: equality(way, TARGET, torch.float64, checkpointing=True) for way in ("ddp", "fsdp2")}


def collectives(folder):
    """How many the sparsifier adds to each step."""
    counts = {}
    for way in ("ddp", "fsdp2"):
        for name, method in (("target", TARGET), ("l1", L1), ("groups", L1 | GROUPS)):
            model = Uneven()
            wrapped = DistributedDataParallel(model) if way == "ddp" else shard(model)
            optimizer, sparsifier = adamw(wrapped), sparsifier_of(wrapped, method)
            steps = counts[f"{way} {name}"] = []
            for step in range(STEPS):
                train(wrapped, optimizer, [step], torch.float32)
                with CommDebugMode() as communication:
                    sparsifier.step(optimizer)
                steps.append(communication.get_total_counts())
            assert sparsifier.frozen
    assert counts["ddp target"] == counts["ddp l1"] == counts["ddp groups"] == [0] * STEPS
    # One all-reduce for the columns of all layers in each step, two in the last, beside what l1 does.
    assert counts["fsdp2 groups"] == [{2: 2, 9: 2, 19: 3}.get(step, int(2 < step < 19)) for step in range(STEPS)]
    assert [step + 1 for step, n in enumerate(counts["fsdp2 target"]) if n] == [10, 20]
    assert [step + 1 for step, n in enumerate(counts["fsdp2 l1"]) if n] == [3, 10, 20]
    assert max(counts["fsdp2 target"] + counts["fsdp2 l1"]) == 1
    return {name: sum(steps) for name, steps in counts.items()}


def shards(folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = [((5, 3), 0), ((1, 4), 0), ((3, 4, 2), 0), ((2, 5), 1), ((4, 4), 0)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    whole = [torch.randn(shape).to(dtype) for (shape, _), dtype in zip(shapes, dtypes, strict=True)]
    spread = [distribute_tensor(t, mesh, [Shard(dim)]) for t, (_, dim) in zip(whole, shapes, strict=True)]
    for tensor, full in zip(spread, whole, strict=True):
        assert torch.equal(local(tensor), shard_of(full, tensor))
    two_dimensional = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    hybrid = distribute_tensor(whole[0], two_dimensional, [Replicate(), Shard(0)])
    both = distribute_tensor(whole[3], two_dimensional, [Shard(0), Shard(1)])
    assert all(torch.equal(*pair) for pair in zip(gather([hybrid, both]), (whole[0], whole[3]), strict=True))
    assert local(spread[1]).numel() == (4 if dist.get_rank() == 0 else 0)
    plain = torch.randn(3)
    with CommDebugMode() as communication:
        gathered = gather([*spread, plain])
    assert communication.get_total_counts() == 1
    for tensor, full in zip(gathered, [*whole, plain], strict=True):
        assert tensor.dtype == full.dtype
        assert torch.equal(tensor, full)


def sharded_layer(folder):
    """Masks, meters, saving and loading of sharded layers."""
    alone = one_process(TARGET, torch.float32)
    model = Uneven(seed=1)
    sharded = shard(model)
    state = {
        name: distribute_tensor(alone.state_dict()[name], value.device_mesh, value.placements)
        for name, value in sharded.state_dict().items()
    }
    sharded.load_state_dict(state)
    assert isinstance(model.fc1.s, DTensor)
    assert model_sparsity(sharded) == model_sparsity(alone)
    assert kron_summary(sharded).to_dict() == kron_summary(alone).to_dict()
    for layer, other in zip(kron_layers(sharded), kron_layers(alone), strict=True):
        assert torch.equal(layer.dead_blocks, other.dead_blocks)
        assert torch.equal(layer.block_mask, other.block_mask)
        assert torch.equal(gather([layer.masked_s()])[0], other.masked_s())
    inputs = batch(0)
    torch.testing.assert_close(model(**inputs), alone(**inputs))
    with torch.no_grad():
        local(model.fc1.s).fill_(1.0)  # as an optimizer's momentum would
    torch.testing.assert_close(gather([sharded.state_dict()["fc1.s"]])[0] == 0, alone.fc1.dead_blocks)
    adamw_of_it = adamw(sharded)
    train(sharded, adamw_of_it, range(5), torch.float32)
    assert torch.equal(gather([sharded.state_dict()["fc1.s"]])[0] == 0, alone.fc1.dead_blocks)
    model.fc1.unfreeze_mask()
    train(sharded, adamw_of_it, range(5), torch.float32)
    assert model.fc1.sparsity == 0.0


def resume(folder):
    """A run that stops and goes on, at a step with and without a pruning behind it, equals one that does not."""
    for way, method, at in (
        ("ddp", TARGET, 15),
        ("fsdp2", TARGET, 15),
        ("fsdp2", L1, 15),
        ("fsdp2", TARGET, 30),
        ("fsdp2", STRAIGHT, 13),
        ("ddp", STRAIGHT, 13),
    ):
        states = []
        for stop in (None, at):
            model = Uneven()
            wrapped = DistributedDataParallel(model) if way == "ddp" else shard(model)
            optimizer, sparsifier = adamw(wrapped), sparsifier_of(wrapped, method)
            sparsifier.attach(optimizer)
            train(wrapped, optimizer, range(STEPS if stop is None else stop), torch.float32)
            if stop is not None:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                counters = json.dumps(sparsifier.state_dict())
                model = Uneven(seed=1)
                wrapped = DistributedDataParallel(model) if way == "ddp" else shard(model)
                model.load_state_dict(saved[0])
                optimizer, sparsifier = adamw(wrapped), sparsifier_of(wrapped, method)
                optimizer.load_state_dict(saved[1])
                sparsifier.load_state_dict(json.loads(counters))
                sparsifier.attach(optimizer)
                train(wrapped, optimizer, range(stop, STEPS), torch.float32)
            states.append(whole_state(model))
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def bf16(folder):
    """Autocast under DDP, FSDP2's own mixed precision: exact zeros, the same masks on both ranks, the target met."""
    reached = {}
    for way in ("ddp", "fsdp2"):
        model = Uneven()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        wrapped = DistributedDataParallel(model) if way == "ddp" else shard(model, mp_policy=policy)
        optimizer = adamw(wrapped)
        sparsifier_of(wrapped, TARGET).attach(optimizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "ddp"):
            train(wrapped, optimizer, range(STEPS), torch.float32)
        masks = block_masks(kron_layers(model))
        assert_same_on_all_ranks([mask.int() for mask in masks])
        assert local(model.fc1.s).dtype == torch.float32
        reached[way] = model_sparsity(model)
        assert 0.5 <= reached[way] < 0.5 + 64 / 640
    return reached


def fp16_overflow(folder):
    """An overflow on one rank skips the step on both, and it is not counted."""
    for way, fused in (("ddp", False), ("ddp", True), ("fsdp2", False), ("fsdp2", True)):
        model = Uneven()
        wrapped = DistributedDataParallel(model) if way == "ddp" else shard(model)
        optimizer, scaler = adamw(wrapped, fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
        sparsifier = Sparsifier(wrapped, target_sparsity=0.5, total_steps=8, start=0.0, end=0.5, interval=2)
        sparsifier.attach(optimizer)
        for step in range(6):
            optimizer.zero_grad()
            ((x, labels),) = part(step, torch.float32, dist.get_world_size(), dist.get_rank())
            scaler.scale(wrapped(x, labels)).backward()
            if step in (1, 2) and dist.get_rank() == 0:
                local(model.fc1.s.grad)[0, 0] = torch.inf
            if step in (1, 2) and way == "ddp":  # DDP has reduced before; the ranks' gradients are the same there
                model.fc1.s.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            assert sparsifier.step_count == step + 1 - min(step, 2), (way, fused, step)
        assert sparsifier.frozen
        masks = block_masks(kron_layers(model))
        assert_same_on_all_ranks([mask.int() for mask in masks])
        assert 0.5 <= model_sparsity(model) < 0.5 + 64 / 640


def weight_average(folder):
    """An EMA begun before the freeze takes the masks over."""
    model = Uneven()
    wrapped = DistributedDataParallel(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = adamw(wrapped)
    sparsifier_of(wrapped, TARGET).attach(optimizer)
    for step in range(STEPS):
        train(wrapped, optimizer, [step], torch.float32)
        average.update_parameters(model)
    assert model_sparsity(average) == 0.0
    copy_masks(model, average)
    assert model_sparsity(average) == model_sparsity(model) >= 0.5
    assert_same_on_all_ranks(list(average.state_dict().values()))
    average.update_parameters(model)
    assert model_sparsity(average) == model_sparsity(model)


CORE = ["shards", "ddp_target", "fsdp2_target", "ddp_l1", "fsdp2_l1", "collectives", "sharded_layer"]
MORE = [
    "straight_through",
    "group_penalties",
    "convolutions",
    "resume",
    "gradient_accumulation",
    "gradient_checkpointing",
    "bf16",
    "fp16_overflow",
    "weight_average",
]

if __name__ == "__main__":
    main(globals())
