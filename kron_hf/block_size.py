"""What the size of a block may be in one layer."""

__all__ = ["resolve_block_size"]


def resolve_block_size(
    block_size: int | tuple[int, int], out_features: int, in_features: int, name: str = "KronLinear"
) -> tuple[int, int]:
    """The block size `(bo, bi)` of one layer: an int is a square block, -1 in a pair is the whole dimension.

    Raises:
        ValueError: The block does not divide the layer, or is no block size at all; names `name` and both numbers.
    """
    pair = (block_size, block_size) if isinstance(block_size, int) else block_size
    if (
        not isinstance(pair, tuple | list)
        or len(pair) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) or n < -1 or n == 0 for n in pair)
    ):
        raise ValueError(
            f"{name}: block_size must be a positive int or a pair (out, in) of positive ints (-1 in a pair = the "
            f"whole dimension), got {block_size!r}"
        )
    if block_size == -1:
        raise ValueError(f"{name}: block_size=-1 is only allowed inside a pair, as in (1, -1)")
    block_out, block_in = (out_features if pair[0] == -1 else pair[0], in_features if pair[1] == -1 else pair[1])
    if out_features % block_out or in_features % block_in:
        raise ValueError(
            f"{name}: block_size {(block_out, block_in)} does not divide its weight of shape "
            f"{(out_features, in_features)} (out, in)"
        )
    return block_out, block_in
