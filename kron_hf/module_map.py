"""The resolved map of a checkpoint, `{module name: {"block_size": [bo, bi], "rank": r}}`.

Files store this and never a pattern, so that loading matches names literally. While block sizes are being selected an
entry is `{"candidates": [{"block_size": [bo, bi], "rank": r}, ...]}`: those that are left in this module.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from kron_hf.escaping import shown

__all__ = ["MAX_CANDIDATES", "ModuleMap", "checked_module_map", "entry_sizes", "localize_names", "size_entry"]

LIMIT = 2**62  # larger numbers would only make long errors
MAX_CANDIDATES = 64  # of one module; each costs a layer before any of its tensors is looked at
ModuleMap = dict[str, dict[str, Any]]
EntryT = TypeVar("EntryT")


def checked_module_map(modules: Any, where: str = "modules") -> ModuleMap:
    """The map, sorted, its block sizes as lists.

    Args:
        modules: The map.
        where: What errors call it.

    Raises:
        ValueError: It is no such map, holds a number below 1, too many candidates or one twice.

    Example:
        >>> checked_module_map({"fc": {"candidates": [{"block_size": (4, 4), "rank": 1}]}})
        {'fc': {'candidates': [{'block_size': [4, 4], 'rank': 1}]}}
    """
    if not isinstance(modules, dict) or not modules:
        raise ValueError(f"{where} must be a non-empty dict, got {shown(modules)}")
    for name, entry in modules.items():
        has_name = isinstance(name, str) and name != ""
        if has_name and isinstance(entry, dict) and entry.keys() == {"candidates"}:
            _check_candidates(entry["candidates"], f"{where}[{shown(name)}]")
        elif not has_name or not _is_size(entry):
            raise ValueError(
                f'{where}[{shown(name)}] must be {{"block_size": [out, in], "rank": r}} with positive ints below '
                f"2**62, got {shown(entry)}"
            )
    return {name: _copied(entry) for name, entry in sorted(modules.items())}  # as PEFT writes it


def entry_sizes(entry: Mapping[str, Any]) -> list[tuple[tuple[int, int], int]]:
    """`(block_size, rank)` of each Kronecker layer in an entry of a checked map: of one, or of every candidate."""
    return [((size["block_size"][0], size["block_size"][1]), size["rank"]) for size in entry.get("candidates", [entry])]


def size_entry(block_size: tuple[int, int], rank: int) -> dict[str, Any]:
    """The entry of one Kronecker layer."""
    return {"block_size": list(block_size), "rank": rank}


def _is_size(entry: Any) -> bool:
    sizes = entry.get("block_size") if isinstance(entry, dict) and len(entry) == 2 else None
    numbers = [*sizes, entry.get("rank")] if isinstance(sizes, list | tuple) and len(sizes) == 2 else []
    return bool(numbers) and all(type(number) is int and 1 <= number < LIMIT for number in numbers)


def _check_candidates(candidates: Any, where: str) -> None:
    if not isinstance(candidates, list | tuple) or not 1 <= len(candidates) <= MAX_CANDIDATES:
        given = f"{len(candidates)} of them" if isinstance(candidates, list | tuple) else shown(candidates)
        raise ValueError(f"{where}: candidates must be a list of 1 to {MAX_CANDIDATES}, got {given}")
    for index, entry in enumerate(candidates):
        if not _is_size(entry):
            raise ValueError(
                f'{where}: candidates[{index}] must be {{"block_size": [out, in], "rank": r}} with positive ints '
                f"below 2**62, got {shown(entry)}"
            )
        if _copied(entry) in map(_copied, candidates[:index]):
            raise ValueError(f"{where}: candidates[{index}] is there before, {shown(entry)}")


def _copied(entry: dict[str, Any]) -> dict[str, Any]:
    if "candidates" in entry:
        return {"candidates": [_copied(candidate) for candidate in entry["candidates"]]}
    return size_entry(entry["block_size"], entry["rank"])


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
