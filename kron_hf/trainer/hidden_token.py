"""A token that cannot be written to a file by accident."""

from typing import Any

__all__ = ["HiddenToken"]


class HiddenToken(str):
    """A token that pickles as a placeholder: Trainer saves its arguments beside the model and pushes them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("<HUB_TOKEN>",)

    def __copy__(self) -> "HiddenToken":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "HiddenToken":
        return self
