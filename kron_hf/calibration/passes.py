"""Runs of a model that stop early, start late, or go through other layers, and leave the model as it was."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kron_hf.calibration.batches import Batch
from kron_hf.calibration.random_numbers import same_random_numbers

__all__ = ["Finish", "all_tensors", "first_tensor", "hooked", "run", "skipped", "swapped"]


class Finish(Exception):  # no error: a hook has seen what the run was for
    """Raised in a hook to end a forward pass."""


def run(model: nn.Module, batch: Batch, *, with_graph: bool = False) -> Any:
    """The model's output for a batch; None if a hook has ended the pass.

    What it draws, as the masks of a masked autoencoder, is the same in every pass. A compiled model runs as it was
    written: hooks and other layers come and go, and each would be compiled anew. `with_graph` is for gradients.
    """
    try:
        with torch.set_grad_enabled(with_graph), same_random_numbers(0), _as_written():
            return model(batch[""]) if "" in batch else model(**batch)
    except Finish:
        return None


def _as_written() -> Any:
    # Importing the compiler takes seconds, and it is there if anything was compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules in the place of those that bear their names, for a while."""
    places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in layers}
    originals = {name: getattr(parent, child) for name, (parent, child) in places.items()}
    try:
        for name, (parent, child) in places.items():
            setattr(parent, child, layers[name])
        yield
    finally:
        for name, (parent, child) in places.items():
            setattr(parent, child, originals[name])


@contextmanager
def skipped(model: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Modules that give back what is given here instead of computing it, for a while."""
    modules = {name: model.get_submodule(name) for name in outputs}
    own = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = _constant(outputs[name])  # an instance attribute: it hides the class's method
        yield
    finally:
        for name, module in modules.items():
            if (before := own[name]) is not None:
                module.forward = before  # as Accelerate's hooks put there
            else:
                module.__dict__.pop("forward", None)


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


@contextmanager
def hooked(
    *,
    before: Mapping[nn.Module, Callable[[Tensor], None]] | None = None,
    after: Mapping[nn.Module, Callable[[Any], Any]] | None = None,
) -> Iterator[None]:
    """Hooks for a while: `before` a module they see its first tensor, `after` it its output, which they may replace."""
    handles = [
        module.register_forward_pre_hook(_seeing_input(see), with_kwargs=True) for module, see in (before or {}).items()
    ]
    handles += [module.register_forward_hook(_seeing_output(see)) for module, see in (after or {}).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seeing_input(see: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = first_tensor((args, kwargs))
        if found is not None:
            see(found)

    return hook


def _seeing_output(see: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda module, args, output: see(output)


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and mappings."""
    return next(_tensors(values), None)


def all_tensors(values: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings, in their order."""
    return list(_tensors(values))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
