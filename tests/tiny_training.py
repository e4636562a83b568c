"""A tiny model with Kronecker layers of two block sizes, and data it can learn, for the training tests."""

import torch
from torch import nn
from transformers import TrainingArguments

from kron_hf.layers import KronLinear
from kron_hf.sparsity.pruning import kron_layers

TOTAL_ENTRIES = 2 * 512
LARGEST_BLOCK = 32


class TinyKron(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = KronLinear(16, 32, block_size=(4, 4), rank=2)  # 32 blocks of 16 entries
        self.norm = nn.LayerNorm(32)
        self.fc2 = KronLinear(32, 16, block_size=(8, 4), rank=2)  # 16 blocks of 32 entries
        self.head = nn.Linear(16, 4)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.fc2(torch.tanh(self.norm(self.fc1(x))))))
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 16, generator=generator)
    return {"x": x, "labels": x[:, :4].argmax(1)}


def dataset(size=64):
    data = batch(1000, size)
    return [{"x": x, "labels": label} for x, label in zip(data["x"], data["labels"], strict=True)]


def train(model, optimizer, steps, accumulate=1, after_step=None):
    for step in steps:
        optimizer.zero_grad()
        for part in zip(*(value.chunk(accumulate) for value in batch(step).values()), strict=True):
            x, labels = part
            (model(x.to(next(model.parameters()).dtype), labels)["loss"] / accumulate).backward()
        optimizer.step()
        if after_step is not None:
            after_step()


def arguments(path, **overrides):
    options = {
        "output_dir": str(path),
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**options, **overrides})


def masks(model):
    return [layer.block_mask for layer in kron_layers(model)]


def assert_same_weights(model, other):
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def assert_target(model, target):
    """At least the target, by less than one block, and at least one block left in each layer."""
    dead = sum(int((~layer.block_mask).sum()) * layer.b[0].numel() for layer in kron_layers(model))
    assert target * TOTAL_ENTRIES <= dead < target * TOTAL_ENTRIES + LARGEST_BLOCK
    assert all(mask.any() for mask in masks(model))
    assert all(torch.all(layer.s[~layer.block_mask] == 0) for layer in kron_layers(model))
