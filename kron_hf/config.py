"""`KronConfig`: what to replace by Kronecker-sparse layers, and how. A PEFT config that validates itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from typing import Any, Literal

from peft import PeftConfig

__all__ = ["BlockSize", "KronConfig"]

BlockSize = int | tuple[int, int]
INIT_WEIGHTS = (None, "random", "nearest", "calibrated")


@dataclass
class KronConfig(PeftConfig):
    """Configuration of Kronecker-sparse layers, `W = sum_{i=1..rank} (S * A_i) (x) B_i`.

    Names and matching rules are those of PEFT's configs.

    Args:
        block_size: Shape of a block of W, `(out, in)`, or one int for square blocks. -1 in a pair is the whole
            dimension: `(1, -1)` is a plain low-rank layer. Must divide the layers it is used on.
        rank: Number of Kronecker terms, r in the paper; from 1 to `bo * bi`.
        target_modules: Which `nn.Linear`s to replace. None: the attention and MLP projections of the architecture
            (on a plain `nn.Module`, as `"all-linear"`). `"all-linear"`: every linear but the output head. A list:
            names or name endings. Any other string: a regular expression for the whole name.
        exclude_modules: Names or name endings (list), or a regular expression (str), to leave alone.
        layers_to_transform: Indices of the encoder layers to touch; only with a list of `target_modules`.
        layers_pattern: Name of the list that these indices count, if it is an unusual one.
        block_size_pattern: Block size of single modules: `{name ending or regular expression: block_size}`.
        rank_pattern: Rank of single modules, as `block_size_pattern`.
        init_weights: How the factors start. `"random"`: variance-matched noise. `"nearest"`: the best fit to the
            replaced weight in the Frobenius norm. `"calibrated"`: fitted to the layer's outputs on data (not in
            this version). None: random for a model that was built from its config; an error for one loaded from a
            checkpoint, since its weights would be lost.
        base_model_name_or_path: The model that `get_kron_model(config)` starts from.

    Raises:
        ValueError: A value is out of range or of the wrong kind.

    Example:
        >>> KronConfig(block_size=(4, 16), rank=2, rank_pattern={"fc2": 4}).block_size
        (4, 16)
    """

    block_size: BlockSize = field(default=16, metadata={"help": "Block shape (out, in), or one int for squares."})
    rank: int = field(default=4, metadata={"help": "Number of Kronecker terms."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to replace."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to touch."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    block_size_pattern: dict[str, BlockSize] = field(default_factory=dict, metadata={"help": "Block sizes by name."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks by name."})
    init_weights: Literal["random", "nearest", "calibrated"] | None = field(
        default=None, metadata={"help": "How the factors start."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "KRON"  # type: ignore[assignment]  # not a member of PEFT's enum
        self.block_size = _checked_block_size("block_size", self.block_size)
        self.block_size_pattern = {
            name: _checked_block_size(f"block_size_pattern[{name!r}]", size)
            for name, size in _checked_pattern("block_size_pattern", self.block_size_pattern).items()
        }
        self.rank = _checked_rank("rank", self.rank, self.block_size)
        for name, rank in _checked_pattern("rank_pattern", self.rank_pattern).items():
            _checked_rank(f"rank_pattern[{name!r}]", rank)
        self.target_modules = _checked_names("target_modules", self.target_modules)
        self.exclude_modules = _checked_names("exclude_modules", self.exclude_modules)
        self._check_layer_selection()
        if isinstance(self.base_model_name_or_path, PathLike):
            self.base_model_name_or_path = fspath(self.base_model_name_or_path)
        if self.init_weights not in INIT_WEIGHTS:
            raise ValueError(f"init_weights must be one of {INIT_WEIGHTS}, got {self.init_weights!r}")

    def _check_layer_selection(self) -> None:
        self.layers_to_transform = _checked_indices(self.layers_to_transform)
        self.layers_pattern = _checked_names("layers_pattern", self.layers_pattern)
        if self.layers_to_transform is not None and not isinstance(self.target_modules, list):
            raise ValueError("layers_to_transform needs target_modules to be a list of names")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> KronConfig:
        """Builds the config from its own JSON keys; this class is the only one with `peft_type` "KRON"."""
        found = kwargs.pop("peft_type", "KRON")
        if found != "KRON":
            raise ValueError(f"this adapter_config.json has peft_type {found!r}; KronConfig needs 'KRON'")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(kwargs.keys() - known):
            raise ValueError(f"this adapter_config.json has keys that this kron_hf does not know: {unknown}")
        return cls(**kwargs)


def _checked_block_size(name: str, value: Any) -> BlockSize:
    sizes = (value,) if isinstance(value, int) else value
    pair = not isinstance(value, int)
    if not isinstance(sizes, tuple | list) or (pair and len(sizes) != 2) or not all(map(_is_int, sizes)):
        raise ValueError(f"{name} must be a positive int or a pair (out, in) of ints, got {value!r}")
    if any(size < 1 and not (pair and size == -1) for size in sizes):
        raise ValueError(
            f"{name} must be a positive int or a pair of positive ints (-1 in a pair = the whole dimension), "
            f"got {value!r}"
        )
    return (sizes[0], sizes[-1]) if pair else value


def _checked_rank(name: str, value: Any, block_size: BlockSize | None = None) -> int:
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if block_size is not None:
        block_out, block_in = (block_size, block_size) if isinstance(block_size, int) else block_size
        if block_out > 0 and block_in > 0 and value > block_out * block_in:
            raise ValueError(f"{name} must be at most bo * bi = {block_out * block_in}, got {value}")
    return value


def _checked_pattern(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a dict with module names as keys, got {value!r}")
    for key in value:
        _check_regex(name, key)
    return value


def _checked_names(name: str, value: Any) -> list[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        _check_regex(name, value)
        return value
    # A set's own order changes from run to run.
    names = sorted(value, key=str) if isinstance(value, set | frozenset) else value
    if not isinstance(names, list | tuple) or not all(isinstance(item, str) for item in names):
        raise ValueError(f"{name} must be None, a list of module names or a string, got {value!r}")
    return list(names)


def _checked_indices(value: Any) -> list[int] | int | None:
    indices = list(value) if isinstance(value, list | tuple | range) else value
    listed = indices if isinstance(indices, list) else [indices]
    if indices is not None and not all(_is_int(index) and index >= 0 for index in listed):
        raise ValueError(f"layers_to_transform must be None, an index or a list of indices, got {value!r}")
    return indices


def _check_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}: {value!r} is no valid regular expression ({error})") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
