"""`KronModel`: what PEFT calls to put a Kronecker adapter into a model.

PEFT's own injection matches names by regular expressions and keeps the replaced layers. This one takes both, targets
and layers, from where `get_kron_model` takes them. Private attributes that are touched, in this file and in no other:
of peft, BaseTuner's `_cast_adapter_dtype`, `_create_and_replace`, `_enable_peft_forward_hooks`,
`_mark_only_adapters_as_trainable`, `_remap_adapter_state_dict_for_load`, `_remove_adapter_name_from_key`,
`_replace_module`; of transformers, `_hf_peft_config_loaded`.
"""

# PEFT's tuners are barely annotated.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
# pyright: reportArgumentType=false

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, NoReturn

from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, isfinite, nn

from kron_hf.config import KronConfig
from kron_hf.escaping import shown
from kron_hf.kron_layer import KronLayer
from kron_hf.model import init_method
from kron_hf.peft_tuner.layer import KronTunerLayer, refuse
from kron_hf.peft_tuner.saved_modules import check_saved_modules
from kron_hf.peft_tuner.stored import stored_layer
from kron_hf.prepared import take_prepared
from kron_hf.surgery import make_layers, replace_modules
from kron_hf.targets import Target, find_targets

__all__ = ["KronModel"]

PEFT_PREFIX = "base_model.model."


class KronModel(BaseTuner):
    """Replaces the projections of a model by Kronecker layers, as PEFT's tuner of `KronConfig`.

    The base is frozen and the dense weights are dropped, so a model holds one such adapter for good: a second adapter,
    disabling, unloading and deleting raise. `merge_and_unload` gives a dense model.

    Args:
        model: The model to adapt.
        peft_config: A `KronConfig`, or such by adapter name.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Leaves new factors on the meta device, for weights that are set afterwards.
        state_dict: Refused; PEFT would infer the modules to adapt from it.

    Raises:
        ValueError: As `get_kron_model`, or the model has an adapter already.
    """

    prefix = "kron_"
    tuner_layer_cls = KronTunerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        _check_first_adapter(model)
        try:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except Exception:
            # transformers' add_adapter sets this too early; it would block another try.
            if getattr(model, "_hf_peft_config_loaded", False):
                model._hf_peft_config_loaded = False  # type: ignore[assignment]
            raise

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Builds the layers, or raises before the model is touched, then replaces, freezes and records the names."""
        _check_first_adapter(model)
        if state_dict is not None:
            raise ValueError("a Kronecker adapter takes its modules from its KronConfig; pass no state_dict")
        config: Any = self.peft_config[adapter_name]
        targets = find_targets(model, config)
        _check_no_candidates(targets)
        saved = check_saved_modules(model, config, [target.name for target in targets])
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            layers = _layers_for(targets, model, config)
        replace_modules(model, {name: KronTunerLayer(layer, adapter_name, name) for name, layer in layers.items()})
        self.targeted_module_names = list(layers)
        # A copy: the caller's config stays free for other models.
        self.peft_config[adapter_name] = config = _resolved(config, layers, saved)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=self.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Gives back the base model with a dense layer of the same function in place of every Kronecker layer.

        Args:
            progressbar: As in PEFT.
            safe_merge: Raises if a weight would not be finite, before anything is touched.
            adapter_names: None or the adapter's own name.
        """
        if adapter_names is not None and list(adapter_names) != self.active_adapters:
            raise ValueError(f"the model's adapters are {self.active_adapters}, got adapter_names={adapter_names!r}")
        for layer in self._tuner_layers():
            layer.check_loaded()
            if safe_merge and not bool(isfinite(layer.layer.dense_weight()).all()):
                raise ValueError(f"{layer.module_name}: its weight holds NaN or infinite values")
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> NoReturn:
        """Refused: the dense weights are gone."""
        refuse("unload()", "load the base model again, or call merge_and_unload() for a dense model")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        """Refused: what is merged could not be unmerged."""
        refuse("merge_adapter()", "call merge_and_unload() for a dense model")

    def unmerge_adapter(self) -> NoReturn:
        """Refused: nothing is ever merged."""
        refuse("unmerge_adapter()", "load the base model and the adapter again")

    def disable_adapter_layers(self) -> NoReturn:
        """Refused: the dense weights are gone."""
        refuse("disabling the adapter", "load the base model again to run it without the adapter")

    def delete_adapter(self, adapter_name: str) -> NoReturn:
        """Refused: nothing would be left."""
        refuse("deleting the adapter", "load the base model again")

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: there is one adapter."""
        refuse("combining adapters", "a Kronecker model holds one adapter; load the base model again for another")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT would drop the argument and run the adapter on every row.
        if kwargs.get("adapter_names") is not None:
            refuse("a batch of several adapters (adapter_names)", "load the base model again for another adapter")
        yield

    def _tuner_layers(self) -> list[KronTunerLayer]:
        return [module for module in self.modules() if isinstance(module, KronTunerLayer)]

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("KronModel builds all layers at once, in inject_adapter")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT would put the (empty) weight of the replaced layer into the new one.
        if isinstance(child, KronTunerLayer):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leaves the dtype alone: layers that replace others must have the model's, as in PEFT's LNTuningModel."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = _adapter_tensors(model)
        aliases = {alias: key for key in expected for alias in cls._aliases(model, key, adapter_name)}
        remapped = {aliases.get(key, key): tensor for key, tensor in remapped.items()}
        for key, tensor in expected.items():
            if key not in remapped:
                raise ValueError(f"the adapter's weights lack tensor {shown(key)}")
            if remapped[key].shape != tensor.shape:
                raise ValueError(
                    f"the adapter's tensor {shown(key)} has shape {shown(list(remapped[key].shape))}, its config "
                    f"requires {list(tensor.shape)}"
                )
        extra = [key for key in remapped.keys() - expected.keys() if f".{cls.prefix}layers." in key]
        if extra:
            raise ValueError(f"the adapter's weights hold {shown(min(extra))}, which its config does not name")
        return remapped

    @classmethod
    def _aliases(cls, model: Any, key: str, adapter_name: str) -> list[str]:
        """A tensor's names in the files of a backbone and of a class with a head; see `base_model_prefix`."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not (prefix := getattr(base, "base_model_prefix", "")):
            return []
        name = cls._remove_adapter_name_from_key(key, adapter_name).removeprefix(PEFT_PREFIX)
        return [f"{PEFT_PREFIX}{prefix}.{name}", f"{PEFT_PREFIX}{name.removeprefix(f'{prefix}.')}"]


