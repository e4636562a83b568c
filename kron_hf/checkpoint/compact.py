"""Compact weight files (format version 2): what zero blocks of S hide is not stored.

Instead of `NAME.s` and `NAME.a` a layer has three tensors, see `packing`: `NAME.live_blocks`, `NAME.live_s` and
`NAME.live_a`. A layer that would not get smaller is stored as in version 1. transformers' loader puts the tensors
together by a `WeightConverter`, so that placing on devices, casting and offloading go on as for any model.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import ConversionOps, PreTrainedModel, WeightConverter

from kron_hf.checkpoint.packing import Packed, living_bits, mask_bytes, pack, unpack
from kron_hf.checkpoint.stored import StoredTensor, check_dtype
from kron_hf.escaping import printable, shown
from kron_hf.sharding import is_sharded

__all__ = [
    "check_packed",
    "is_compact",
    "is_packed",
    "pack_state_dict",
    "packed_layer",
    "stored_elements",
    "unpacking",
]

PARTS = ("live_blocks", "live_s", "live_a")  # of `Packed`, in its order
HEADER = 128  # what a third tensor takes in the header of a file, with a name of usual length, in bytes


def pack_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, compact where that is smaller.

    Everything that the model computes from is in it, bit for bit. A holds anything where S is zero, but nothing that
    counts: that is left out. Where it does count, as 0 * inf is not zero, the layer stays as it is.

    Raises:
        ValueError: A layer is sharded, or on the meta device; names it.
    """
    state = dict(model.state_dict())
    packed: dict[int, Packed | None] = {}  # a layer that the model holds under two names is packed once
    for name, layer in _layers(model):
        if not {f"{name}.s", f"{name}.a"} <= state.keys():
            continue  # a candidate that was dropped
        s, a = state[f"{name}.s"], state[f"{name}.a"]
        if s.is_meta or is_sharded(s):
            raise ValueError(f"{printable(name)}: its factors are sharded or on the meta device; gather them first")
        if id(layer) not in packed:
            packed[id(layer)] = _packed_if_smaller(s, a)
        if found := packed[id(layer)]:
            del state[f"{name}.s"], state[f"{name}.a"]
            state.update({f"{name}.{part}": tensor for part, tensor in zip(PARTS, found, strict=True)})
    return state


def is_compact(stored: Mapping[str, Any]) -> bool:
    """Whether any layer is stored without its zeros."""
    return any(packed_layer(key) is not None for key in stored)


def is_packed(stored: Mapping[str, Any], name: str) -> bool:
    """Whether any tensor of a compact layer of this name is stored."""
    return any(f"{name}.{part}" in stored for part in PARTS)


def packed_layer(key: str) -> str | None:
    """The name of the layer whose compact tensor this is by its name; None if it is no such tensor."""
    name, _, part = key.rpartition(".")
    return name if part in PARTS else None


def stored_elements(stored: Mapping[str, StoredTensor]) -> int:
    """How many elements the files hold; a byte of a mask says of eight blocks whether they are zero."""
    return sum(prod(tensor.shape) * (8 if key.endswith(f".{PARTS[0]}") else 1) for key, tensor in stored.items())


def check_packed(stored: Mapping[str, StoredTensor], name: str, shape: list[int]) -> None:
    """Compares the tensors of a compact layer with what the layer needs, its mask bit by bit; nothing is unpacked.

    Args:
        stored: What the files hold.
        name: The name of the layer in the files.
        shape: That of A, `[rank, O, I]`.

    Raises:
        ValueError: A tensor is missing, there twice, or has another shape or dtype; or the mask names another number
            of blocks than there are values, or blocks that there are not. Names the file and the layer.
    """
    keys = [f"{name}.{part}" for part in PARTS]
    found = [stored[key] for key in keys if key in stored]
    if missing := [key for key in keys if key not in stored]:
        raise ValueError(f"{found[0].file}: tensor {shown(missing[0])} is missing beside others of a compact layer")
    if whole := [key for key in (f"{name}.s", f"{name}.a") if key in stored]:
        raise ValueError(f"{found[0].file}: the factors of {shown(name)} are there twice, {shown(whole[0])} is whole")
    mask, s, a = found
    rank, out_blocks, in_blocks = shape
    blocks, count = out_blocks * in_blocks, s.shape[0] if s.shape else 0
    for key, tensor, fits in (
        (keys[0], mask, mask.shape == [mask_bytes(out_blocks, in_blocks)]),
        (keys[1], s, s.shape == [count] and count <= blocks),
        (keys[2], a, a.shape == [rank, count]),
    ):
        if not fits:
            raise ValueError(
                f"{tensor.file}: tensor {shown(key)} has shape {shown(tensor.shape)}, which does not fit "
                f"{out_blocks} x {in_blocks} blocks at rank {rank}, as config.json requires, of which {count} live"
            )
    check_dtype(keys[0], mask, ("U8",))
    check_dtype(keys[1], s)
    check_dtype(keys[2], a)
    with safe_open(mask.path, framework="pt") as file:
        bits = file.get_tensor(keys[0])
    try:
        living = int(living_bits(bits, (out_blocks, in_blocks)).sum())
    except ValueError as error:
        raise ValueError(f"{mask.file}: tensor {shown(keys[0])}: {error}") from None
    if living != count:
        raise ValueError(
            f"{mask.file}: tensor {shown(keys[0])} says that {living} blocks live, but {shown(keys[1])} holds {count}"
        )


def unpacking() -> list[WeightConverter]:
    """What transformers' loader is told, so that it makes S and A of the three tensors of each compact layer."""
    # One target, since older versions allow no more for several sources; the operation gives A, too.
    return [WeightConverter([rf"\.{part}$" for part in PARTS], ".s", [_Unpack()])]


class _Unpack(ConversionOps):
    """Makes S and A of one layer."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        assert model is not None
        layer: Any = model.get_submodule(full_layer_name.removesuffix(".s"))
        parts = [input_dict[pattern] for pattern in source_patterns]
        packed = Packed(*(part[0] if isinstance(part, list) else part for part in parts))
        s, a = unpack(packed, tuple(layer.s.shape))
        # Full names: the loader would look for a short one anywhere in the name of the layer.
        return {full_layer_name: s.to(layer.s.dtype), f"{full_layer_name[:-1]}a": a.to(layer.a.dtype)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("a model is saved whole; kron_hf.export writes compact files")


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with the three factors."""
    for name, module in model.named_modules(remove_duplicate=False):
        if {"s", "a", "b"} <= {key for key, _ in module.named_parameters(recurse=False)}:
            yield name, module


def _packed_if_smaller(s: Tensor, a: Tensor) -> Packed | None:
    packed = pack(s, a)
    if packed.nbytes + HEADER >= s.nbytes + a.nbytes or not bool(torch.isfinite(a[:, s == 0]).all()):
        return None
    return packed
