"""Which tokens a model reads out."""

from typing import Any

import torch
from torch import Tensor, nn

from kron_hf.calibration.batches import Batch
from kron_hf.calibration.passes import first_tensor, hooked, run
from kron_hf.calibration.route import Route

__all__ = ["reads_first_token_alone", "token_count"]


def reads_first_token_alone(model: nn.Module, route: Route, batch: Batch) -> bool:
    """Whether the model's output stays when all tokens but the first change after its last block."""
    last = model.get_submodule(route.blocks[-1].name)
    plain = first_tensor(run(model, batch))
    with hooked(after={last: _shuffled}):
        moved = first_tensor(run(model, batch))
    return plain is not None and moved is not None and torch.equal(plain, moved)


def token_count(model: nn.Module, route: Route, batch: Batch) -> int | None:
    """Tokens of an example after the last block; None if its output is no `[batch, tokens, features]`."""
    counts: list[int | None] = []

    def see(output: Any) -> None:
        tensor = first_tensor(output)
        counts.append(tensor.shape[1] if tensor is not None and tensor.ndim == 3 else None)

    with hooked(after={model.get_submodule(route.blocks[-1].name): see}):
        run(model, batch)
    return counts[0]


def _shuffled(output: Any) -> Any:
    """The output with other values in all tokens but the first."""
    if isinstance(output, Tensor):
        if output.ndim != 3:
            return output * 2 + 1
        return torch.cat((output[:, :1], output[:, 1:].flip(-1) * 2 + 1), 1)
    if isinstance(output, tuple | list) and output:
        return type(output)([_shuffled(output[0]), *output[1:]])
    return output
