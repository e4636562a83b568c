"""How well each option of a layer can be fitted, judged on examples that it was not fitted to; what that matters."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kron_hf.calibration.allocation import LayerChoices
from kron_hf.calibration.dense_walk import Inputs
from kron_hf.calibration.fit import fit_factors, output_error, starting_factors
from kron_hf.calibration.low_rank import low_rank_path
from kron_hf.calibration.menu import Option, is_low_rank
from kron_hf.calibration.moments import Covariances
from kron_hf.calibration.sequential import fitted_to

__all__ = ["layer_choices"]

SWEEPS = 2  # of the fits that are only compared
TINY = 1e-12  # has a logarithm


def layer_choices(
    inputs: Inputs,
    menu: Sequence[Option],
    gradients: Tensor,
    *,
    output_weights: Tensor | None = None,
    ridge: float = 1e-4,
) -> LayerChoices:
    """Fits every option of a menu.

    Args:
        inputs: Of the layer in the dense model.
        menu: Its options.
        gradients: Mean squared gradients of the model's features by the layer's outputs, `OutputGradients.outputs`:
            the sensitivity is their product with the variances of the outputs.
        output_weights: How much each output feature counts.
        ridge: Of the fits.
    """
    fitting, held_out = (fitted_to(inputs.linear, part) for part in (inputs.fitting, inputs.held_out))
    weights = None if output_weights is None else output_weights.to(fitting.c)
    errors = _Fits(inputs.linear, fitting, held_out, weights, ridge).errors(menu)
    sensitivity = float(gradients.to(held_out.v).double() @ held_out.v.double())
    return LayerChoices(inputs.name, list(menu), errors, sensitivity)


class _Fits:
    """The fits of one layer; low rank at all ranks is one of them."""

    def __init__(
        self, linear: nn.Linear, fitting: Covariances, held_out: Covariances, weights: Tensor | None, ridge: float
    ) -> None:
        self.linear, self.fitting, self.held_out, self.weights, self.ridge = linear, fitting, held_out, weights, ridge

    def errors(self, menu: Sequence[Option]) -> list[float]:
        """Relative squared error of each option on the held-out examples; 0 for dense."""
        ranks: dict[tuple[int, int], list[int]] = {}
        for option in menu:
            if option.block_size is not None and option.rank is not None:
                ranks.setdefault(option.block_size, []).append(option.rank)
        found: dict[tuple[tuple[int, int] | None, int | None], float] = {(None, None): 0.0}
        for block_size, offered in ranks.items():
            of_ranks = self._low_rank_errors() if self._is_low_rank(block_size) else self._errors(block_size, offered)
            found |= {(block_size, rank): of_ranks[rank] for rank in offered}
        return [found[option.block_size, option.rank] for option in menu]

    def _is_low_rank(self, block_size: tuple[int, int]) -> bool:
        return is_low_rank(block_size, self.linear.out_features, self.linear.in_features)

    def _low_rank_errors(self) -> dict[int, float]:
        path = low_rank_path(self.fitting, output_weights=self.weights, ridge=self.ridge)
        return dict(enumerate(path.errors(self.held_out).tolist(), start=1))

    def _errors(self, block_size: tuple[int, int], ranks: Sequence[int]) -> dict[int, float]:
        """Errors at all these ranks; between powers of two they are interpolated, logarithm over logarithm."""
        fitted = sorted({rank for rank in ranks if rank & (rank - 1) == 0} | {min(ranks), max(ranks)})
        options: dict[str, Any] = {"output_weights": self._product_weights(block_size[0]), "ridge": self.ridge}
        start = starting_factors(self.fitting, block_size, fitted[-1], **options)
        fits = (
            fit_factors(
                self.fitting, block_size, rank, start=(start[0][:rank], start[1][:rank]), sweeps=SWEEPS, **options
            )
            for rank in fitted
        )
        known = [output_error(self.held_out, factors, output_weights=self.weights) for factors in fits]
        result = dict(zip(fitted, known, strict=True))
        for rank in set(ranks) - set(fitted):
            above = next(index for index, other in enumerate(fitted) if other > rank)
            (low, high), (first, last) = fitted[above - 1 : above + 1], known[above - 1 : above + 1]
            share = math.log(rank / low) / math.log(high / low)
            result[rank] = max(first, TINY) ** (1 - share) * max(last, TINY) ** share
        return result

    def _product_weights(self, block_out: int) -> Tensor | None:
        """The product `e_j f_k` nearest to the output weights: with it one system serves all rows of blocks."""
        if self.weights is None:
            return None
        by_row = self.weights.view(-1, block_out)
        return torch.outer(by_row.sum(1), by_row.sum(0)).flatten() / by_row.sum()
