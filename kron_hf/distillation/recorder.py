"""Gets the final tokens and the hidden states out of a model, through its outputs.

Hooks on the model ask for `hidden_states` and append the final tokens, which a model with a head does not return. They
travel through the outputs, so DDP and FSDP see them; `take` removes them again, and so they reach no prediction.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from kron_hf.distillation.states import States, as_tokens, has_class_token, softmax_logits

__all__ = ["Recorder"]


class Recorder:
    """The hooks on one model, which do nothing unless recording.

    They are there from the beginning, because a compiled model does not see hooks that come later.

    Args:
        model: The model as it was built, not wrapped by DDP.
        hidden: Whether to ask for the hidden states.
    """

    def __init__(self, model: nn.Module, hidden: bool) -> None:
        self.model, self.on, self.keep_inputs = model, False, False
        self.inputs: dict[str, Any] | None = None  # of the last call, until they are taken
        self._signature = inspect.signature(model.forward)
        self._hidden = hidden and _accepts(self._signature, "output_hidden_states") and hasattr(model, "config")
        self._tokens: Tensor | None = None  # between the hooks of one forward
        self._asked = self._appended = False
        base = _base_model(model)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        if base is not model:
            self._handles.insert(0, base.register_forward_hook(self._after_base))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @property
    def is_there(self) -> bool:
        """Whether the hooks have not been removed."""
        return bool(self._handles)

    def remove(self) -> None:
        """Removes the hooks."""
        while self._handles:
            self._handles.pop().remove()
        self.on, self.inputs, self._tokens = False, None, None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within, the outputs of the model carry what `take` wants."""
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on, self._tokens = before, None

    def take(self, outputs: Any) -> States:
        """The states in the outputs of a forward that was recorded; leaves the outputs as without recording.

        Raises:
            TypeError: The outputs are no dictionary.
        """
        if not isinstance(outputs, Mapping):
            raise TypeError(
                f"{type(self.model).__name__} must return a ModelOutput or a dict to be distilled, got "
                f"{type(outputs).__name__}; leave return_dict on"
            )
        hidden, tokens = list(outputs.get("hidden_states") or ()), outputs.get("last_hidden_state")
        if self._appended:
            tokens = hidden.pop()
        if tokens is None and hidden:
            tokens = hidden[-1]
        self._clean(outputs, tuple(hidden))
        return States(
            model=type(self.model).__name__,
            logits=softmax_logits(self.model, outputs.get("logits")),
            tokens=None if tokens is None else as_tokens(tokens),
            hidden=tuple(as_tokens(each) for each in hidden) or None,
            class_token=has_class_token(self.model, tokens),
            decoded=bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)),
        )

    def _clean(self, outputs: Any, hidden: tuple[Tensor, ...]) -> None:
        if self._asked:
            outputs["hidden_states"] = hidden
            return
        for name in [name for name in outputs if name.endswith("hidden_states")]:
            if isinstance(outputs, OrderedDict):  # a ModelOutput, which forbids `del`
                OrderedDict.__delitem__(outputs, name)
                setattr(outputs, name, None)
            else:
                del outputs[name]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.on:
            return None
        if self.keep_inputs:
            self.inputs = _named(self._signature, args, kwargs)
        config = getattr(module, "config", None)
        self._asked = bool(kwargs.get("output_hidden_states", getattr(config, "output_hidden_states", False)))
        return args, {**kwargs, "output_hidden_states": True} if self._hidden else kwargs

    def _after_base(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if self.on and isinstance(outputs, Mapping):
            self._tokens = outputs.get("last_hidden_state")

    def _after(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if not self.on or not isinstance(outputs, Mapping):
            return
        tokens, self._tokens = self._tokens, None
        self._appended = tokens is not None and "last_hidden_state" not in outputs and _has_hidden_states(outputs)
        if self._appended:
            outputs["hidden_states"] = (*(outputs.get("hidden_states") or ()), tokens)  # type: ignore[index]


def _base_model(model: nn.Module) -> nn.Module:
    """The body below the heads and adapters."""
    seen = model
    while isinstance(base := getattr(seen, "base_model", None), nn.Module) and base is not seen:
        seen = base
    return seen


def _accepts(signature: inspect.Signature, name: str) -> bool:
    parameters = signature.parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    positional = signature.bind_partial(*args).arguments
    return {**positional, **kwargs}


def _has_hidden_states(outputs: Mapping[str, Any]) -> bool:
    """DDP takes a ModelOutput apart and builds it again, from its fields."""
    return is_dataclass(outputs) and any(each.name == "hidden_states" for each in fields(outputs))
