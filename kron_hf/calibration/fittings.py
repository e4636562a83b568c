"""What `calibrate_in_order` does with each problem: fit a layer, or fit one, prune its blocks and refit the others."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kron_hf.calibration.block_pruning import block_saliency, prune_gradually, prune_layers
from kron_hf.calibration.fitted_layer import fitted_factors, fitted_layer
from kron_hf.calibration.menu import Option
from kron_hf.calibration.sequential import Problem
from kron_hf.layers import KronLinear

__all__ = ["Fitted", "PlainFitting", "PrunedFitting", "SurveyingFitting", "dead_blocks"]


@dataclass
class Fitted:
    """The layers made so far.

    Attributes:
        layers: By the names of the linears.
        errors: Relative error of each, `||y - yhat|| / ||y - mean(y)||`, on the data that it was fitted to.
        saliencies: `[O, I]` of each, for `dead_blocks`.
    """

    layers: dict[str, KronLinear] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    saliencies: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class PlainFitting:
    """Fits layers of given sizes.

    Attributes:
        sizes: What each linear becomes.
        ridge: Of the fit.
        sweeps: Of the fit.
        fitted: What came of it.
    """

    sizes: Mapping[str, Option]
    ridge: float
    sweeps: int
    fitted: Fitted = field(default_factory=Fitted)

    def __call__(self, problem: Problem) -> nn.Module | None:
        """The layer of a problem; None where the linear stays."""
        option = self.sizes[problem.name]
        if option.block_size is None or option.rank is None:
            return None
        factors = self._factors(problem, option.block_size, option.rank)
        layer, error = fitted_layer(problem, *factors)
        self.fitted.layers[problem.name], self.fitted.errors[problem.name] = layer, error**0.5
        return layer

    def _factors(self, problem: Problem, block_size: tuple[int, int], rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """S, A and B."""
        a, b = fitted_factors(problem, block_size, rank, ridge=self.ridge, sweeps=self.sweeps)
        return torch.ones_like(a[0]), a, b


@dataclass
class SurveyingFitting(PlainFitting):
    """Also notes how salient each block is."""

    def _factors(self, problem: Problem, block_size: tuple[int, int], rank: int) -> tuple[Tensor, Tensor, Tensor]:
        s, a, b = super()._factors(problem, block_size, rank)
        self.fitted.saliencies[problem.name] = block_saliency(problem.moments, None, a, b, problem.weights_like(a))
        return s, a, b


@dataclass(kw_only=True)
class PrunedFitting(PlainFitting):
    """Prunes a number of blocks of each layer, in rounds with refits between them.

    Attributes:
        dead: How many.
    """

    dead: Mapping[str, int]

    def _factors(self, problem: Problem, block_size: tuple[int, int], rank: int) -> tuple[Tensor, Tensor, Tensor]:
        s, a, b = super()._factors(problem, block_size, rank)
        if not self.dead[problem.name]:
            return s, a, b
        mask, a, b = prune_gradually(
            problem.moments,
            a,
            b,
            self.dead[problem.name],
            output_weights=problem.weights_like(a),
            ridge=self.ridge,
            sweeps=self.sweeps,
        )
        return mask.to(a), a, b


def dead_blocks(fitted: Fitted, target_sparsity: float) -> dict[str, int]:
    """How many blocks each layer loses, so that this share of all entries lies in lost ones; the least salient go."""
    names = list(fitted.layers)
    entries = [fitted.layers[name].b[0].numel() for name in names]
    masks = prune_layers([fitted.saliencies[name] for name in names], entries, target_sparsity)
    return {name: int((~mask).sum()) for name, mask in zip(names, masks, strict=True)}
