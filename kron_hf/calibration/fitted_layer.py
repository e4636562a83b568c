"""The Kronecker layer that stands for a linear on the inputs that were measured."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kron_hf.calibration.fit import fit_factors, fitted_bias, output_error
from kron_hf.calibration.moments import Covariances
from kron_hf.calibration.sequential import Problem
from kron_hf.factors import kron_weight
from kron_hf.layers import KronLinear

__all__ = ["about_zero", "fitted_layer", "layer_with"]


def fitted_layer(
    problem: Problem,
    block_size: tuple[int, int],
    rank: int,
    *,
    ridge: float = 1e-4,
    sweeps: int = 8,
    mask: Tensor | None = None,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[KronLinear, float]:
    """Fits a layer, and returns it with its relative squared error on the covariances it was fitted to.

    Args:
        problem: The linear, its inputs and wanted outputs.
        block_size: Resolved, `(bo, bi)`.
        rank: Number of terms.
        ridge: Of the fit, relative to the mean variance of an input.
        sweeps: Of alternating least squares.
        mask: Blocks that may be other than zero, bool `[O, I]`.
        start: Factors to begin with.

    Raises:
        ValueError: The fit does not fit into the dtype of the linear.
    """
    linear = problem.linear
    covariances = problem.covariances if linear.bias is not None else about_zero(problem.covariances)
    weights = None if problem.output_weights is None else problem.output_weights.to(covariances.c)
    a, b = fit_factors(
        covariances, block_size, rank, output_weights=weights, ridge=ridge, sweeps=sweeps, mask=mask, start=start
    )
    layer = layer_with(linear, block_size, torch.ones_like(a[0]) if mask is None else mask.to(a), a, b, covariances)
    if not all(bool(parameter.isfinite().all()) for parameter in layer.parameters()):
        raise ValueError(f"{problem.name}: the fitted factors are too large for {linear.weight.dtype}")
    weight = layer.dense_weight().detach().to(a)  # as stored: what a narrow dtype loses is part of the error
    return layer, output_error(covariances, weight, output_weights=weights)


@torch.no_grad()
def layer_with(
    linear: nn.Linear, block_size: tuple[int, int], s: Tensor, a: Tensor, b: Tensor, covariances: Covariances
) -> KronLinear:
    """A layer like a linear with these factors and the bias that goes with them; zeros of S are frozen."""
    layer = KronLinear.like(linear, block_size, len(a))
    layer.s.copy_(s)
    layer.a.copy_(a)
    layer.b.copy_(b)
    layer.freeze_mask()
    if layer.bias is not None:
        layer.bias.copy_(fitted_bias(covariances, kron_weight(s, layer.a.to(a), layer.b.to(a))))
    for name, parameter in layer.named_parameters():
        replaced = linear.bias if name == "bias" else linear.weight
        parameter.requires_grad_(replaced.requires_grad)
    return layer


def about_zero(covariances: Covariances) -> Covariances:
    """Second moments about zero: without a bias the mean is the weight's to fit, too."""
    mean_x, mean_y = covariances.mean_x, covariances.mean_y
    return replace(
        covariances,
        c=covariances.c + torch.outer(mean_x, mean_x),
        g=covariances.g + torch.outer(mean_y, mean_x),
        v=covariances.v + mean_y.square(),
        mean_x=torch.zeros_like(mean_x),
        mean_y=torch.zeros_like(mean_y),
    )
