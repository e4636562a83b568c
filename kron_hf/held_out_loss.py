"""The held-out loss of a model on a fixed part of a data set, shared out over the processes of a training."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HeldOutLoss", "used_columns"]

LABELS = {"label", "label_ids", "labels"}  # what collators make labels of


class HeldOutLoss:
    """Mean of `model(**batch).loss` over rows that lie evenly over the data set, the same for any number of processes.

    Each process runs its share of the batches; `value` is scaled so that the mean over the processes is the mean over
    the rows. The rows are read once and kept until `clear`, so that what is compared sees the same data, also where
    reading them draws random numbers.

    Args:
        dataset: With `len` and integer indices.
        batches: How many batches.
        batch_size: Rows of a batch.
        collate: Makes a batch, a dict of the model's arguments, of a list of rows.
        columns: The columns to pass to `collate`; None are all.
        processes: How many processes share the batches.
        process: Which of them this is.

    Raises:
        ValueError: The data set is empty.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batches: int,
        batch_size: int,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        columns: set[str] | None = None,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("the evaluation set of the block-size selection is empty")
        self._dataset, self._collate, self._columns = dataset, collate, columns
        self._processes = processes
        rows = min(len(dataset), batches * batch_size)
        at = [number * len(dataset) // rows for number in range(rows)]
        parts = [at[first : first + batch_size] for first in range(0, rows, batch_size)]
        # Under FSDP2 a forward is collective: processes with fewer batches repeat one, which does not count.
        turns = range(process, -(-len(parts) // processes) * processes, processes)
        self._parts = [(parts[min(turn, len(parts) - 1)], turn < len(parts)) for turn in turns]
        self._rows = rows
        self._read: list[Mapping[str, Any]] = []

    def value(self, model: nn.Module, device: torch.device) -> float:
        """This process's part of the loss.

        Raises:
            ValueError: The model gives no loss.
        """
        if not self._read:
            self._read = [self._collate([self._row(index) for index in part]) for part, _ in self._parts]
        total = 0.0
        for batch, (part, counts) in zip(self._read, self._parts, strict=True):
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            output = model(**inputs)
            loss = output.get("loss") if isinstance(output, Mapping) else output[0]
            if loss is None:
                raise ValueError(
                    f"{type(model).__name__} gives no loss on the evaluation set of the block-size selection, whose "
                    f"batches hold {sorted(inputs)}; it needs labels"
                )
            total += float(loss) * len(part) * counts
        return total * self._processes / self._rows

    def clear(self) -> None:
        """Forgets the rows."""
        self._read = []

    def _row(self, index: int) -> Any:
        row = self._dataset[index]
        if self._columns is None or not isinstance(row, Mapping):
            return row
        return {name: value for name, value in row.items() if name in self._columns}


def used_columns(model: nn.Module, label_names: list[str]) -> set[str]:
    """What `Trainer` leaves of a data set under `remove_unused_columns`."""
    return {*inspect.signature(model.forward).parameters, *LABELS, *label_names}
