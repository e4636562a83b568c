"""How well each option of a layer can be fitted, judged on examples that it was not fitted to."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kron_hf.calibration.allocation import LayerChoices
from kron_hf.calibration.dense_walk import Inputs
from kron_hf.calibration.fit import fit_factors, output_error
from kron_hf.calibration.fitted_layer import layer_with
from kron_hf.calibration.low_rank import low_rank_path
from kron_hf.calibration.menu import Option, is_low_rank
from kron_hf.calibration.moments import Covariances

__all__ = ["layer_choices"]

SWEEPS = 2  # of the fits that are only compared


def layer_choices(
    inputs: Inputs,
    menu: Sequence[Option],
    *,
    output_weights: Tensor | None = None,
    ridge: float = 1e-4,
    near: float = 0.1,
) -> LayerChoices:
    """Fits every option of a menu, and finds out how much an error of this layer matters.

    Args:
        inputs: Of the layer in the dense model.
        menu: Its options.
        output_weights: How much each output feature counts.
        ridge: Of the fits.
        near: The sensitivity is measured with the fit of the option whose share of the dense parameters comes nearest.
    """
    fitting, held_out = inputs.fitting, inputs.held_out
    if inputs.linear.bias is None:
        fitting, held_out = fitting.about_zero(), held_out.about_zero()
    weights = None if output_weights is None else output_weights.to(fitting.c)
    fits = _Fits(inputs.linear, fitting, held_out, weights, ridge)
    errors = [0.0 if option.is_dense else fits.error(option) for option in menu]
    shares = {option: option.params / menu[-1].params for option in menu if not option.is_dense}
    if not shares:
        return LayerChoices(inputs.name, list(menu), errors, 0.0)
    example = min(shares, key=lambda option: abs(math.log(shares[option] / near)))
    error = errors[list(menu).index(example)]
    damage = inputs.feature_error(fits.layer(example))
    return LayerChoices(inputs.name, list(menu), errors, damage / error if error > 0 else 0.0)


class _Fits:
    """The fits of one layer; low rank at all ranks is one of them."""

    def __init__(
        self, linear: nn.Linear, fitting: Covariances, held_out: Covariances, weights: Tensor | None, ridge: float
    ) -> None:
        self.linear, self.fitting, self.held_out, self.weights, self.ridge = linear, fitting, held_out, weights, ridge
        self._low_rank_errors: list[float] | None = None

    def error(self, option: Option) -> float:
        """Relative squared error on the held-out examples."""
        assert option.block_size is not None
        assert option.rank is not None
        if not is_low_rank(option.block_size, self.linear.out_features, self.linear.in_features):
            return output_error(self.held_out, self._factors(option), output_weights=self.weights)
        if self._low_rank_errors is None:
            path = low_rank_path(self.fitting, output_weights=self.weights, ridge=self.ridge)
            self._low_rank_errors = path.errors(self.held_out).tolist()
        return self._low_rank_errors[option.rank - 1]

    def layer(self, option: Option) -> nn.Module:
        """The layer of an option."""
        a, b = self._factors(option)
        return layer_with(self.linear, torch.ones_like(a[0]), a, b, self.fitting)

    def _factors(self, option: Option) -> tuple[Tensor, Tensor]:
        assert option.block_size is not None
        assert option.rank is not None
        return fit_factors(
            self.fitting,
            option.block_size,
            option.rank,
            output_weights=self.weights,
            ridge=self.ridge,
            sweeps=SWEEPS,
        )
