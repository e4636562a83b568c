"""Which linears of an encoder-decoder model read the decoder's tokens, whose padding has a mask of its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kron_hf.calibration.batches import Batch
from kron_hf.calibration.passes import hooked, run
from kron_hf.calibration.route import Route

__all__ = ["DECODER_INPUTS", "DECODER_MASK", "decoder_stages"]

DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
DECODER_MASK = "decoder_attention_mask"


def decoder_stages(model: nn.Module, route: Route, batch: Batch) -> set[str]:
    """The first names of the stages that see another number of rows when the decoder gets another number of tokens.

    Keys and values of cross attention are not among them: they read the encoder's tokens.

    Args:
        model: The model, in evaluation mode.
        route: Where its linears are.
        batch: A few examples are enough; without inputs of the decoder nothing is found.
    """
    tokens = next((batch[name] for name in DECODER_INPUTS if name in batch), None)
    if tokens is None:
        return set()
    names = [stage[0] for block in route.blocks for stage in block.stages]
    rows, others = (_rows(model, names, each) for each in (batch, batch | _of_other_length(batch, tokens)))
    return {name for name in names if rows[name] != others[name]}


def _of_other_length(batch: Batch, tokens: Tensor) -> Batch:
    """One token less; one more where there is but one."""
    own = {
        name: value
        for name, value in batch.items()
        if name.startswith("decoder_") and isinstance(value, Tensor) and value.shape[:2] == tokens.shape[:2]
    }
    if tokens.shape[1] > 1:
        return {name: value[:, :-1] for name, value in own.items()}
    return {name: torch.cat((value, value), 1) for name, value in own.items()}


def _rows(model: nn.Module, names: list[str], batch: Batch) -> dict[str, int]:
    rows: dict[str, int] = {}

    def see(name: str) -> Callable[[Tensor], None]:
        return lambda x: rows.update({name: x.shape[:-1].numel()})

    with hooked(before={model.get_submodule(name): see(name) for name in names}):
        run(model, batch)
    return rows
