"""Counts what is claimed of a model, from its tensors; for the card, and again for `kron-hf verify`."""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from kron_hf.escaping import shown
from kron_hf.factors import to_blocks
from kron_hf.kron_layer import KronLayer
from kron_hf.selection.candidates import converted_layers
from kron_hf.summary import KronSummary, kron_summary, model_flops
from kron_hf.surgery import to_dense

__all__ = ["LayerZeros", "count", "frozen_names", "image_flops", "merge_difference", "set_frozen", "zeros_of"]

TOKENS = 8  # random inputs on which a layer is compared with its dense weight
LAYER_FIELDS = (
    *("name", "block_size", "rank", "sparsity", "trained_params", "nonzeros", "deployed_params", "dense_params"),
    *("forward_flops", "dense_forward_flops"),
)


class LayerZeros(NamedTuple):
    """Blocks of one weight.

    Attributes:
        claimed: Those that the mask says are zero.
        exact: Those of them whose entries in W are all exactly zero.
    """

    claimed: int
    exact: int


def count(model: nn.Module) -> tuple[KronSummary, dict[str, Any], list[dict[str, Any]]]:
    """The summary of a model, and its figures as claims: of the whole, and of each layer."""
    summary = kron_summary(model)
    converted = summary.converted
    whole = {
        "sparsity": summary.sparsity,
        "total_params": sum(parameter.numel() for parameter in model.parameters()),
        "trained_params": summary.trained_params,
        "nonzeros": summary.nonzeros,
        "deployed_params": summary.deployed_params,
        "dense_params": summary.dense_params,
        "converted_trained_params": converted.trained_params,
        "converted_deployed_params": converted.deployed_params,
        "converted_dense_params": converted.dense_params,
        "forward_flops": converted.forward_flops,
        "dense_forward_flops": converted.dense_forward_flops,
        **image_flops(model),
    }
    layers = [{field: _plain(getattr(layer, field)) for field in LAYER_FIELDS} for layer in summary.layers]
    return summary, whole, layers


def image_flops(model: nn.Module) -> dict[str, int]:
    """FLOPs of one image through the model and through its dense twin; {} where the model takes more than images."""
    config: Any = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    is_classifier = type(model).__name__.endswith("ForImageClassification")
    if not is_classifier or not isinstance(channels, int) or not isinstance(size, int):
        return {}
    batch = {"pixel_values": torch.empty(1, channels, size, size, device="meta")}
    skeleton = copy.deepcopy(model).to("meta")
    try:
        forward = model_flops(skeleton, batch).forward
        dense = model_flops(to_dense(skeleton), batch).forward
    except (RuntimeError, ValueError):  # models that look at values on their way, or at their own shapes otherwise
        return {}
    return {"image_flops": forward, "dense_image_flops": dense}


def frozen_names(model: nn.Module) -> list[str]:
    """The parameters that were not trained."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def set_frozen(model: nn.Module, names: Iterable[str]) -> None:
    """Freezes exactly these parameters: a file does not say which were trained.

    Raises:
        ValueError: The model has no such parameter.
    """
    parameters = dict(model.named_parameters())
    names = set(names)
    if unknown := sorted(names - parameters.keys()):
        raise ValueError(f"the claims name parameters that the model lacks: {shown(unknown[0])} ({len(unknown)})")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in names)


@torch.no_grad()
def zeros_of(model: nn.Module) -> dict[str, LayerZeros]:
    """Compares mask and weight of every Kronecker layer: S may be zero, and W not, where a factor is infinite."""
    return {
        name: LayerZeros(int((~layer.block_mask).sum()), _exact_zeros(layer))
        for name, layer in converted_layers(model).items()
        if isinstance(layer, KronLayer)
    }


@torch.no_grad()
def merge_difference(model: nn.Module) -> float:
    """Largest difference between a layer and its merged dense twin, on random inputs, in float64.

    Relative to the largest output of the layer; over all layers. NaN if a factor is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros((), dtype=torch.float64)
    for layer in converted_layers(model).values():
        exact = copy.deepcopy(layer).cpu().double().eval()
        dense = exact.to_dense()
        x = torch.randn(TOKENS, *_input_shape(dense), generator=generator, dtype=torch.float64)
        merged = dense(x)
        scale = merged.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        worst = torch.maximum(worst, (exact(x) - merged).abs().max() / scale)  # keeps NaN
    return worst.item()


def _input_shape(dense: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """Of one input; for a convolution the least that is longer than the kernel and its padding."""
    if isinstance(dense, nn.Linear):
        return (dense.in_features,)
    reaches = [
        dilation * (size - 1) + stride + 1
        for size, stride, dilation in zip(dense.kernel_size, dense.stride, dense.dilation, strict=True)
    ]
    return (dense.in_channels, *reaches)


def _exact_zeros(layer: KronLayer) -> int:
    blocks = to_blocks(layer.dense_weight(), layer.block_size)
    return int((blocks[~layer.block_mask.flatten()] == 0).all(1).sum())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
