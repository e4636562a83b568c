"""The distinct Kronecker layers of a saved model, from its config alone: no weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kron_hf.checkpoint import KronCheckpointConfig, strip_kron_config
from kron_hf.checkpoint.reading import clean_errors
from kron_hf.config import KronConfig
from kron_hf.escaping import plain
from kron_hf.model import build_untrained, model_class_for
from kron_hf.ops.ways import Shape, tf32_allowed
from kron_hf.targets import find_targets

__all__ = ["ModelLayer", "model_layers"]


@dataclass(frozen=True)
class ModelLayer:
    """Layers of one size in a model.

    Attributes:
        in_features: Size of an input.
        out_features: Size of an output.
        block_size: `(bo, bi)`.
        rank: Number of Kronecker terms.
        bias: Whether they have one.
        names: The modules that are such layers.
    """

    in_features: int
    out_features: int
    block_size: tuple[int, int]
    rank: int
    bias: bool
    names: tuple[str, ...]

    def shape(self, device_type: str, dtype: torch.dtype, tokens: int) -> Shape:
        """What the way to compute it is chosen by."""
        (block_out, block_in), rank = self.block_size, self.rank
        blocks = (self.out_features // block_out, self.in_features // block_in)
        threads = torch.get_num_threads() if device_type == "cpu" else 1
        tf32 = device_type == "cuda" and tf32_allowed(dtype)
        return Shape(device_type, dtype, tokens, *blocks, block_out, block_in, rank, threads, tf32)

    def __str__(self) -> str:
        first, more = plain(self.names[0]), ", ..." if len(self.names) > 1 else ""
        return (
            f"{len(self.names)} x {self.in_features} -> {self.out_features}, blocks {self.block_size[0]} x "
            f"{self.block_size[1]}, rank {self.rank} ({first}{more})"
        )


def model_layers(name: str, config: Any, conversion: Mapping[str, Any]) -> list[ModelLayer]:
    """The layers of a converted model; of a dense one those that it would have.

    Args:
        name: What the model is called in errors.
        config: Its transformers config, which is changed.
        conversion: Arguments for `KronConfig`, if the model is dense.

    Raises:
        ValueError: There are such arguments for a converted model, or none of its modules can be converted.
    """
    entry = getattr(config, "quantization_config", None)
    if isinstance(entry, dict) and entry.get("quant_method") == "kron":
        if conversion:
            given = ", ".join(f"--{option.replace('_', '-')}" for option in conversion)
            raise ValueError(f"{name} has Kronecker layers already: {given} only goes with a dense model")
        stored: Any = KronCheckpointConfig(**entry)  # transformers' decorator types it as its own base class
        wanted = KronConfig(modules=stored.modules)
    else:
        wanted = KronConfig(**conversion)
    strip_kron_config(config)
    model_class = model_class_for(config, with_head=False)
    with clean_errors(name), torch.device("meta"):
        model = build_untrained(model_class, config)
    found: dict[tuple[Any, ...], list[str]] = {}
    for target in find_targets(model, wanted, compare_cost=False):
        linear = target.linear
        for size, terms in target.candidates or ((target.block_size, target.rank),):
            key = (linear.in_features, linear.out_features, size, terms, linear.bias is not None)
            found.setdefault(key, []).append(target.name)
    return [ModelLayer(*key, names=tuple(names)) for key, names in found.items()]
