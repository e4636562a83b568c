"""What `find_targets` says of modules that it leaves dense, and where it finds none: a line a kind, not a module."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from kron_hf.config import KronConfig
from kron_hf.escaping import printable

__all__ = ["grouped_names", "grouped_reasons", "no_match_message"]


def grouped_names(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Names that differ in numbers alone become one, with `*` for the numbers, if `among` holds no other like them."""
    own, whole = _by_kind(names), _by_kind(among)
    grouped: list[str] = []
    for kind, found in own.items():
        grouped += [kind] if 1 < len(found) == len(whole[kind]) else found
    return grouped


def _by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    return kinds


def grouped_reasons(model: nn.Module, reasons: Mapping[str, str]) -> str:
    """The errors of modules by their names, `name: what is wrong`; the same wrong is said once."""
    among = [name for name, _ in model.named_modules(remove_duplicate=False)]
    wrongs: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        wrongs.setdefault(reason.removeprefix(f"{printable(name)}: "), []).append(name)
    return "; ".join(f"{printable(', '.join(grouped_names(names, among)))}: {wrong}" for wrong, names in wrongs.items())


def no_match_message(model: nn.Module, config: KronConfig, skipped: Mapping[str, str]) -> str:
    """That no module is to be replaced: why those that match cannot be, or what could be named."""
    wanted = "the default target_modules" if config.target_modules is None else f"{config.target_modules!r}"
    message = f"no module to replace matches {wanted}"
    if skipped:
        return f"{message}, or rather none can be replaced: {grouped_reasons(model, skipped)}"
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        a_list = f"target_modules=[{config.target_modules!r}]"
        message += f" (a string is a regular expression for whole names; a list, {a_list}, matches their ends, too)"
    candidates = [name for name, module in model.named_modules() if name and _is_replaceable(module)]
    shown = (
        printable(", ".join(grouped_names(candidates, candidates)))
        if candidates
        else "none: the model has no nn.Linear or nn.Conv2d below its root"
    )
    return f"{message}; modules that could be named: {shown}"


def _is_replaceable(module: nn.Module) -> bool:
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
