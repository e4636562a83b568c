"""`block_summary`: the meter of `kron_summary` for dense layers whose weights hold zero blocks."""

from collections.abc import Mapping

from torch import Tensor, nn

from kron_hf.escaping import shown
from kron_hf.factors import to_blocks
from kron_hf.layers import resolve_block_size
from kron_hf.sharding import gather
from kron_hf.summary.table import KronSummary, LayerSummary, summarize_model, trained_entries

__all__ = ["block_summary"]


def block_summary(model: nn.Module, layers: Mapping[str, tuple[nn.Linear, int | tuple[int, int]]]) -> KronSummary:
    """Counts parameters, nonzeros, block sparsity and FLOPs of dense layers, by the rules of `kron_summary`.

    A block is zero if every entry of it is exactly zero, of either sign. Nonzeros are the entries of the other blocks,
    zeros among them included, the bias, and every entry of the model's other parameters. FLOPs are those of
    `nn.Linear`, which multiplies by zeros, too; `ideal_forward_flops` is `2 * bo * bi` a living block.

    Args:
        model: The dense model, on any device. On the meta device sparsity and nonzeros are None. If it is sharded
            (FSDP2), all processes must call this.
        layers: Modules of the model by their names, each with the size `(out, in)` of its blocks, an int for square
            ones; such as `kron_hf.baselines` takes.

    Raises:
        TypeError: A layer is no `nn.Linear`, such as a `KronLinear`: `kron_summary` counts that.
        ValueError: A layer does not belong to the model, is named twice, or its block does not divide it.

    Example:
        >>> import torch
        >>> linear = nn.Linear(8, 4, bias=False)
        >>> _ = linear.weight.data[:2, :4].zero_()
        >>> summary = block_summary(linear, {"fc": (linear, (2, 4))})
        >>> summary.sparsity, summary.nonzeros
        (0.25, 24)
    """
    _check(model, layers)
    sizes = {
        name: resolve_block_size(size, linear.out_features, linear.in_features, name)
        for name, (linear, size) in layers.items()
    }
    masks = {
        name: None if linear.weight.is_meta else _living_blocks(linear, sizes[name])
        for name, (linear, _) in layers.items()
    }
    counted = [_summarize(name, linear, sizes[name], masks[name]) for name, (linear, _) in layers.items()]
    inside = [linear for linear, _ in layers.values()]
    return summarize_model(model, counted, inside, of="block-sparse layers", masks=masks)


def _check(model: nn.Module, layers: Mapping[str, tuple[nn.Linear, int | tuple[int, int]]]) -> None:
    modules = set(model.modules())
    names: dict[nn.Module, str] = {}
    for name, (linear, _) in layers.items():
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"block_summary: {shown(name)} must be an nn.Linear, got a {type(linear).__name__}")
        if linear not in modules:
            raise ValueError(f"block_summary: {shown(name)} is given a layer that does not belong to the model")
        if linear in names:
            raise ValueError(f"block_summary: {shown(name)} is the layer that is named {shown(names[linear])}, too")
        names[linear] = name


def _summarize(name: str, linear: nn.Linear, size: tuple[int, int], alive: Tensor | None) -> LayerSummary:
    block_out, block_in = size
    entries = linear.out_features * linear.in_features
    bias = 0 if linear.bias is None else linear.bias.numel()
    living = None if alive is None else int(alive.sum()) * block_out * block_in
    return LayerSummary(
        name=name,
        block_size=(block_out, block_in),
        rank=None,
        sparsity=None if alive is None else int((~alive).sum()) / alive.numel(),
        trained_params=trained_entries(linear.parameters()),
        nonzeros=None if living is None else living + bias,
        deployed_params=entries + bias,
        dense_params=entries + bias,
        forward_flops=2 * entries,
        training_flops=6 * entries,
        ideal_forward_flops=None if living is None else 2 * living,
        dense_forward_flops=2 * entries,
        dense_training_flops=6 * entries,
    )


def _living_blocks(linear: nn.Linear, block_size: tuple[int, int]) -> Tensor:
    """Which blocks hold anything but zeros, bool `[O, I]`. Gathers one layer at a time: dense weights are large."""
    grid = (linear.out_features // block_size[0], linear.in_features // block_size[1])
    return (to_blocks(gather([linear.weight])[0], block_size) != 0).any(1).view(grid)
