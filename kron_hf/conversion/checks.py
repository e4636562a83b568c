"""What `calibrate` refuses before it reads any data."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kron_hf.calibration.allocation import LayerChoices
from kron_hf.calibration.menu import Option
from kron_hf.config import KronConfig
from kron_hf.conversion.budget import allocated, calibration_options, menu_of
from kron_hf.targets import Target, find_targets

__all__ = ["check_conversion"]


def check_conversion(model: nn.Module, config: KronConfig) -> list[Target]:
    """The modules that `calibrate` would replace; finds out without data whether it could.

    Raises:
        ValueError: The budget cannot be met, or what `get_kron_model` refuses.
    """
    _check_model(model)
    _check_config(config)
    targets = find_targets(model, config, compare_cost=config.budget is None)
    _check_targets(targets)
    if config.budget is not None:
        menus = {target.name: menu_of(target.linear, config) for target in targets}
        _check_menus(targets, menus, config)
        allocated([LayerChoices(name, menu, [0.0] * len(menu)) for name, menu in menus.items()], config)
    return targets


def _check_model(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        name = type(model).__name__
        raise ValueError(f"calibration needs the model itself, not its {name} wrapper: pass model.module")


def _check_config(config: KronConfig) -> None:
    if config.init_weights not in (None, "calibrated"):
        raise ValueError(
            f"init_weights={config.init_weights!r} does not go with calibration_data, which fits the layers"
        )
    if config.candidates:
        raise ValueError(
            "candidates are chosen in a training, by BlockSizeCallback; calibration fits one size, or a budget"
        )
    if config.budget and calibration_options(config).target_sparsity is not None:
        raise ValueError(
            f"target_sparsity goes with one block_size and a rank above what is needed, not with {config.budget}: "
            "what it prunes would not be counted"
        )


def _check_menus(targets: Sequence[Target], menus: Mapping[str, list[Option]], config: KronConfig) -> None:
    """Raises if no layer could become anything but dense."""
    if all(option.is_dense for menu in menus.values() for option in menu):
        sizes = sorted({(target.linear.out_features, target.linear.in_features) for target in targets})
        raise ValueError(
            f"no shape of menu_shapes={calibration_options(config).menu_shapes} divides a layer and has fewer "
            f"parameters than it; the layers are {', '.join(map(str, sizes[:5]))} (out, in)"
        )


def _check_targets(targets: Sequence[Target]) -> None:
    for target in targets:
        if target.linear.weight.is_meta:
            raise ValueError(
                f"{target.name}: its weight is on the meta device, as that of a model which is offloaded; load the "
                "model on one device to calibrate it"
            )
        if target.candidates:
            raise ValueError(f"{target.name}: candidates are chosen in a training, calibration fits one size")
