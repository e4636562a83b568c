"""Which modules of a model become Kronecker layers, and with which block size and rank.

Everything is decided and checked here before `surgery` touches the model.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from kron_hf.config import BlockSize, KronConfig
from kron_hf.factors import kron_flops
from kron_hf.layers import KronLinear, resolve_block_size

__all__ = ["Target", "find_targets"]

# Last name of an attention or MLP projection in transformers' encoders (4.x and 5.x names).
PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv", "qkv_proj", "query", "key", "value"),
    *("fc1", "fc2", "gate_proj", "up_proj", "down_proj", "weights_in", "weights_out"),
}
# BERT's style: a plain `dense` is a projection when it stands directly in one of these.
DENSE_PARENTS = {"intermediate", "output"}
# Parts of an encoder that hold linears which are no projections.
NOT_PROJECTIONS = {"pooler", "head", "downsample", "continuous_position_bias_mlp"}
# torch modules that read the weights of their linears directly, instead of calling them.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Target:
    """One module to replace: its full name, the module, and the resolved block size and rank."""

    name: str
    linear: nn.Linear
    block_size: tuple[int, int]
    rank: int


def find_targets(model: nn.Module, config: KronConfig) -> list[Target]:
    """Resolves a config against a model.

    Raises:
        ValueError: Nothing matches (the error lists what could), a module named explicitly cannot be replaced, or
            the model is converted or quantized already.
    """
    _check_model(model)
    named = config.target_modules is not None and config.target_modules != "all-linear"
    matches, owners = _matcher(model, config, named), _weight_owners(model)
    targets: list[Target] = []
    skipped: list[str] = []
    for name, module in model.named_modules():
        if not name or not matches(name, module):
            continue
        try:
            targets.append(_resolve(model, name, module, config, owners))
        except ValueError as error:
            if named:
                raise
            skipped.append(str(error))
    if not targets:
        raise ValueError(_no_match_message(model, config, skipped))
    if skipped:
        warnings.warn(f"Left dense: {'; '.join(skipped)}", stacklevel=4)
    _warn_unused_patterns(config, targets)
    _warn_not_cheaper(targets)
    return targets


def _check_model(model: nn.Module) -> None:
    converted = [name for name, module in model.named_modules() if isinstance(module, KronLinear)]
    if converted:
        raise ValueError(
            f"the model already has {len(converted)} Kronecker layers (first: {converted[0]}); convert a dense model, "
            "or turn this one back with kron_hf.to_dense(model) first"
        )
    method = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(model, "is_quantized", False) or method is not None:
        raise ValueError(
            "the model is quantized; Kronecker layers replace plain nn.Linear weights, so load it without "
            "quantization_config, convert it, and quantize afterwards"
        )


def _matcher(model: nn.Module, config: KronConfig, named: bool) -> Callable[[str, nn.Module], bool]:
    if named:
        return lambda name, _: bool(check_target_module_exists(config, name))
    candidates = set(_default_names(model) if config.target_modules is None else _all_linear_names(model))
    if not config.exclude_modules:
        return lambda name, _: name in candidates
    chosen = KronConfig(target_modules=sorted(candidates), exclude_modules=config.exclude_modules)
    return lambda name, _: name in candidates and bool(check_target_module_exists(chosen, name))


def _default_names(model: nn.Module) -> Iterator[str]:
    """Attention and MLP projections of a transformers encoder; on a plain module all linears but the last."""
    if not isinstance(model, PreTrainedModel):
        yield from _all_linear_names(model)
        return
    for name in _linear_names_without_head(model):
        parents, last = name.split(".")[:-1], name.rpartition(".")[2]
        inside_stack = any(part.isdigit() for part in parents)
        is_projection = last in PROJECTIONS or (last == "dense" and parents[-1] in DENSE_PARENTS)
        if inside_stack and is_projection and not NOT_PROJECTIONS.intersection(parents):
            yield name


def _all_linear_names(model: nn.Module) -> Iterator[str]:
    if isinstance(model, PreTrainedModel):
        yield from _linear_names_without_head(model)
        return
    names = list(_linear_names(model))
    yield from names[:-1] if len(names) > 1 else names


def _linear_names_without_head(model: PreTrainedModel) -> Iterator[str]:
    prefix = f"{model.base_model_prefix}."
    has_head = model.base_model is not model
    output = model.get_output_embeddings()
    for name in _linear_names(model):
        if (not has_head or name.startswith(prefix)) and (output is None or model.get_submodule(name) is not output):
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
    if type(module) is not nn.Linear:
        raise ValueError(f"{name}: only nn.Linear can become a Kronecker layer, this is a {type(module).__name__}")
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, READS_WEIGHTS):
        raise ValueError(f"{name}: {type(parent).__name__} reads its weight directly, so it cannot be replaced")
    others = [owner for owner in owners[id(module.weight)] if owner != name]
    if others:
        raise ValueError(f"{name}: its weight is tied to {', '.join(others)}, so it cannot be replaced alone")
    size: BlockSize = config.block_size_pattern.get(
        get_pattern_key(list(config.block_size_pattern), name), config.block_size
    )
    block_size = resolve_block_size(size, module.out_features, module.in_features, name)
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.rank)
    if rank > block_size[0] * block_size[1]:
        raise ValueError(f"{name}: rank must be at most bo * bi = {block_size[0] * block_size[1]}, got {rank}")
    return Target(name, module, block_size, rank)


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Which modules hold each weight; more than one where weights or whole modules are shared."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    return owners


def _no_match_message(model: nn.Module, config: KronConfig, skipped: list[str]) -> str:
    candidates = [name for name, module in model.named_modules() if type(module) is nn.Linear and name]
    wanted = "the default target_modules" if config.target_modules is None else f"{config.target_modules!r}"
    reasons = f" ({'; '.join(skipped)})" if skipped else ""
    shown = ", ".join(candidates) if candidates else "none: the model has no nn.Linear below its root"
    return f"no module to replace matches {wanted}{reasons}; modules that could be named: {shown}"


def _warn_unused_patterns(config: KronConfig, targets: list[Target]) -> None:
    for field_name in ("block_size_pattern", "rank_pattern"):
        for pattern in getattr(config, field_name):
            if not any(re.match(rf"(.*\.)?({pattern})$", target.name) for target in targets):
                warnings.warn(f"{field_name}: {pattern!r} matches none of the replaced modules", stacklevel=5)


def _warn_not_cheaper(targets: list[Target]) -> None:
    dearer = []
    for target in targets:
        out_features, in_features = target.linear.out_features, target.linear.in_features
        ratio = kron_flops(out_features, in_features, target.block_size, target.rank) / (2 * out_features * in_features)
        if ratio >= 1:
            dearer.append(f"{target.name} ({ratio:.2f}x)")
    if dearer:
        warnings.warn(
            f"These modules need as many FLOPs as dense ones or more; take a lower rank or another block size: "
            f"{', '.join(dearer)}",
            stacklevel=5,
        )
