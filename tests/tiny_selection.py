"""A planted teacher, and the smallest ViT with candidates on digits, for the tests of block-size selection."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_training import arguments
from torch import nn
from transformers import Trainer, ViTConfig, ViTForImageClassification

from kron_hf import BlockSizeCallback, KronConfig, get_kron_model
from kron_hf.data.grey import load_grey_set
from kron_hf.selection import BlockSizeSelector, KronCandidates

STEPS, SAVE_STEPS = 20, 2
CANDIDATES = {"candidate_block_sizes": [2, 4, (4, 8)], "candidate_ranks": [1]}
TWO = [((2, 2), 1), ((4, 4), 1), ((8, 8), 1)]


class TwoLayers(nn.Module):
    """Two layers with candidates, a plain one between them."""

    def __init__(self, seed=0, candidates=TWO):
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = KronCandidates(16, 32, candidates)
        self.norm = nn.LayerNorm(32)
        self.fc2 = KronCandidates(32, 16, candidates)
        self.head = nn.Linear(16, 4)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.fc2(torch.tanh(self.norm(self.fc1(x))))))
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def planted(block, seed, noise=0.0, size=32, rows=512):
    """A weight of blocks of one size, about half of them zero, of rank 1; inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    blocks = size // block
    s = (torch.rand(blocks, blocks, generator=generator) < 0.5).float()
    a, b = torch.randn(blocks, blocks, generator=generator), torch.randn(block, block, generator=generator)
    weight = torch.kron(s * a, b)
    weight *= size**0.5 / weight.norm()
    x = torch.randn(rows, size, generator=generator)
    y = x @ weight.T
    return x, y + noise * y.std() * torch.randn(y.shape, generator=generator)


def groups_of(model, lr=0.01):
    """S at the base rate, A and B at four times that, as kron_param_groups gives them."""
    masks = [p for name, p in model.named_parameters() if name.endswith(".s")]
    others = [p for name, p in model.named_parameters() if not name.endswith(".s")]
    return [{"params": masks, "lr": lr}, {"params": others, "lr": 4 * lr}]


def fit(model, x, y, steps, held_out=128, batch=64, until_done=True, **options):
    """Trains a model to y of x; the last rows are held out."""
    train_x, train_y, test_x, test_y = x[held_out:], y[held_out:], x[:held_out], y[:held_out]
    optimizer = torch.optim.AdamW(groups_of(model), weight_decay=0.0)
    selector = BlockSizeSelector(
        model, total_steps=steps, evaluate=lambda: float((model(test_x) - test_y).square().mean()), **options
    )
    selector.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        if until_done and selector.done:
            break
        rows = torch.randint(0, len(train_x), (batch,), generator=generator)
        optimizer.zero_grad()
        (model(train_x[rows]) - train_y[rows]).square().mean().backward()
        optimizer.step()
    selector.detach()
    return selector


@cache
def digits(count=64):
    """Rows for a ViT of 8 x 8 pixels; the last quarter is the held-out part."""
    images, labels = load_grey_set("digits").train
    pixels = torch.tensor(images[:count], dtype=torch.float32)[:, None] / 255
    return [{"pixel_values": p, "labels": int(label)} for p, label in zip(pixels, labels[:count], strict=True)]


def vit(seed=0, config=None):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(
        ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=10, hidden_dropout_prob=0.1)
    )
    return get_kron_model(model, KronConfig(**CANDIDATES) if config is None else config)


def callback_of(mode="validation", **options):
    held_out = digits()[48:] if mode == "validation" else None
    return BlockSizeCallback(mode, held_out, **{"eval_batches": 2, "restart": True, **options})


def trainer(folder, model=None, callback=None, trainer_class=Trainer, eval_dataset=None, **options):
    """Drops after 6 and 10 of 20 steps in validation mode."""
    args = arguments(folder, **{"max_steps": STEPS, "logging_steps": 2, "warmup_steps": 2, **options})
    model, callback = vit() if model is None else model, callback or callback_of()
    data = {"train_dataset": digits()[:48], "eval_dataset": eval_dataset}
    return trainer_class(model, args, callbacks=[callback], **data)


def callback_in(run):
    (callback,) = [each for each in run.callback_handler.callbacks if isinstance(each, BlockSizeCallback)]
    return callback


def stored_state(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())


def stored_tensors(folder):
    return load_file(Path(folder) / "model.safetensors")
