"""A tiny checkpoint with adapters of every way to make one, for the PEFT tests."""

import functools

import torch
from families import FAMILIES, outputs_of
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from kron_hf import KronConfig
from kron_hf.pruning import kron_layers

# PEFT asks transformers for an attribute by its former name.
PEFT_NOISE = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
INPUTS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def config(**overrides) -> KronConfig:
    return KronConfig(**{"block_size": (4, 8), "rank": 2, "init_weights": "random", **overrides})


def save_base(folder, family: str = "vit") -> str:
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder)
    return str(folder)


def load_base(folder, **options) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(folder, **options)


def adapted(folder, **overrides) -> PeftModel:
    """A `PeftModel` on the checkpoint, half of whose blocks are frozen at zero."""
    model = get_peft_model(load_base(folder), config(**overrides))
    prune(model)
    return model


@torch.no_grad()
def prune(model: nn.Module) -> None:
    for layer in kron_layers(model):
        layer.s.view(-1)[::2] = 0
        layer.freeze_mask()


def dead_blocks(model: nn.Module) -> list[torch.Tensor | None]:
    return [layer.dead_blocks for layer in kron_layers(model)]


def _added(folder, **options):
    model = load_base(folder)
    model.add_adapter(config(**options))
    return model


DOORS = {
    "get_peft_model": lambda folder, **options: get_peft_model(load_base(folder), config(**options)),
    "add_adapter": _added,
    "inject_adapter_in_model": lambda folder, **options: inject_adapter_in_model(config(**options), load_base(folder)),
}

logits = functools.partial(outputs_of, inputs=INPUTS)
