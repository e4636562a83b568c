"""The Kronecker layer that stands for a linear on the inputs that were measured."""

import torch
from torch import Tensor, nn

from kron_hf.calibration.fit import fit_factors, fitted_bias, output_error
from kron_hf.calibration.moments import Covariances
from kron_hf.calibration.sequential import Problem
from kron_hf.factors import kron_weight
from kron_hf.layers import KronLinear

__all__ = ["fitted_factors", "fitted_layer", "layer_with"]


def fitted_factors(
    problem: Problem, block_size: tuple[int, int], rank: int, *, ridge: float = 1e-4, sweeps: int = 8
) -> tuple[Tensor, Tensor]:
    """A and B of a layer with these sizes, fitted to a problem (see `fit_factors`)."""
    moments = problem.moments
    weights = problem.weights_like(moments.c)
    return fit_factors(moments, block_size, rank, output_weights=weights, ridge=ridge, sweeps=sweeps)


def fitted_layer(problem: Problem, s: Tensor, a: Tensor, b: Tensor) -> tuple[KronLinear, float]:
    """The layer of fitted factors, and its relative squared error on the covariances that they were fitted to.

    Raises:
        ValueError: The factors do not fit into the dtype of the linear.
    """
    layer = layer_with(problem.linear, s, a, b, problem.moments)
    if not all(bool(parameter.isfinite().all()) for parameter in layer.parameters()):
        raise ValueError(f"{problem.name}: the fitted factors are too large for {problem.linear.weight.dtype}")
    weight = layer.dense_weight().detach().to(a)  # as stored: what a narrow dtype loses is part of the error
    return layer, output_error(problem.moments, weight, output_weights=problem.weights_like(a))


@torch.no_grad()
def layer_with(linear: nn.Linear, s: Tensor, a: Tensor, b: Tensor, covariances: Covariances) -> KronLinear:
    """A layer like a linear with these factors and the bias that goes with them; zeros of S are frozen."""
    layer = KronLinear.like(linear, (b.shape[1], b.shape[2]), len(a))
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
