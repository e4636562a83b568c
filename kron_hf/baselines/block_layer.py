"""Dense linears seen as grids of blocks: their norms, their zeros, and setting blocks to zero."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from kron_hf.factors import to_blocks
from kron_hf.layers import resolve_block_size
from kron_hf.sharding import gather, local, shard_of

__all__ = [
    "BlockLayer",
    "Layers",
    "block_rms",
    "checked_layers",
    "entry_mask",
    "gather_weights",
    "scale_blocks",
    "share_of_zero_blocks",
    "zero_block_masks",
]


class BlockLayer(NamedTuple):
    """A dense linear, `O * bo` by `I * bi`, and the size of its blocks.

    Attributes:
        linear: The layer, whose weight is pruned in place.
        block_size: `(bo, bi)`, dividing `(out_features, in_features)`.
    """

    linear: nn.Linear
    block_size: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks in each direction, `(O, I)`."""
        return self.linear.out_features // self.block_size[0], self.linear.in_features // self.block_size[1]

    @property
    def block_entries(self) -> int:
        """Entries of one block, `bo * bi`."""
        return math.prod(self.block_size)


Layers: TypeAlias = Mapping[str, tuple[nn.Linear, int | tuple[int, int]]]


def checked_layers(layers: Layers) -> dict[str, BlockLayer]:
    """The layers as `BlockLayer`s; pairs `(linear, block_size)` will do.

    Raises:
        TypeError: An entry is no `nn.Linear` with a block size; `KronLinear`s are none.
        ValueError: There is no layer, a block does not divide its layer, a weight is shared by two of them, flattened
            (FSDP version 1, DeepSpeed ZeRO-3), on the meta device or not finite.
    """
    if not layers:
        raise ValueError("there are no layers to prune")
    checked: dict[str, BlockLayer] = {}
    owners: dict[int, str] = {}
    for name, entry in layers.items():
        if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[0], nn.Linear):
            found = type(entry[0] if isinstance(entry, tuple) and entry else entry).__name__
            hint = "; make Kronecker layers sparse with Sparsifier" if found == "KronLinear" else ""
            raise TypeError(f"{name}: a layer to prune must be an nn.Linear with a block size, got a {found}{hint}")
        linear, size = entry
        weight = linear.weight
        if weight.shape != (linear.out_features, linear.in_features):
            raise ValueError(
                f"{name}: its weight has been flattened to {list(weight.shape)}: FSDP version 1 and DeepSpeed ZeRO-3 "
                "hide the parameters; use fsdp_version 2, or ZeRO-1/2"
            )
        if id(weight) in owners:
            raise ValueError(f"{name}: its weight is also that of {owners[id(weight)]}; give each weight once")
        owners[id(weight)] = name
        if weight.is_meta or not bool(torch.isfinite(local(weight)).all()):
            kind = "is on the meta device" if weight.is_meta else "holds NaN or infinite values"
            raise ValueError(f"{name}: its weight {kind}")
        checked[name] = BlockLayer(linear, resolve_block_size(size, linear.out_features, linear.in_features, name))
    return checked


def gather_weights(layers: Iterable[BlockLayer]) -> list[Tensor]:
    """The weights, whole. If they are sharded (FSDP2): one all-gather, all processes must call."""
    return gather([layer.linear.weight for layer in layers])


def block_rms(weight: Tensor, layer: BlockLayer) -> Tensor:
    """Root mean square of each block of a tensor like the weight, `[O, I]` in float64; NaN counts as the largest.

    Blocks of different sizes compare, and the ranking does not depend on rounding more than needed.
    """
    rms = to_blocks(weight, layer.block_size).double().square().mean(1).sqrt().view(layer.grid)
    return rms.nan_to_num(nan=torch.finfo(rms.dtype).max)


def zero_block_masks(layers: Iterable[BlockLayer]) -> list[Tensor]:
    """Which blocks are exactly zero in every entry, bool `[O, I]` each."""
    layers = list(layers)
    pairs = zip(layers, gather_weights(layers), strict=True)
    return [(to_blocks(weight, layer.block_size) == 0).all(1).view(layer.grid) for layer, weight in pairs]


def share_of_zero_blocks(layers: Iterable[BlockLayer]) -> float:
    """Share of the entries of all weights that lie in blocks whose entries are all exactly zero, in [0, 1]."""
    layers = list(layers)
    pairs = zip(layers, zero_block_masks(layers), strict=True)
    zero = sum(int(mask.sum()) * layer.block_entries for layer, mask in pairs)
    return zero / sum(layer.linear.weight.numel() for layer in layers)


def entry_mask(mask: Tensor, layer: BlockLayer) -> Tensor:
    """A mask of blocks `[O, I]`, or a number for each, as one of entries `[out, in]`."""
    (out_blocks, in_blocks), (block_out, block_in) = layer.grid, layer.block_size
    spread = mask[:, None, :, None].expand(out_blocks, block_out, in_blocks, block_in)
    return spread.reshape(layer.linear.out_features, layer.linear.in_features)


def scale_blocks(layer: BlockLayer, factor: Tensor) -> None:
    """Multiplies each block by its factor `[O, I]`, in place; a factor of zero gives exact zeros."""
    weight = layer.linear.weight
    here = shard_of(entry_mask(factor.to(weight.dtype), layer), weight)
    local(weight).mul_(here).masked_fill_(here == 0, 0.0)  # also where NaN * 0 or -0 would stand