def _check_first_adapter(model: nn.Module) -> None:
    present = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if present:
        raise ValueError(
            f"the model has an adapter already ({', '.join(map(repr, present[0].active_adapters))}). A Kronecker "
            "adapter replaces the base weights, so it stands alone: load the base model again for another adapter, or "
            "call merge_and_unload() first"
        )


def _check_no_candidates(targets: list[Target]) -> None:
    if any(target.candidates for target in targets):
        raise ValueError(
            "block sizes are not selected in an adapter: select them with kron_hf.get_kron_model(model, config) and "
            "kron_hf.BlockSizeCallback, then pass its `config` to get_peft_model"
        )


def _layers_for(targets: list[Target], model: nn.Module, config: KronConfig) -> Mapping[str, KronLayer]:
    if (prepared := take_prepared(targets, config)) is not None:
        return prepared
    if config.modules is not None:
        return {target.name: stored_layer(target) for target in targets}
    layers = make_layers(targets, init_method(model, config, targets))
    return {name: layer for name, layer in layers.items() if isinstance(layer, KronLayer)}


def _resolved(config: KronConfig, layers: Mapping[str, KronLayer], saved: list[str]) -> KronConfig:
    modules = {name: {"block_size": list(layer.block_size), "rank": layer.rank} for name, layer in layers.items()}
    return replace(
        config,
        modules=modules,
        modules_to_save=saved or None,
        target_modules=None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        block_size_pattern={},
        rank_pattern={},
        target_params=None,
        target_flops=None,
        max_error=None,
        calibration_config=None,
    )


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The factors and biases of the adapter by their names in the model's state dict."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, KronTunerLayer)
        for key, parameter in module.named_parameters()
    }
