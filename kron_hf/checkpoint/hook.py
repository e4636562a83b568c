"""Full checkpoints: plain transformers models with Kronecker layers that `from_pretrained` loads.

transformers lets third parties load layers of their own through its quantizer hook. `config.json` then holds
`quantization_config = {"quant_method": "kron", "format_version": 1, "modules": {name: {"block_size", "rank"}}}`:
the resolved map (see `module_map`), so that loading never matches a pattern. Version 2 differs in the weight files
alone, see `compact`; models save themselves in version 1. Private attributes of transformers are touched in this file
and in no other: `_is_quantized`, `_is_hf_initialized`.
"""

# transformers does not annotate this extension point as it is used.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportIncompatibleMethodOverride=false

import copy
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kron_hf.checkpoint.cache import check_cached_files
from kron_hf.checkpoint.claims import check_config, check_elements
from kron_hf.checkpoint.compact import stored_elements, unpacking
from kron_hf.checkpoint.files import check_dtypes, check_layer, check_places, check_unmapped, read_headers
from kron_hf.checkpoint.tensor_names import came_from_files, forget_tensor_names, keep_tensor_names
from kron_hf.escaping import shown
from kron_hf.kron_kinds import kron_kind
from kron_hf.kron_layer import KronLayer
from kron_hf.module_map import checked_module_map, entry_sizes, size_entry
from kron_hf.selection.candidates import KronCandidates, candidate_name, converted_layers

__all__ = [
    "KronCheckpointConfig",
    "attach_kron_config",
    "carry_trained_mark",
    "detach_kron_config",
    "holds_trained_weights",
    "mark_trained",
    "strip_kron_config",
]

QUANT_METHOD = "kron"
FORMAT_VERSION, COMPACT_VERSION = 1, 2
# transformers refuses to build a model whose config names an unknown fusion. The quantizer below takes the entry out
# again, so that exactly those who did not import kron_hf are stopped, whatever they pass to `from_pretrained`.
GUARD_PREFIX = "kron_hf"
GUARD = {
    f"{GUARD_PREFIX} (this checkpoint holds Kronecker layers: `pip install kron_hf`, then `import kron_hf` first)": True
}


@register_quantization_config(QUANT_METHOD)
class KronCheckpointConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of `config.json`: which modules are Kronecker layers, with which sizes.

    Args:
        modules: `{module name: {"block_size": [bo, bi], "rank": r}}`; while block sizes are being selected
            `{module name: {"candidates": [{"block_size": [bo, bi], "rank": r}, ...]}}`.
        format_version: Version of this layout.
        quant_method: Always "kron".

    Raises:
        ValueError: The entry is not of a known version or is malformed.
    """

    def __init__(
        self, /, modules: Any = None, format_version: Any = None, quant_method: str = QUANT_METHOD, **unknown: Any
    ):
        if not isinstance(format_version, int) or isinstance(format_version, bool) or format_version < 1:
            raise ValueError(
                f"config.json: quantization_config.format_version must be an int, got {shown(format_version)}"
            )
        if format_version > COMPACT_VERSION:
            raise ValueError(
                f"config.json: quantization_config.format_version is {shown(format_version)}, this kron_hf reads up to "
                f"{COMPACT_VERSION}; upgrade kron_hf"
            )
        if unknown:
            raise ValueError(f"config.json: quantization_config has unknown keys {shown(sorted(unknown))}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers types it as its own enum
        self.format_version = format_version
        self.modules = checked_module_map(modules, "config.json: quantization_config.modules")

    @classmethod
    def of(cls, model: nn.Module) -> "KronCheckpointConfig":
        """The entry that describes a model's present Kronecker layers."""
        modules = {name: _entry(layer) for name, layer in converted_layers(model).items()}
        return cls(modules=modules, format_version=FORMAT_VERSION)


@register_quantizer(QUANT_METHOD)
class KronHfQuantizer(HfQuantizer):
    """Swaps the modules that the map names for Kronecker layers while transformers loads a checkpoint."""

    quantization_config: KronCheckpointConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses `from_pretrained(dense_dir, quantization_config=...)`, which would drop the dense weights."""
        if not self.pre_quantized:
            raise ValueError(
                "this checkpoint is dense: load it without quantization_config, then call "
                "kron_hf.get_kron_model(model, KronConfig(init_weights=...))"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """The one hook that sees the config before the model is built: checks it and takes the import guard out."""
        check_config(config)
        fusions = getattr(config, "fusion_config", None)
        if isinstance(fusions, dict):
            config.fusion_config = _without_guard(fusions)
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if files is not None:
            check_places(files, model.config.name_or_path)
            check_cached_files(files)
        modules = _names_in(model, self.quantization_config.modules)
        stored = {} if files is None else read_headers(files)
        if files is not None:
            named = chain(self.quantization_config.modules.items(), ((name, modules[name][1]) for name in modules))
            check_unmapped(stored, {kron_name for name, entry in named for kron_name in _kron_names(name, entry)})
        layers: dict[str, KronLayer | KronCandidates] = {}
        for name, (in_map, entry) in modules.items():
            layers[name] = _empty_layer(model, name, entry)
            if files is not None:  # one by one: an entry may claim many candidates
                check_layer(stored, name, in_map, layers[name], files, compact=self._is_compact)
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        if files is not None:
            check_dtypes(stored, model)
            check_elements(chain(model.parameters(), model.buffers()), stored_elements(stored))

    def get_weight_conversions(self) -> list[Any]:
        """How tensors of the files become those of the model; asked after the model was prepared."""
        return unpacking() if self._is_compact else []

    @property
    def _is_compact(self) -> bool:
        return self.quantization_config.format_version == COMPACT_VERSION

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, layer in model.named_modules():
            if isinstance(layer, KronLayer | KronCandidates):
                _check_loaded(name, layer)
            if isinstance(layer, KronLayer) and not layer.s.is_meta:
                layer.freeze_mask()
        del model.hf_quantizer
        model.is_quantized = False
        attach_kron_config(model)
        return model

    def is_serializable(self) -> bool:
        """Saving needs nothing from this hook."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Kronecker layers are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without it Trainer would refuse the model as "purely quantized"."""
        return True


