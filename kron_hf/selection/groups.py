"""What a selection chooses between: the layers of a model that have candidates, and the choices to make for them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from kron_hf.kron_layer import KronLayer
from kron_hf.selection.candidates import KronCandidates

__all__ = ["candidate_layers", "choices_of", "label_of", "replace_by_chosen", "without"]

WRAPPERS = ("module", "_orig_mod")  # of DDP and torch.compile


def candidate_layers(model: nn.Module) -> dict[str, KronCandidates]:
    """The layers with candidates by name, in module order, each once, also inside DDP or `torch.compile`."""
    return {
        ".".join(part for i, part in enumerate(name.split(".")) if i > 0 or part not in WRAPPERS): module
        for name, module in model.named_modules()
        if isinstance(module, KronCandidates)
    }


def choices_of(layers: Sequence[KronCandidates], scope: str) -> list[list[int]]:
    """Of each choice, the indices of the layers that it is about.

    Raises:
        ValueError: One choice for all layers, but they do not have equally many candidates.
    """
    if scope == "layer":
        return [[index] for index in range(len(layers))]
    counts = {len(layer.alive) for layer in layers}
    if len(counts) > 1:
        raise ValueError(
            f"scope='global' chooses one candidate for all layers, but they have different numbers of them left: "
            f"{sorted(counts)}; pass scope='layer'"
        )
    return [list(range(len(layers)))]


def label_of(keys: Sequence[str]) -> str:
    """The name of a candidate in several layers: usually one; -1 in a block size makes them differ."""
    return " / ".join(dict.fromkeys(keys))


@contextmanager
def without(layers: Sequence[KronCandidates], keys: Sequence[str]) -> Iterator[None]:
    """The layers as if one candidate of each were dropped."""
    with ExitStack() as stack:
        for layer, key in zip(layers, keys, strict=True):
            stack.enter_context(layer.without(key))
        yield


def replace_by_chosen(model: nn.Module) -> dict[str, KronLayer]:
    """Puts the last candidate, a plain layer with the same parameters, in the place of every `KronCandidates`.

    Returns:
        The new layers by name.

    Raises:
        ValueError: A layer has more than one candidate left, or the model itself is a `KronCandidates`.
    """
    # Second names of shared modules, too.
    found = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, KronCandidates)]
    chosen = {id(layer): layer.chosen() for _, layer in found}
    for name, layer in found:
        if not name:
            raise ValueError("the model itself is a KronCandidates; take its chosen()")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, chosen[id(layer)])
    return {name: chosen[id(layer)] for name, layer in found}
