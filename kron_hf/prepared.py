"""`preprocess_kron`: layers fitted to data that wait in the model for `get_peft_model`, as in PEFT's CorDA."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from kron_hf.config import KronConfig
from kron_hf.conversion import Calibration, budget_settings, calibrate
from kron_hf.layers import KronLinear
from kron_hf.targets import Target

__all__ = ["preprocess_kron", "take_prepared"]

# A plain attribute of the linear that will be replaced; in a tuple, so that it is no part of the model.
ATTRIBUTE = "kron_prepared"


def preprocess_kron(model: nn.Module, config: KronConfig, calibration_data: Any) -> Calibration:
    """Fits the layers of a Kronecker adapter to data, for a call of `get_peft_model(model, config)` that follows.

    The model computes what it did until then; the layers are kept beside the modules that they will replace.

    Args:
        model: The trained model.
        config: What `get_peft_model` will be given, with `init_weights="calibrated"` (or None), block size and rank or
            a budget.
        calibration_data: As for `calibrate`.

    Returns:
        The table, the picture and the resolved config of what was chosen.

    Raises:
        ValueError: As `calibrate`.

    Example:
        >>> preprocess_kron(model, config, images)  # doctest: +SKIP
        >>> model = get_peft_model(model, config)  # doctest: +SKIP
    """
    calibration = calibrate(model, config, calibration_data)
    for module in model.modules():
        module.__dict__.pop(ATTRIBUTE, None)  # of a call before
    for layer in calibration.result.layers:
        prepared = (calibration.layers.get(layer.name), calibration.result.settings)
        setattr(model.get_submodule(layer.name), ATTRIBUTE, prepared)
    return calibration


def take_prepared(targets: Sequence[Target], config: KronConfig) -> dict[str, KronLinear] | None:
    """Takes the layers that `preprocess_kron` has left at all targets; None if it has left none.

    They take the dtype and device that the linears have now. Targets that are to stay dense are not among them.

    Raises:
        ValueError: It has left them at some targets only, or of other sizes: it was called with another config.
    """
    found = {target.name: getattr(target.module, ATTRIBUTE, None) for target in targets}
    if not any(found.values()):
        return None
    layers: dict[str, KronLinear] = {}
    for target in targets:
        layer = _checked(target, config, found[target.name])
        if layer is not None:
            layers[target.name] = layer.to(target.module.weight.device, target.module.weight.dtype)
    for target in targets:
        delattr(target.module, ATTRIBUTE)
    return layers


def _checked(target: Target, config: KronConfig, entry: tuple[KronLinear | None, Any] | None) -> KronLinear | None:
    advice = "call it with the config of get_peft_model"
    if entry is None:
        raise ValueError(f"{target.name}: preprocess_kron has prepared no layer here; {advice}")
    if config.init_weights not in (None, "calibrated"):
        raise ValueError(
            f"{target.name}: preprocess_kron has prepared a layer here, but init_weights={config.init_weights!r}; "
            f"{advice}"
        )
    layer, settings = entry
    if config.budget is not None:
        same, wanted = settings == budget_settings(config), f"{config.budget}={getattr(config, config.budget)}"
    else:
        same = layer is not None and (layer.block_size, layer.rank) == (target.block_size, target.rank)
        wanted = f"blocks of {target.block_size} at rank {target.rank}"
    if not same:
        raise ValueError(
            f"{target.name}: preprocess_kron has prepared a layer of another config ({settings}) than the one that "
            f"asks for {wanted}; {advice}"
        )
    return layer
