"""Which tokens a model reads out."""

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kron_hf.calibration.batches import Batch
from kron_hf.calibration.passes import first_tensor, hooked, run
from kron_hf.calibration.route import Route

__all__ = ["reads_first_token_alone", "reads_out_first_token", "token_count"]


def reads_out_first_token(model: nn.Module, route: Route, batch: Batch, readout: str | None) -> bool:
    """Whether the features are those of the first token alone: as `readout` says ("cls", "all"), or as the model shows.

    Raises:
        ValueError: "cls", and the blocks give no `[batch, tokens, features]`.
    """
    if readout is None:
        return reads_first_token_alone(model, route, batch)
    if readout == "cls" and token_count(model, route, batch) is None:
        raise ValueError("readout='cls' needs a model whose blocks give [batch, tokens, features]")
    return readout == "cls"


def reads_first_token_alone(model: nn.Module, route: Route, batch: Batch) -> bool:
    """Whether the model's output stays when all tokens but the first change after its last block, and only then."""
    last = model.get_submodule(route.blocks[-1].name)
    outputs = [first_tensor(run(model, batch))]
    for change in (_change_others, _change_first):
        with hooked(after={last: partial(_changed, change)}):
            outputs.append(first_tensor(run(model, batch)))
    plain, without_others, without_first = outputs
    if plain is None or without_others is None or without_first is None:
        return False
    return torch.equal(plain, without_others) and not torch.equal(plain, without_first)


def token_count(model: nn.Module, route: Route, batch: Batch) -> int | None:
    """Tokens of an example after the last block; None if its output is no `[batch, tokens, features]`."""
    counts: list[int | None] = []

    def see(output: Any) -> None:
        tensor = first_tensor(output)
        counts.append(tensor.shape[1] if tensor is not None and tensor.ndim == 3 else None)

    with hooked(after={model.get_submodule(route.blocks[-1].name): see}):
        run(model, batch)
    return counts[0] if counts else None


def _changed(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """An output whose first tensor holds other values."""
    if isinstance(output, Tensor):
        return change(output) if output.ndim == 3 else _other(output)
    if isinstance(output, Mapping) and output:
        changed: Any = copy(output)
        first = next(iter(changed))
        changed[first] = _changed(change, changed[first])
        return changed
    if isinstance(output, tuple | list) and output:
        return type(output)([_changed(change, output[0]), *output[1:]])
    return output


def _change_others(tokens: Tensor) -> Tensor:
    return torch.cat((tokens[:, :1], _other(tokens[:, 1:])), 1)


def _change_first(tokens: Tensor) -> Tensor:
    return torch.cat((_other(tokens[:, :1]), tokens[:, 1:]), 1)


def _other(values: Tensor) -> Tensor:
    return values.flip(-1) * 2 + 1
