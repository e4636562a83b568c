"""Which modules of a model become Kronecker layers, and with which block size and rank.

Everything is decided and checked here before `surgery` touches the model.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from kron_hf.block_size import resolve_block_size
from kron_hf.config import BlockSize, KronConfig
from kron_hf.escaping import printable
from kron_hf.kron_kinds import dense_sizes, kron_kind
from kron_hf.module_map import entry_sizes, localize_names
from kron_hf.selection.candidates import converted_layers
from kron_hf.target import Target, warn_not_cheaper
from kron_hf.target_messages import grouped_reasons, no_match_message
from kron_hf.weight_reads import weight_reader

__all__ = ["Target", "find_targets", "names_to_save", "pretrained_parts", "refuse_adapters"]

# Last name of an attention or MLP projection in transformers' encoders (4.x and 5.x names).
PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv", "qkv_proj", "query", "key", "value"),
    *("fc1", "fc2", "gate_proj", "up_proj", "down_proj", "weights_in", "weights_out"),
    *("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),  # DistilBERT
    *("projection_query", "projection_key", "projection_value"),  # CvT
    *("to_query", "to_key"),  # SwiftFormer
    *("Wqkv", "Wi", "Wo"),  # ModernBERT
    *("ffn", "ffn_output"),  # ALBERT
}
# Common words are a projection only when they stand directly in one of these.
PROJECTIONS_WITHIN = {
    "dense": {"intermediate", "output", "attention"},  # BERT's style; the last is ALBERT's
    "dense1": {"mlp"},  # PVT
    "dense2": {"mlp"},
    "proj": {"attention", "attn"},  # Hiera, PVTv2, ViTDet
    "projection": {"self_attn"},  # BLIP
    "final": {"attn"},  # SwiftFormer
    "value_proj": {"self_attn", "encoder_attn", "cross_attn"},  # deformable attention, as in Mask2Former
    "output_proj": {"self_attn", "encoder_attn", "cross_attn"},
    **{name: {"SelfAttention", "EncDecAttention"} for name in "qkvo"},  # T5
    **{name: {"DenseReluDense"} for name in ("wi", "wi_0", "wi_1", "wo")},
    "linear": {"queries_keys_values", "keys_values", "queries", "projection", "linear_up", "linear_down"},  # LeViT
}
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def find_targets(model: nn.Module, config: KronConfig, *, compare_cost: bool = True) -> list[Target]:
    """Resolves a config against a model; `config.modules`, if given, by literal names alone.

    With `compare_cost` it warns of modules whose Kronecker layer would need no fewer FLOPs than the dense one.

    Raises:
        ValueError: Nothing matches (the error lists what could), a module named explicitly cannot be replaced, the
            model is converted or quantized already, or the config holds patterns from a file.
    """
    _check_model(model)
    config.refuse_stored_patterns()
    if config.modules is not None:
        return _stored_targets(model, config)
    named = config.target_modules is not None and config.target_modules != "all-linear"
    matches, owners = _matcher(model, config, named), _weight_owners(model)
    targets: list[Target] = []
    skipped: dict[str, str] = {}
    # Second names of shared modules, too: naming one is an error, not a miss.
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or not matches(name):
            continue
        try:
            targets.append(_resolve(model, name, module, config, owners))
        except ValueError as error:
            reason = printable(str(error))
            if named:
                raise ValueError(reason) from None
            skipped[name] = reason
    if not targets:
        raise ValueError(no_match_message(model, config, skipped))
    if skipped:
        warnings.warn(f"Left dense: {grouped_reasons(model, skipped)}", stacklevel=4)
    _warn_unused(model, config, [*(target.name for target in targets), *skipped])
    if compare_cost:
        warn_not_cheaper(targets, stacklevel=4)
    return targets


def _stored_targets(model: nn.Module, config: KronConfig) -> list[Target]:
    entries, owners = localize_names(model, config.modules or {}), _weight_owners(model)
    local = replace(config, modules=entries)
    return [_resolve(model, name, model.get_submodule(name), local, owners) for name in entries]


def pretrained_parts(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost transformers models in a model, by their names in it; "" if it is one itself."""
    parts: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(_is_inside(name, outer) for outer in parts):
            parts[name] = module
    return parts


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def refuse_adapters(model: nn.Module) -> None:
    """Raises a ValueError if a model carries PEFT adapters."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(
            f"the model carries PEFT adapters (first: {adapted[0]}); merge them first, "
            "model = peft_model.merge_and_unload(), or load the base model again"
        )


def _check_model(model: nn.Module) -> None:
    refuse_adapters(model)
    converted = converted_layers(model)
    if converted:
        first = printable(next(iter(converted)))
        raise ValueError(
            f"the model already has {len(converted)} Kronecker layers (first: {first}); convert a "
            "dense model, or turn this one back with kron_hf.to_dense(model) first"
        )
    methods = {method for module in model.modules() if (method := _quant_method(module))}
    if "kron" in methods:
        raise ValueError(
            "the model was built from the config of a Kronecker checkpoint, but not loaded from it; load it with "
            "from_pretrained, or delete config.quantization_config to convert a new model"
        )
    if methods:
        raise ValueError(
            "the model is quantized; Kronecker layers replace plain nn.Linear weights, so load it without "
            "quantization_config, convert it, and quantize afterwards"
        )


def _quant_method(module: nn.Module) -> str | None:
    entry: Any = getattr(getattr(module, "config", None), "quantization_config", None)
    if entry is None:
        return "unknown" if getattr(module, "is_quantized", False) is True else None
    return str(entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None))


def _matcher(model: nn.Module, config: KronConfig, named: bool) -> Callable[[str], bool]:
    # PEFT would run the names in modules_to_save as regular expressions.
    saved, config = names_to_save(model, config), replace(config, modules_to_save=None)
    all_of_them = replace(config, target_modules=".*", layers_to_transform=None, layers_pattern=None)

    def kept(name: str) -> bool:
        return bool(check_target_module_exists(all_of_them, name)) and not any(_is_inside(f"{name}.", s) for s in saved)

    if named:
        chosen = replace(config, exclude_modules=None)
        return lambda name: _is_chosen(chosen, name) and kept(name)
    candidates = set(_default_names(model) if config.target_modules is None else _all_linear_names(model))
    return lambda name: name in candidates and kept(name)


def names_to_save(model: nn.Module, config: KronConfig) -> list[str]:
    """Full names of the modules that `config.modules_to_save` means: those it names, or whose name ends so."""
    entries = config.modules_to_save or []
    return [name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{entry}") for entry in entries)]


def _is_chosen(config: KronConfig, name: str) -> bool:
    # PEFT expects a dot before the list that layers_to_transform counts; in a bare ViTModel "layers.0" is first.
    key = name if config.layers_to_transform is None else f".{name}"
    return bool(check_target_module_exists(config, key))


def _default_names(model: nn.Module) -> Iterator[str]:
    """Attention and MLP projections of the transformers models in it; without any, all linears but the last."""
    parts = pretrained_parts(model)
    if not parts:
        yield from _all_linear_names(model)
    for part_name, part in parts.items():
        yield from (_joined(part_name, name) for name in _linear_names_without_head(part) if _is_projection(name))


def _is_projection(name: str) -> bool:
    *parents, last = name.split(".")
    inside_stack = any(part.isdigit() for part in parents)
    return inside_stack and (last in PROJECTIONS or parents[-1] in PROJECTIONS_WITHIN.get(last, ()))


def _all_linear_names(model: nn.Module) -> Iterator[str]:
    """Every linear but the output heads: those of transformers models, and the last linear outside of them."""
    parts = pretrained_parts(model)
    for part_name, part in parts.items():
        yield from (_joined(part_name, name) for name in _linear_names_without_head(part))
    outside = [name for name in _linear_names(model) if not any(_is_inside(name, part) for part in parts)]
    heads = [name for name in outside if not weight_reader(model, name)][-1:]
    yield from (name for name in outside if name not in heads or (len(outside) == 1 and not parts))


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _linear_names_without_head(model: PreTrainedModel) -> Iterator[str]:
    prefix = f"{model.base_model_prefix}."
    has_head = model.base_model is not model
    output = model.get_output_embeddings()
    for name in _linear_names(model):
        # Some classes with a head hold no backbone of their own, as CLIPForImageClassification.
        is_head = not name.startswith(prefix) if has_head else name in SEQ_CLS_HEAD_NAMES
        if not is_head and (output is None or model.get_submodule(name) is not output):
            yield name


def _linear_names(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if isinstance(module, nn.Linear))


def _resolve(
    model: nn.Module, name: str, module: nn.Module, config: KronConfig, owners: dict[int, list[str]]
) -> Target:
    """The target for one module.

    Raises:
        ValueError: The module cannot be replaced; names it.
    """
    if reader := weight_reader(model, name):
        raise ValueError(f"{name}: {reader} reads its weight directly, so it cannot be replaced")
    kron_kind(module, name)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    if not isinstance(module.weight, nn.Parameter) or module.weight.dtype not in FLOAT_DTYPES:
        kind = "parameter" if isinstance(module.weight, nn.Parameter) else "computed tensor"
        raise ValueError(
            f"{name}: its weight must be a parameter of dtype float64, float32, bfloat16 or float16, got a {kind} of "
            f"{module.weight.dtype} (weight norm, pruning masks and quantization come after conversion)"
        )
    others = [owner for owner in owners[id(module.weight)] if owner != f"{name}.weight"]
    if others:
        raise ValueError(f"{name}: its weight is tied to {', '.join(others)}, so it cannot be replaced alone")
    wanted, several = _sizes_of(name, config)
    out_size, in_size, kernel, _ = dense_sizes(module)
    sizes = [(resolve_block_size(size, out_size, in_size, name), rank) for size, rank in wanted]
    for index, (block_size, rank) in enumerate(sizes):
        largest = block_size[0] * block_size[1] * kernel
        if rank > largest:
            entries = "bo * bi" if isinstance(module, nn.Linear) else "bo * bi * kh * kw"
            raise ValueError(f"{name}: rank must be at most {entries} = {largest}, got {rank}")
        if (block_size, rank) in sizes[:index]:
            raise ValueError(f"{name}: two candidates are blocks of {block_size} at rank {rank} here")
    return Target(name, module, *sizes[0], candidates=tuple(sizes) if several else ())


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter; more than one where parameters or whole modules are shared."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _sizes_of(name: str, config: KronConfig) -> tuple[Sequence[tuple[BlockSize, int]], bool]:
    """Block size and rank of each layer that a module becomes, and whether they are candidates to choose from."""
    if config.modules is not None:
        entry = config.modules[name]
        return entry_sizes(entry), "candidates" in entry
    if config.candidates:
        return config.candidates, True
    if config.budget is not None:
        return [((1, -1), 1)], False  # in place of what data will choose; it fits every layer
    size = config.block_size_pattern.get(get_pattern_key(list(config.block_size_pattern), name), config.block_size)
    return [(size, config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.rank))], False


def _warn_unused(model: nn.Module, config: KronConfig, chosen: list[str]) -> None:
    """Warns about every entry of the config that selects nothing: most likely a misspelt name."""
    for field_name in ("block_size_pattern", "rank_pattern"):
        for pattern in getattr(config, field_name):
            if not any(get_pattern_key([pattern], name) == pattern for name in chosen):
                _warn_unused_entry(field_name, pattern, "of the chosen modules")
    indices = config.layers_to_transform
    for index in [indices] if isinstance(indices, int) else indices or []:
        alone = replace(config, layers_to_transform=[index], exclude_modules=None)
        if not any(_is_chosen(alone, name) for name in chosen):
            _warn_unused_entry("layers_to_transform", index, "of the chosen modules")
    for field_name in ("target_modules", "exclude_modules"):
        entries = getattr(config, field_name)
        for entry in entries if isinstance(entries, list) else []:
            if not any(name == entry or name.endswith(f".{entry}") for name, _ in model.named_modules()):
                _warn_unused_entry(field_name, entry, "of the modules")


def _warn_unused_entry(field_name: str, entry: str | int, of_what: str) -> None:
    warnings.warn(f"{field_name}: {entry!r} matches none {of_what}", stacklevel=6)
