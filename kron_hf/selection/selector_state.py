"""The state of a selection as it stands in a file: says what is wrong with one from a damaged file."""

from collections.abc import Callable, Mapping
from typing import Any

from kron_hf.escaping import shown

__all__ = ["checked_state"]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_list(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return _is_list(value, lambda each: _is_list(each, _is_text))


def _is_by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_text(name) and _is_number(each) for name, each in value.items())


def _is_costs(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and value.keys() == {"candidates", "dense"}
        and _is_list(value["candidates"], _is_by_name)
        and _is_list(value["dense"], _is_number)
    )


def _is_method(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    if value.keys() == {"drops"}:  # of Validation
        return _is_count(value["drops"]) and value["drops"] > 0
    return (
        value.keys() == {"references", "units"}  # of Penalty
        and _is_list(value["references"], _is_number)
        and _is_list(value["units"], lambda own: _is_list(own, _is_unit))
    )


def _is_unit(value: Any) -> bool:
    return _is_list(value, _is_number) and len(value) == 2 and _is_count(value[0])


def _is_event(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() == {"step", "layer", "dropped", "losses_without"}
        and _is_count(value["step"])
        and (value["layer"] is None or _is_text(value["layer"]))
        and _is_text(value["dropped"])
        and _is_by_name(value["losses_without"])
    )


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() == {"steps", "norms"}
        and _is_list(value["steps"], _is_count)
        and _is_list(value["norms"], lambda rows: _is_list(rows, _is_by_name))
        and len(value["steps"]) == len(value["norms"])
    )


CHECKS: dict[str, Callable[[Any], bool]] = {
    "options": lambda value: isinstance(value, Mapping),
    "step_count": _is_count,
    "total_steps": _is_count,
    "names": lambda value: _is_list(value, _is_text),
    "shapes": lambda value: _is_list(value, lambda each: _is_list(each, _is_count) and len(each) in (2, 4)),
    "alive": _is_names,
    "sizes": lambda value: _is_list(value, _is_sizes),
    "variances": lambda value: _is_list(value, _is_number),
    "costs": _is_costs,
    "method": _is_method,
    "restarted_at": lambda value: value is None or _is_count(value),
    "events": lambda value: _is_list(value, _is_event),
    "record": _is_record,
}


def _is_sizes(value: Any) -> bool:
    return _is_list(value, lambda size: _is_list(size, _is_count) and len(size) == 3 and min(size) > 0)


def checked_state(state: object) -> Mapping[str, Any]:
    """The state of a `BlockSizeSelector`.

    Raises:
        ValueError: It is none; names the entry.
    """
    content = state if isinstance(state, Mapping) else {}
    for name, check in CHECKS.items():
        if name not in content or not check(content[name]):
            raise ValueError(f"the selection state is malformed: {name} is {shown(content.get(name))}")
    layers = {len(content[name]) for name in ("names", "shapes", "alive", "sizes", "variances")}
    if len(layers) > 1:
        raise ValueError("the selection state is malformed: its lists are of different numbers of layers")
    return content
