"""`modules_to_save`: modules beside the adapter that are trained and saved whole."""

from collections.abc import Iterable

from torch import nn

from kron_hf.config import KronConfig
from kron_hf.escaping import shown
from kron_hf.targets import names_to_save

__all__ = ["check_saved_modules"]

CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def check_saved_modules(model: nn.Module, config: KronConfig, replaced: Iterable[str]) -> list[str]:
    """Full names of the modules that `config.modules_to_save` means.

    PEFT itself compares the ends of names, so that "embeddings" would take "patch_embeddings", too.

    Raises:
        ValueError: An entry names nothing, a container, or part of the adapter, or PEFT would take more than it names.
    """
    names = names_to_save(model, config)
    for name in names:
        if isinstance(model.get_submodule(name), CONTAINERS):
            raise ValueError(f"modules_to_save: {name} is a container, not a module with a forward; name its members")
        if inside := [other for other in replaced if f"{other}.".startswith(f"{name}.")]:
            raise ValueError(f"modules_to_save: {name} holds {inside[0]}, which the adapter replaces")
    for entry in config.modules_to_save or []:
        if not any(f".{name}".endswith(f".{entry}") for name in names):
            _check_absent(model, config, entry)
    # PEFT's classes for tasks match the entries again as they were given.
    entries = names if config.task_type is None else config.modules_to_save or []
    taken = {name for name, _ in model.named_modules() if any(name.endswith(entry) for entry in entries)}
    if more := sorted(taken - set(names)):
        raise ValueError(
            f"modules_to_save: PEFT matches the ends of names and would take {', '.join(more)}, too; write full names"
        )
    return names


def _check_absent(model: nn.Module, config: KronConfig, entry: str) -> None:
    """PEFT's classes for tasks add names of heads that few models have; a backbone lacks the head that was saved."""
    if config.modules is None and config.task_type is None:
        raise ValueError(f"modules_to_save: {shown(entry)} names no module of the model")
    prefix = getattr(model, "base_model_prefix", "")
    present = {name for name, _ in model.named_modules()}
    if prefix and {entry.removeprefix(f"{prefix}."), f"{prefix}.{entry}"} & present:
        raise ValueError(
            f"modules_to_save: the adapter stores {shown(entry)}, which {type(model).__name__} names otherwise; load "
            "the adapter into the class that it was made for"
        )
