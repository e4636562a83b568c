"""The options of one layer: block sizes and ranks with their parameters and FLOPs, and dense."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kron_hf.config_checks import BlockSize
from kron_hf.factors import kron_flops
from kron_hf.layers import resolve_block_size

__all__ = ["Option", "dense_option", "is_low_rank", "kron_option", "layer_menu"]

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of shapes that are fitted rank by rank
# Few outputs and many inputs in a block: they fitted best among the shapes with as many parameters.
RECTANGLE = (4, 64)


@dataclass(frozen=True)
class Option:
    """What a layer may become.

    Attributes:
        block_size: `(bo, bi)`; None stays dense.
        rank: Number of Kronecker terms; None stays dense.
        params: Entries as deployed: of A, B and the bias, since S is folded into A; of a dense weight and its bias.
        flops: Forward, per token; one multiply-add is 2.
    """

    block_size: tuple[int, int] | None
    rank: int | None
    params: int
    flops: int

    @property
    def is_dense(self) -> bool:
        """Whether the layer stays as it is."""
        return self.block_size is None


def dense_option(out_features: int, in_features: int, has_bias: bool) -> Option:
    """The layer as it is."""
    entries = out_features * in_features
    return Option(None, None, entries + out_features * has_bias, 2 * entries)


def kron_option(out_features: int, in_features: int, has_bias: bool, block_size: tuple[int, int], rank: int) -> Option:
    """A Kronecker layer in its place; the block must divide the layer."""
    block_out, block_in = block_size
    blocks = (out_features // block_out) * (in_features // block_in)
    params = rank * (blocks + block_out * block_in) + out_features * has_bias
    return Option(block_size, rank, params, kron_flops(out_features, in_features, block_size, rank))


def layer_menu(
    out_features: int,
    in_features: int,
    has_bias: bool,
    *,
    shapes: Sequence[BlockSize] | None = None,
    ranks: Sequence[int] | None = None,
) -> list[Option]:
    """The options of a layer, in the order of their parameters; the last one is dense.

    Every other one has fewer parameters than dense, and of equal blocks `rank` up to `min(O * I, bo * bi)`, from which
    on a sum of Kronecker terms is any matrix. It may have more FLOPs.

    Args:
        out_features: Outputs of the layer.
        in_features: Inputs of the layer.
        has_bias: Whether it has a bias, which counts as parameters.
        shapes: Block sizes as in `KronConfig.block_size`; those that do not divide the layer are left out. None: low
            rank `(1, -1)` and 4 x 64, each side in its place the divisor of the layer that comes nearest to it.
        ranks: Ranks of every shape. None: all of them for low rank, whose fits a closed form gives at once, and for
            other shapes up to ten from 1 to 32.

    Example:
        >>> [(option.block_size, option.rank) for option in layer_menu(8, 128, False, ranks=[1, 4])]
        [((4, 64), 1), ((1, 128), 1), ((4, 64), 4), ((1, 128), 4), (None, None)]
    """
    dense = dense_option(out_features, in_features, has_bias)
    options: set[Option] = set()
    for block_size in _blocks(out_features, in_features, shapes):
        largest = _largest_rank(out_features, in_features, block_size)
        offered = ranks or (range(1, largest + 1) if is_low_rank(block_size, out_features, in_features) else RANKS)
        options |= {
            kron_option(out_features, in_features, has_bias, block_size, rank) for rank in offered if rank <= largest
        }
    cheaper = [option for option in options if option.params < dense.params]
    return [*sorted(cheaper, key=lambda option: (option.params, option.flops, option.block_size)), dense]


def is_low_rank(block_size: tuple[int, int], out_features: int, in_features: int) -> bool:
    """Whether such a layer is a product of two thin matrices: blocks that are whole rows or whole columns."""
    return block_size in ((1, in_features), (out_features, 1))


def _blocks(out_features: int, in_features: int, shapes: Sequence[BlockSize] | None) -> Iterable[tuple[int, int]]:
    if shapes is None:
        nearest = (_nearest_divisor(out_features, RECTANGLE[0]), _nearest_divisor(in_features, RECTANGLE[1]))
        return dict.fromkeys([(1, in_features), nearest])
    return dict.fromkeys(
        resolve_block_size(shape, out_features, in_features)
        for shape in shapes
        if _divides(shape, out_features, in_features)
    )


def _divides(shape: BlockSize, out_features: int, in_features: int) -> bool:
    block_out, block_in = (shape, shape) if isinstance(shape, int) else shape
    return (block_out == -1 or out_features % block_out == 0) and (block_in == -1 or in_features % block_in == 0)


def _nearest_divisor(size: int, wanted: int) -> int:
    """The divisor with the smallest ratio to the wanted one; of two the smaller."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    return min(divisors, key=lambda number: (max(number / wanted, wanted / number), number))


def _largest_rank(out_features: int, in_features: int, block_size: tuple[int, int]) -> int:
    entries = block_size[0] * block_size[1]
    return min(entries, out_features * in_features // entries)
