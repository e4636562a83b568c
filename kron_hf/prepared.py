"""`preprocess_kron`: layers fitted to data that wait in the model for `get_peft_model`, as in PEFT's CorDA."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from kron_hf.config import KronConfig
from kron_hf.conversion import Calibration, calibrate
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
    for layer in calibration.result.layers:
        setattr(model.get_submodule(layer.name), ATTRIBUTE, (calibration.layers.get(layer.name),))
    return calibration


def take_prepared(targets: Sequence[Target]) -> dict[str, KronLinear] | None:
    """Takes the layers that `preprocess_kron` has left at all targets; None if it has left none.

    Targets that are to stay dense are not among them.

    Raises:
        ValueError: It has left them at some targets only, or of other sizes: it was called with another config.
    """
    found = {target.name: getattr(target.linear, ATTRIBUTE, None) for target in targets}
    if not any(found.values()):
        return None
    if missing := [name for name, entry in found.items() if entry is None]:
        raise ValueError(
            f"{missing[0]}: preprocess_kron has prepared no layer here; call it with the config of get_peft_model"
        )
    for target in targets:
        delattr(target.linear, ATTRIBUTE)
    return {name: entry[0] for name, entry in found.items() if entry is not None and entry[0] is not None}
