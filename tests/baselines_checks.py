"""Checks of the baselines on two processes, each against one process with the same global batch."""

import copy
import json

import torch
from distributed_checks import assert_same_on_all_ranks, train
from tiny_dense import ALGORITHMS, STEPS
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_processes import main

from kron_hf.baselines.block_layer import zero_block_masks
from kron_hf.sharding import gather


class Uneven(nn.Module):
    """Weights of 15 and 12 rows in blocks of 5 and 3: the edges of the shards cut blocks."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = nn.Linear(16, 15)
        self.fc2 = nn.Linear(15, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x))))).float(), labels)


def pruner_of(model, name):
    algorithm, options = ALGORITHMS[name]
    layers = {"fc1": (model.fc1, (5, 4)), "fc2": (model.fc2, (3, 5))}
    return algorithm(layers, target_sparsity=0.6, total_steps=STEPS, **options)


def wrap(model, way):
    if way == "ddp":
        return DistributedDataParallel(model)
    for layer in (model.fc1, model.fc2):
        fully_shard(layer)
    return fully_shard(model)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def one_process(name):
    model = Uneven().double()
    optimizer = adamw(model)
    pruner = pruner_of(model, name)
    pruner.attach(optimizer)
    masks = []
    for step in range(STEPS):
        train(model, optimizer, [step], torch.float64, parallel=False)
        masks.append(zero_block_masks(pruner.layers.values()))
    return model, masks


def equality(way, name, accumulate=1):
    alone, expected = one_process(name)
    model = Uneven().double()
    wrapped = wrap(model, way)
    optimizer, pruner = adamw(wrapped), pruner_of(model, name)
    pruner.attach(optimizer)
    for step in range(STEPS):
        train(wrapped, optimizer, [step], torch.float64, accumulate=accumulate)
        masks = zero_block_masks(pruner.layers.values())
        assert_same_on_all_ranks([mask.int() for mask in masks])
        assert all(torch.equal(*pair) for pair in zip(masks, expected[step], strict=True)), (name, step)
    assert pruner.frozen
    assert 0.6 <= pruner.sparsity < 0.6 + 20 / 420
    state = model.state_dict()
    for key, value in zip(state, gather(list(state.values())), strict=True):
        torch.testing.assert_close(value, alone.state_dict()[key])


def ddp(folder):
    for name in ALGORITHMS:
        equality("ddp", name)


def fsdp2(folder):
    for name in ALGORITHMS:
        equality("fsdp2", name)


def gradient_accumulation(folder):
    for way in ("ddp", "fsdp2"):
        equality(way, "rigl", accumulate=2)


def resume(folder):
    """A run that stops between two updates and goes on equals one that does not."""
    for way, name in (("ddp", "rigl"), ("fsdp2", "rigl"), ("fsdp2", "elastic")):
        states = []
        for stop in (None, 12):
            model = Uneven()
            wrapped = wrap(model, way)
            optimizer, pruner = adamw(wrapped), pruner_of(model, name)
            pruner.attach(optimizer)
            train(wrapped, optimizer, range(STEPS if stop is None else stop), torch.float32)
            if stop is not None:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                text = json.dumps(pruner.state_dict())
                model = Uneven(seed=1)
                wrapped = wrap(model, way)
                model.load_state_dict(saved[0])
                optimizer, pruner = adamw(wrapped), pruner_of(model, name)
                optimizer.load_state_dict(saved[1])
                pruner.load_state_dict(json.loads(text))
                pruner.attach(optimizer)
                train(wrapped, optimizer, range(stop, STEPS), torch.float32)
            state = model.state_dict()
            states.append(dict(zip(state, gather(list(state.values())), strict=True)))
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


CHECKS = ["ddp", "fsdp2", "gradient_accumulation", "resume"]

if __name__ == "__main__":
    main(globals())
