"""What the budget of a config may choose from, and what it chooses."""

import math
from collections.abc import Sequence

from torch import nn

from kron_hf.calibration.allocation import LayerChoices, allocate
from kron_hf.calibration.menu import Option, is_low_rank, layer_menu
from kron_hf.calibration_config import CalibrationConfig
from kron_hf.config import KronConfig

__all__ = ["allocated", "calibration_options", "menu_of"]

FAR = 3.0  # times the budget's share of a layer


def calibration_options(config: KronConfig) -> CalibrationConfig:
    """The options of `config.calibration_config`, or the defaults."""
    options = config.calibration_config
    return options if isinstance(options, CalibrationConfig) else CalibrationConfig(**(options or {}))


def menu_of(linear: nn.Linear, config: KronConfig) -> list[Option]:
    """What is worth a fit: blocks that are fitted one by one are not, far above the budget."""
    sizes = (linear.out_features, linear.in_features)
    menu = layer_menu(*sizes, linear.bias is not None, shapes=calibration_options(config).menu_shapes)
    # The cheapest is: if no option meets the budget, the error tells what they could.
    params = FAR * (config.target_params or math.inf) * menu[-1].params
    params = max(params, min(option.params for option in menu))
    flops = FAR * (config.target_flops or math.inf) * menu[-1].flops
    flops = max(flops, min(option.flops for option in menu))
    return [
        option
        for option in menu
        if option.block_size is None
        or is_low_rank(option.block_size, *sizes)
        or (option.params <= params and option.flops <= flops)
    ]


def allocated(layers: Sequence[LayerChoices], config: KronConfig) -> dict[str, Option]:
    """The option of each layer, by its name.

    Raises:
        ValueError: No choice meets the budget.
    """
    return allocate(
        layers,
        target_params=config.target_params,
        target_flops=config.target_flops,
        max_error=config.max_error,
        flops_weight=calibration_options(config).flops_weight,
    )
