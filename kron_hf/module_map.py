"""The resolved map of an adapter, `{module name: {"block_size": [bo, bi], "rank": r}}`.

Files store this and never a pattern, so that loading matches names literally.
"""

from typing import Any, TypeVar

from torch import nn

from kron_hf.escaping import shown

__all__ = ["ModuleMap", "checked_module_map", "localize_names"]

LIMIT = 2**62  # larger numbers would only make long errors
ModuleMap = dict[str, dict[str, Any]]
EntryT = TypeVar("EntryT")


def checked_module_map(modules: Any, where: str = "modules") -> ModuleMap:
    """The map, sorted, its block sizes as lists.

    Args:
        modules: The map.
        where: What errors call it.

    Raises:
        ValueError: It is no such map, or holds a number below 1.
    """
    if not isinstance(modules, dict) or not modules:
        raise ValueError(f"{where} must be a non-empty dict, got {shown(modules)}")
    for name, entry in modules.items():
        sizes = entry.get("block_size") if isinstance(entry, dict) else None
        numbers = [*sizes, entry.get("rank")] if isinstance(sizes, list | tuple) and len(sizes) == 2 else []
        well_formed = isinstance(name, str) and name != "" and bool(numbers) and len(entry) == 2
        if not well_formed or any(type(number) is not int or not 1 <= number < LIMIT for number in numbers):
            raise ValueError(
                f'{where}[{shown(name)}] must be {{"block_size": [out, in], "rank": r}} with positive ints below '
                f"2**62, got {shown(entry)}"
            )
    return {
        name: {"block_size": list(entry["block_size"]), "rank": entry["rank"]}
        for name, entry in sorted(modules.items())  # as PEFT writes it
    }


def localize_names(model: nn.Module, entries: dict[str, EntryT]) -> dict[str, EntryT]:
    """The same entries under the names that this model gives the modules.

    A backbone and a class with a head name the same module with and without `base_model_prefix`.

    Raises:
        ValueError: The model lacks one of the modules; names it.
    """
    present = {name for name, _ in model.named_modules()}
    if entries.keys() <= present:
        return entries
    if prefix := getattr(model, "base_model_prefix", ""):
        shorter = {name.removeprefix(f"{prefix}."): entry for name, entry in entries.items()}
        longer = {f"{prefix}.{name}": entry for name, entry in entries.items()}
        for renamed in (shorter, longer):
            if renamed.keys() <= present and len(renamed) == len(entries):
                return renamed
    missing = sorted(entries.keys() - present)
    raise ValueError(
        f"{type(model).__name__} has no module {shown(missing[0])} ({len(missing)} of {len(entries)} are missing); is "
        "this the model that the adapter was made for?"
    )
