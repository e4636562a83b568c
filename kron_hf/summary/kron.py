"""`kron_summary`: what a model with Kronecker layers costs, counted from its tensors."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from kron_hf.kron_layer import KronLayer
from kron_hf.selection.candidates import KronCandidates, converted_layers
from kron_hf.sparsity.pruning import block_masks
from kron_hf.summary.table import KronSummary, LayerSummary, sum_up, summarize_model, trained_entries

__all__ = ["kron_summary"]


def kron_summary(model: nn.Module) -> KronSummary:
    r"""Counts parameters, nonzeros, sparsity and FLOPs of the Kronecker layers of a model against dense ones.

    A module that the model uses in several places is counted once. A layer whose block size is being selected is one
    layer: the sum of the candidates that are left, against one dense layer; a block is zero where all of them are.

    Nonzeros are the entries that zero blocks leave alive: of every living block its entry of S and its `rank` entries
    of A; B as long as any block lives; the bias; and every entry of the model's other parameters. What happens to be
    zero elsewhere counts, since nothing keeps it so, and so does what is frozen.

    A multiply-add is 2 FLOPs. Per token, the factored algorithm (paper, propositions 2 and 3) takes the cheaper of two
    orders:

        B first: Z_i = X B_i^T, Y = sum_i (S * A_i) Z_i     2 * rank * (in * bo + out * I)
        A first: T_i = (S * A_i) X, Y = sum_i T_i B_i^T     2 * rank * (in * O + out * bi)

    against `2 * in * out`. Training is the forward plus, for each of its products, the gradients of both operands: of
    the input and of the factors. That is three times the forward, as for a dense layer, with the intermediate kept for
    the backward; the operator may recompute it to save memory. Of a convolution everything is per position of its
    output, "B" costs `kh * kw` times as much, and "A" where it is first as many times as the strides have positions of
    the input; layers have different numbers of positions, so `model_flops` compares whole models. Not counted: the
    bias, S * A, which is once a step, and what zero blocks could save, since no kernel skips them:
    `ideal_forward_flops` says what that would be. A layer called several times in a forward counts once;
    `model_flops` counts a whole model as it runs.

    Args:
        model: Any module: a single `KronLinear`, a transformers model, on any device. On the meta device sparsity and
            nonzeros are None. If it is sharded (FSDP2), all processes must call this.

    Example:
        >>> from kron_hf import KronLinear
        >>> kron_summary(KronLinear(256, 8, block_size=(4, 16), rank=1, bias=False)).trained_params
        128
    """
    layers = converted_layers(model)
    parts = [part for layer in layers.values() for part in _parts(layer)]
    masks = [None] * len(parts) if any(part.s.is_meta for part in parts) else block_masks(parts)
    alive = dict(zip(parts, masks, strict=True))
    layers = {name or type(model).__name__: layer for name, layer in layers.items()}
    counted = [_summarize(name, layer, alive) for name, layer in layers.items()]
    single = {name: alive[layer] for name, layer in layers.items() if isinstance(layer, KronLayer)}
    return summarize_model(model, counted, layers.values(), of="converted layers", masks=single)


def _parts(layer: KronLayer | KronCandidates) -> list[KronLayer]:
    return [layer] if isinstance(layer, KronLayer) else [layer.layer(key) for key in layer.alive]


def _summarize(name: str, layer: KronLayer | KronCandidates, masks: Mapping[KronLayer, Tensor | None]) -> LayerSummary:
    counted = tuple(_summarize_kron(name, part, masks[part]) for part in _parts(layer))
    if isinstance(layer, KronLayer):
        return counted[0]
    total, one = sum_up(counted, name), counted[0]
    bias = 0 if layer.bias is None else layer.bias.numel()
    return replace(
        total,
        sparsity=None if total.sparsity is None else _joint_sparsity(layer, masks),
        trained_params=total.trained_params + (0 if layer.bias is None else trained_entries([layer.bias])),
        nonzeros=None if total.nonzeros is None else total.nonzeros + bias,
        deployed_params=total.deployed_params + bias,
        dense_params=one.dense_params + bias,
        dense_forward_flops=one.dense_forward_flops,
        dense_training_flops=one.dense_training_flops,
    )


def _joint_sparsity(layer: KronCandidates, masks: Mapping[KronLayer, Tensor | None]) -> float:
    """Share of the entries of W that lie in a zero block of each candidate."""
    alive = torch.zeros(layer.weight_shape[:2], dtype=torch.bool)
    for part in _parts(layer):
        (block_out, block_in), mask = part.block_size, masks[part]
        if mask is not None:
            alive |= mask.cpu().repeat_interleave(block_out, 0).repeat_interleave(block_in, 1)
    return int((~alive).sum()) / alive.numel()


def _summarize_kron(name: str, layer: KronLayer, alive: Tensor | None) -> LayerSummary:
    bias = 0 if layer.bias is None else layer.bias.numel()
    forward, entries = layer.forward_flops, prod(layer.weight_shape)
    return LayerSummary(
        name=name,
        block_size=layer.block_size,
        rank=layer.rank,
        kernel_size=layer.weight_shape[2:] or None,
        sparsity=None if alive is None else int((~alive).sum()) / alive.numel(),
        trained_params=trained_entries(layer.parameters()),
        nonzeros=None if alive is None else _living_entries(layer, alive) + bias,
        deployed_params=layer.a.numel() + layer.b.numel() + bias,
        dense_params=entries + bias,
        forward_flops=forward,
        training_flops=3 * forward,
        ideal_forward_flops=None if alive is None else _ideal_flops(layer, alive),
        dense_forward_flops=2 * entries,
        dense_training_flops=6 * entries,
    )


def _living_entries(layer: KronLayer, alive: Tensor) -> int:
    """Entries of S, A and B that living blocks use."""
    living = int(alive.sum())
    return living * (1 + layer.rank) + (layer.b.numel() if living else 0)


def _ideal_flops(layer: KronLayer, alive: Tensor) -> int:
    """`kron_flops` without the products of zero blocks and of block rows and columns that hold nothing else."""
    (block_out, block_in), (_, _, kernel, inputs) = layer.block_size, layer.sizes
    living = int(alive.sum())
    b_first = int(alive.any(0).sum()) * kernel * block_in * block_out + living * block_out
    a_first = inputs * living * block_in + int(alive.any(1).sum()) * kernel * block_in * block_out
    return 2 * layer.rank * min(b_first, a_first)
