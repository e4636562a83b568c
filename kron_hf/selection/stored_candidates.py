"""State dicts of a `KronCandidates`, also from before a candidate was dropped or after one was chosen."""

from collections.abc import Mapping
from typing import Any

from kron_hf.escaping import shown

__all__ = ["CANDIDATES", "adapt_state_dict"]

CANDIDATES = "candidates"
FACTORS = ("s", "a", "b")
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


def adapt_state_dict(state_dict: dict[str, Any], prefix: str, shapes: Shapes) -> tuple[set[str], str]:
    """Finds out which candidates a state dict holds; factors of a plain layer get the names of their candidate's.

    Args:
        state_dict: Changed in place.
        prefix: What the names of the layer's tensors begin with.
        shapes: Shapes of S, A and B of each candidate of the layer.

    Returns:
        The names of the candidates, and what is wrong, if anything; there are none then, so that none is dropped.
    """
    if all(f"{prefix}{factor}" in state_dict for factor in FACTORS):
        return _adapt_plain(state_dict, prefix, shapes)
    begin = f"{prefix}{CANDIDATES}."
    # With strict=False, as Trainer loads, torch would pass over candidates that the layer has not.
    stored = {name.removeprefix(begin).partition(".")[0] for name in state_dict if name.startswith(begin)}
    if unknown := stored - shapes.keys():
        return set(), f"{prefix[:-1]!r}: candidates {shown(sorted(unknown))} are stored, this layer has {list(shapes)}"
    for name, expected in ((f"{begin}{key}.{factor}", shapes[key][factor]) for key in stored for factor in FACTORS):
        if name not in state_dict:
            return set(), f"{name!r} is missing beside other factors of this candidate"
        if tuple(state_dict[name].shape) != expected:
            return set(), f"{name!r} has shape {list(state_dict[name].shape)}, required is {list(expected)}"
    return stored, ""


def _adapt_plain(state_dict: dict[str, Any], prefix: str, shapes: Shapes) -> tuple[set[str], str]:
    tensors = {factor: state_dict.pop(f"{prefix}{factor}") for factor in FACTORS}
    found = {factor: tuple(tensor.shape) for factor, tensor in tensors.items()}
    for key, expected in shapes.items():
        if found == expected:
            state_dict.update({f"{prefix}{CANDIDATES}.{key}.{factor}": tensor for factor, tensor in tensors.items()})
            return {key}, ""
    return set(), f"{prefix[:-1]!r}: factors of shapes {found} are stored, which no candidate of {list(shapes)} has"
