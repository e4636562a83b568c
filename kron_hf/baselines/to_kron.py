"""A block-sparse dense model in Kronecker form (Proposition 1 of the paper)."""

import math
import warnings

import torch
from torch import Tensor, nn

from kron_hf.baselines.targets import dense_targets
from kron_hf.checkpoint import attach_kron_config, carry_trained_mark
from kron_hf.config import BlockSize, KronConfig
from kron_hf.escaping import printable
from kron_hf.factors import to_blocks
from kron_hf.layers import KronLinear
from kron_hf.surgery import replace_modules
from kron_hf.targets import Target, pretrained_parts

__all__ = ["exact_factors", "to_kron"]


def to_kron(
    model: nn.Module,
    config: KronConfig | BlockSize,
    target_modules: list[str] | str | None = None,
    *,
    tolerance: float | None = None,
) -> nn.Module:
    """Turns a dense model with zero blocks into the same function with Kronecker layers, in place, and returns it.

    S is the 0/1 mask of the blocks that are not zero, frozen, so that further training keeps every zero. The rank is,
    for each layer, the smallest that reproduces the living blocks (at most `bo * bi`, and at most their number); those
    of ordinary training are of full rank, and then the form has more parameters than the blocks: a warning says both
    numbers. `to_dense` gives the weights back: zero blocks exactly zero, at full rank all bits, at lower rank values
    up to `tolerance` and the rounding of the factors to the weight's dtype.

    Args:
        model: A dense model; convert the outermost one, as with `get_kron_model`.
        config: A config, of which block sizes and module names count, or a block size.
        target_modules: As in `KronConfig`; only with a block size.
        tolerance: Largest `||W - What||_F / ||W||_F` of a layer that counts as exact when its rank is chosen; default
            2 eps of the weight's dtype, 2.4e-7 in float32.

    Raises:
        ValueError: As in `block_layers`, or a weight is not finite or on the meta device.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:, 2:].zero_()
        >>> to_kron(model, (4, 2))[0]
        KronLinear(in_features=8, out_features=8, block_size=(4, 2), rank=2, bias=True)
    """
    targets = dense_targets(model, config, target_modules)
    layers = {target.name: _exact_layer(target, tolerance) for target in targets}
    _warn_larger(layers)
    for target in targets:
        carry_trained_mark(target.linear, layers[target.name])
    replace_modules(model, layers)
    for part in pretrained_parts(model).values():
        if any(isinstance(module, KronLinear) for module in part.modules()):
            attach_kron_config(part)
    return model


def exact_factors(
    weight: Tensor, block_size: tuple[int, int], tolerance: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of smallest rank with `W = sum_i (S * A_i) (x) B_i`, S being 0 at zero blocks and 1 elsewhere.

    At full rank, which is the number n of living blocks or `bo * bi`, the B_i are the living blocks themselves, or the
    unit matrices: then every product is with 0 or 1 and W comes back bit by bit. Below it they are singular vectors of
    the rearranged living blocks, `[n, bo * bi]`, found in float64.

    Returns:
        S `[O, I]`, A `[rank, O, I]`, B `[rank, bo, bi]` in the dtype of the weight.
    """
    rows = to_blocks(weight.detach(), block_size)
    grid = weight.shape[0] // block_size[0], weight.shape[1] // block_size[1]
    alive = (rows != 0).any(1)
    living = rows[alive]
    u, values, vh = torch.linalg.svd(living.double(), full_matrices=False)
    rank = _smallest_rank(values, 2 * torch.finfo(weight.dtype).eps if tolerance is None else tolerance)
    if rank < min(living.shape):
        root = values[:rank].sqrt()
        a_living, b = u[:, :rank] * root, root[:, None] * vh[:rank]
    elif len(living) <= rows.shape[1]:
        a_living, b = torch.eye(len(living)), living
    else:
        a_living, b = living, torch.eye(rows.shape[1])
    rank = max(rank, 1)  # a layer of zeros
    a = rows.new_zeros(len(rows), rank)
    a[alive, : a_living.shape[1]] = a_living.to(a)
    b_full = rows.new_zeros(rank, rows.shape[1])
    b_full[: len(b)] = b.to(b_full)
    return alive.view(grid).to(weight.dtype), a.T.reshape(rank, *grid), b_full.view(rank, *block_size)


def _smallest_rank(values: Tensor, tolerance: float) -> int:
    """The number of singular values after which the rest is at most `tolerance` of the whole in the Frobenius norm."""
    squares = values.square()
    tails = squares.flip(0).cumsum(0).flip(0)  # [k]: what is lost when the first k are kept
    return int((tails > tolerance**2 * squares.sum()).sum())


def _exact_layer(target: Target, tolerance: float | None) -> KronLinear:
    weight = target.linear.weight
    if weight.is_meta or not bool(torch.isfinite(weight).all()):
        kind = "is on the meta device" if weight.is_meta else "holds NaN or infinite values"
        raise ValueError(f"{printable(target.name)}: its weight {kind}")
    s, a, b = exact_factors(weight, target.block_size, tolerance)
    layer = KronLinear.like(target.linear, target.block_size, len(b))
    with torch.no_grad():
        for factor, value in ((layer.s, s), (layer.a, a), (layer.b, b)):
            factor.copy_(value)
            factor.requires_grad_(weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(target.linear.bias.requires_grad)
    layer.freeze_mask()
    return layer


def _warn_larger(layers: dict[str, KronLinear]) -> None:
    factors = sum(factor.numel() for layer in layers.values() for factor in (layer.s, layer.a, layer.b))
    living = sum(int(layer.block_mask.sum()) * math.prod(layer.block_size) for layer in layers.values())
    if factors > living:
        warnings.warn(
            f"the exact Kronecker form has {factors:,} parameters (S, A, B), the living blocks of the dense weights "
            f"{living:,}; train Kronecker layers of low rank to have fewer",
            stacklevel=3,
        )
