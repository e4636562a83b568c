"""A tiny checkpoint with adapters of every way to make one, for the PEFT tests."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest
import torch
from families import FAMILIES, outputs_of
from packaging.version import Version
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from kron_hf import KronConfig
from kron_hf.sparsity.pruning import kron_layers

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


@contextmanager
def quiet_peft() -> Iterator[None]:
    """What `PEFT_NOISE` does, for fixtures, which marks do not reach."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def add_adapter(model: PreTrainedModel, **options) -> PreTrainedModel:
    """`model.add_adapter`; skips where transformers refuses the installed peft, whatever the adapter is."""
    if Version(version("peft")) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"adapter methods of transformers {version('transformers')} want peft {MIN_PEFT_VERSION}")
    model.add_adapter(config(**options))
    return model


DOORS = {
    "get_peft_model": lambda folder, **options: get_peft_model(load_base(folder), config(**options)),
    "add_adapter": lambda folder, **options: add_adapter(load_base(folder), **options),
    "inject_adapter_in_model": lambda folder, **options: inject_adapter_in_model(config(**options), load_base(folder)),
}

logits = functools.partial(outputs_of, inputs=INPUTS)