def attach_kron_config(model: nn.Module) -> None:
    """Makes a transformers model save and reload its Kronecker layers; a plain module is left as it is.

    The config is copied first: another model may have been built from the same object.
    """
    if not isinstance(model, PreTrainedModel):
        return
    config = _own_config(model)
    config.quantization_config = KronCheckpointConfig.of(model).to_dict()  # transformers expects a dict in a config
    config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), **GUARD}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
    keep_tensor_names(model)
    model.add_model_tags(["kron_hf"])


def detach_kron_config(model: nn.Module) -> None:
    """Undoes `attach_kron_config`: what the model saves from now on is plain transformers."""
    if not isinstance(model, PreTrainedModel):
        return
    strip_kron_config(_own_config(model))
    forget_tensor_names(model)
    if model.model_tags is not None and "kron_hf" in model.model_tags:
        model.model_tags.remove("kron_hf")


def strip_kron_config(config: Any) -> None:
    """Makes the config of a converted model that of the dense one."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.fusion_config = _without_guard(getattr(config, "fusion_config", None) or {})
    if config.fusion_config is None:
        del config.fusion_config


def holds_trained_weights(model: nn.Module, parameters: list[Tensor]) -> bool:
    """Whether `from_pretrained` filled one of these parameters; weights drawn from a config do not count."""
    wanted = {id(parameter) for parameter in parameters}
    return any(map(_is_marked, parameters)) or any(
        wanted & {id(parameter) for parameter in module.parameters()}
        for module in model.modules()
        if _is_copy_of_a_loaded_model(module)
    )


def _is_copy_of_a_loaded_model(module: nn.Module) -> bool:
    """A deep copy of a loaded model loses the marks of its parameters, but not the attribute of the model."""
    return came_from_files(module) and not any(map(_is_marked, module.parameters()))


def carry_trained_mark(source: nn.Module, target: nn.Module) -> None:
    """Lets `holds_trained_weights` see the parameters of `target` as it saw those of the `source` they replace."""
    if any(map(_is_marked, source.parameters())):
        mark_trained(target)


def mark_trained(module: nn.Module) -> None:
    """Lets `holds_trained_weights` count the parameters of a module as trained."""
    for parameter in module.parameters():
        parameter._is_hf_initialized = True


def _is_marked(parameter: Tensor) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _without_guard(fusions: dict[str, Any]) -> dict[str, Any] | None:
    return {key: value for key, value in fusions.items() if not key.startswith(GUARD_PREFIX)} or None


def _own_config(model: PreTrainedModel) -> Any:
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    return own


def _names_in(model: PreTrainedModel, modules: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Maps stored module names to those of this class: `{name here: (stored name, entry)}`.

    A backbone and a class with a head name the same module with and without `base_model_prefix`. Entries of modules
    that this class lacks are skipped only when a headed checkpoint is loaded into its backbone.
    """
    present = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    if modules.keys() <= present:
        return {name: (name, entry) for name, entry in modules.items()}
    inner = {name.removeprefix(prefix): (name, entry) for name, entry in modules.items() if name.startswith(prefix)}
    if inner and inner.keys() <= present:
        return inner
    outer = {prefix + name: (name, entry) for name, entry in modules.items()}
    if outer.keys() <= present:
        return outer
    missing = sorted(modules.keys() - present)
    raise ValueError(
        f"config.json: {type(model).__name__} has no module {shown(missing[0])} ({len(missing)} of the {len(modules)} "
        "in quantization_config.modules are missing); was the architecture changed after saving?"
    )


def _entry(layer: KronLayer | KronCandidates) -> dict[str, Any]:
    if isinstance(layer, KronLayer):
        return size_entry(layer.block_size, layer.rank)
    return {"candidates": [size_entry(*layer.size(key)) for key in layer.alive]}


def _kron_names(name: str, entry: dict[str, Any]) -> list[str]:
    """The names of the modules with factors that an entry stands for."""
    if "candidates" in entry:
        return [candidate_name(name, block_size, rank) for block_size, rank in entry_sizes(entry)]
    return [name]


def _empty_layer(model: PreTrainedModel, name: str, entry: dict[str, Any]) -> KronLayer | KronCandidates:
    dense: Any = model.get_submodule(name)
    kind = kron_kind(dense, f"config.json: module {name!r}")
    try:
        sizes = entry_sizes(entry)
        if "candidates" in entry:
            return KronCandidates.like(dense, sizes, device="meta")
        return kind.like(dense, *sizes[0], device="meta")
    except ValueError as error:
        shape = tuple(dense.weight.shape[:2])
        raise ValueError(f"config.json: module {name!r} is {shape} (out, in): {error}") from None


def _check_loaded(name: str, layer: KronLayer | KronCandidates) -> None:
    for key, parameter in layer.named_parameters():
        if not parameter.is_meta and not _is_marked(parameter):
            raise ValueError(f"tensor {f'{name}.{key}'!r} is missing from the given state_dict")
