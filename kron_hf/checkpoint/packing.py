"""S and A of a layer without what their zero blocks hold: one bit a block, and the values of the living ones."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Packed", "living_bits", "mask_bytes", "pack", "unpack"]

BITS = 8


class Packed(NamedTuple):
    """What is left of S `[O, I]` and A `[rank, O, I]`; n blocks live.

    Attributes:
        live_blocks: uint8 `[ceil(O * I / 8)]`: block `k` in row-major order lives if bit `k % 8` of byte `k // 8` is
            set. Bits after the last block are zero.
        live_s: The entries of S that are not zero, `[n]`, in that order.
        live_a: The entries of A in the same places, `[rank, n]`.
    """

    live_blocks: Tensor
    live_s: Tensor
    live_a: Tensor

    @property
    def nbytes(self) -> int:
        """What it takes in a file."""
        return sum(tensor.nbytes for tensor in self)


def pack(s: Tensor, a: Tensor) -> Packed:
    """Leaves out zero entries of S, and those of A in their places.

    Args:
        s: Mask factor S, `[O, I]`.
        a: Factors A_i, `[rank, O, I]`.
    """
    living = s != 0
    places = _places(living.device)
    padded = living.new_zeros(mask_bytes(*living.shape) * BITS)
    padded[: living.numel()] = living.flatten()
    bits = padded.view(-1, BITS).to(torch.uint8) << places
    return Packed(bits.sum(1, dtype=torch.uint8), s[living], a[:, living])


def unpack(packed: Packed, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """S `[O, I]` and A `[rank, O, I]`, zero where a block is dead.

    Args:
        packed: What `pack` has made of them.
        shape: `(O, I)`.

    Raises:
        ValueError: Number of bits, of values and shape do not fit together, or a bit after the last block is set.
    """
    living = living_bits(packed.live_blocks, shape)
    count, (rank, given) = int(living.sum()), packed.live_a.shape
    if packed.live_s.shape != (count,) or given != count:
        raise ValueError(f"{count} blocks live, but there are {len(packed.live_s)} values of S and {given} of each A")
    s, a = packed.live_s.new_zeros(shape), packed.live_a.new_zeros(rank, *shape)
    s[living], a[:, living] = packed.live_s, packed.live_a
    return s, a


def living_bits(live_blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Which blocks live, bool `[O, I]`.

    Raises:
        ValueError: The number of bytes is another than `shape` takes, or a bit after the last block is set.
    """
    if live_blocks.shape != (mask_bytes(*shape),):
        raise ValueError(f"a mask of {shape} blocks takes {mask_bytes(*shape)} bytes, got {list(live_blocks.shape)}")
    bits = ((live_blocks.to(torch.uint8).unsqueeze(1) >> _places(live_blocks.device)) & 1).flatten().bool()
    if bool(bits[prod(shape) :].any()):
        raise ValueError(f"a bit after the last of {shape} blocks is set")
    return bits[: prod(shape)].view(shape)


def mask_bytes(out_blocks: int, in_blocks: int) -> int:
    """How many bytes the mask of O x I blocks takes."""
    return -(-out_blocks * in_blocks // BITS)


def _places(device: torch.device) -> Tensor:
    return torch.arange(BITS, dtype=torch.uint8, device=device)
