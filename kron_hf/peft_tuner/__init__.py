"""Kronecker layers as a PEFT method: `peft.get_peft_model(model, KronConfig(...))`."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from kron_hf.config import KronConfig
from kron_hf.peft_tuner.layer import KronTunerLayer
from kron_hf.peft_tuner.model import KronModel
from kron_hf.peft_type import kron_peft_type

__all__ = ["KronModel", "KronTunerLayer", "register"]


def register() -> None:
    """Makes `KronConfig` a method of PEFT; a second call changes nothing.

    Raises:
        ImportError: The installed peft takes no new method, or has another one of this name.
    """
    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(kron_peft_type())
    if found is None:
        register_peft_method(name="kron", config_cls=KronConfig, model_cls=KronModel)
    elif found is not KronConfig:
        raise ImportError(f"PEFT already has a method 'kron', of {found.__module__}, which kron_hf cannot replace")


register()
