"""`Calibration`: fitted layers, and how they get into a model."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from kron_hf.calibration.result import CalibrationResult
from kron_hf.checkpoint import attach_kron_config
from kron_hf.config import KronConfig
from kron_hf.kron_layer import KronLayer
from kron_hf.layers import KronLinear
from kron_hf.surgery import replace_modules
from kron_hf.targets import pretrained_parts

__all__ = ["Calibration", "budget_settings", "install_layers"]

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Fitted layers, not yet in the model.

    Attributes:
        layers: The Kronecker layer of each module by its name.
        result: What was chosen and measured: a table, a picture, JSON.
        config: The `KronConfig` of the choice: given to `get_kron_model` with calibration data it fits layers of these
            sizes to a model in the same way. `dataclasses.replace` it with `init_weights="random"` and
            `calibration_config=None` for a model that is to be trained from scratch.
    """

    layers: Mapping[str, KronLinear]
    result: CalibrationResult
    config: KronConfig

    def convert(self, model: ModelT) -> ModelT:
        """Puts copies of the layers into the model that they were fitted to, or a copy of it, in place; returns it."""
        return install_layers(model, {name: copy.deepcopy(layer) for name, layer in self.layers.items()})


def install_layers(model: ModelT, layers: Mapping[str, nn.Module]) -> ModelT:
    """Puts layers in the place of modules, and says so in the configs that `from_pretrained` reads."""
    replace_modules(model, layers)
    for part in pretrained_parts(model).values():
        if any(isinstance(module, KronLayer) for module in part.modules()):
            attach_kron_config(part)
    return model


def budget_settings(config: KronConfig) -> dict[str, Any]:
    """What a config asks for: its budget, or else its block size and rank."""
    if config.budget is None:
        return {"block_size": config.block_size, "rank": config.rank}
    return {config.budget: getattr(config, config.budget)}
