"""A tiny dense model with blocks of three sizes and shapes that are no squares, for the tests of the baselines."""

import math

import torch
from torch import nn

from kron_hf.baselines import (
    BlockLayer,
    BlockRigL,
    ElasticGroupLasso,
    GradualPruning,
    GroupLasso,
    IterativePruning,
)
from kron_hf.factors import to_blocks

STEPS = 40
# 40 steps: updates at 5, 10, 15, frozen at 20.
ALGORITHMS = {
    "lasso": (GroupLasso, {"interval": 5}),
    "elastic": (ElasticGroupLasso, {"interval": 5}),
    "rigl": (BlockRigL, {"interval": 5, "end": 0.5}),
    "iterative": (IterativePruning, {"rounds": 3}),
    "gradual": (GradualPruning, {"interval": 5}),
}


class TinyDense(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = nn.Linear(16, 30)
        self.fc2 = nn.Linear(30, 15)
        self.fc3 = nn.Linear(15, 12, bias=False)
        self.head = nn.Linear(12, 4)

    def forward(self, x, labels=None):
        x = torch.tanh(self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x))))))
        logits = self.head(x)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def tiny_layers(model):
    """Blocks of 8, 25 and 6 entries: 60, 18 and 30 of them."""
    return {
        "fc1": BlockLayer(model.fc1, (2, 4)),
        "fc2": BlockLayer(model.fc2, (5, 5)),
        "fc3": BlockLayer(model.fc3, (2, 3)),
    }


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def zeros(layers):
    """The definition, block by block: all entries exactly zero."""
    return {name: (to_blocks(linear.weight, size) == 0).all(1) for name, (linear, size) in layers.items()}


def assert_target(layers, target):
    """At least the target, by less than one block, and at least one block left in each layer."""
    masks = zeros(layers)
    entries = {name: math.prod(size) for name, (_, size) in layers.items()}
    dead = sum(int(mask.sum()) * entries[name] for name, mask in masks.items())
    total = sum(linear.weight.numel() for linear, _ in layers.values())
    assert target * total <= dead < target * total + max(entries.values())
    assert not any(mask.all() for mask in masks.values())
