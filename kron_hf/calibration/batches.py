"""Calibration data, read again for every pass: the same batches in the same order each time."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from kron_hf.calibration.random_numbers import same_random_numbers

__all__ = [
    "Batch",
    "Batches",
    "SpreadBatches",
    "example_count",
    "few_examples",
    "is_label",
    "real_tokens",
    "split_examples",
]

Batch = dict[str, Any]
FEW = 4  # examples that show where a model's tokens go
SEQUENCES = {"input_values", "input_features", "inputs_embeds"}  # `[examples, length, features]`: not those of an image


class Batches:
    """Batches of a model's inputs, to be iterated any number of times, with the same random numbers each time.

    The global random states of torch and Python are set for the time that a batch is read, and put back, so that a
    shuffled loader, or one with random augmentation, gives the same batches in every pass.

    Args:
        data: A `DataLoader`, a list or other re-iterable of batches, or a data set of single examples, also a list of
            them: of images with three dimensions, of texts with one. A batch is a mapping of the model's arguments, or
            a tensor for its first argument (of a tuple, the first entry).
        collate: Makes a batch of a list of examples.
        prepare: Completes a batch, before its labels are left out.
        batch_size: Examples a batch, if `data` is a data set.
        seed: Of the random numbers.
        device: Where batches go; None leaves them.
        dtype: What their floating point tensors become; None leaves them.

    Raises:
        TypeError: `data` can be read only once, as a generator.
        ValueError: There is no batch in it.
    """

    def __init__(
        self,
        data: Any,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        prepare: Callable[[Batch], Batch] | None = None,
        batch_size: int = 32,
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(data, Tensor | str | bytes | Mapping) or not (
            isinstance(data, Iterable) or hasattr(data, "__getitem__")
        ):
            raise TypeError(
                "calibration_data must be a DataLoader, a data set or a list of batches, got "
                f"{type(data).__name__}{_advice(data)}"
            )
        if isinstance(data, Iterator):
            raise TypeError(
                f"calibration_data is read several times, which a {type(data).__name__} does not allow: pass a list, "
                "a data set or a DataLoader"
            )
        self._loader: Iterable[Any] = data
        if not isinstance(data, DataLoader) and _holds_examples(data):
            examples: Any = data
            self._loader = DataLoader(examples, batch_size=batch_size, shuffle=False, collate_fn=collate)
        self._seed, self._device, self._dtype = seed, device, dtype
        self._prepare = prepare or _as_it_is
        self._sums: list[float] = []
        self._length: int | None = None  # once a pass has come to its end
        if next(iter(self), None) is None:
            raise ValueError("calibration_data is empty: it holds no batch")

    def __iter__(self) -> Iterator[Batch]:
        """One pass.

        Raises:
            ValueError: A batch differs from that of the first pass.
        """
        with same_random_numbers(self._seed):
            source = iter(self._loader)
        for index in range(2**63):
            with same_random_numbers(self._seed + 1 + index):
                found = next(source, None)
            if found is None:
                self._check_end(index)
                return
            batch = _without_labels(self._prepare(_as_batch(found)))
            if not example_count(batch):
                raise ValueError(f"batch {index} of calibration_data holds no example")
            self._check_same(index, batch)
            yield self._moved(batch)

    def __len__(self) -> int:
        """Number of batches; takes a pass if the source does not know it."""
        if self._length is None and isinstance(self._loader, Sized):
            with suppress(TypeError):  # a DataLoader over an iterable data set has a length and does not know it
                return len(self._loader)
        return sum(1 for _ in self) if self._length is None else self._length

    def _check_same(self, index: int, batch: Batch) -> None:
        total = sum(float(v.cpu().double().sum()) for v in batch.values() if isinstance(v, Tensor))
        if index == len(self._sums):
            self._sums.append(total)
        elif total != self._sums[index] and total == total:
            raise ValueError(
                f"calibration_data gave another batch {index} than before: every pass must read the same batches in "
                "the same order. Pass shuffle=False and no random augmentation, or a list of batches"
            )

    def _check_end(self, count: int) -> None:
        known = self._length or len(self._sums)
        if count < len(self._sums) or self._length not in (None, count):
            raise ValueError(
                f"calibration_data gave {count} batches in one pass and {known} in another, as a data set over a "
                "generator does: every pass must read the same batches. Pass a list of them"
            )
        self._length = count

    def _moved(self, batch: Batch) -> Batch:
        return {name: self._move(value) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _move(self, value: Tensor) -> Tensor:
        value = value.clone() if value.is_inference() else value  # autograd cannot keep it
        return value.to(device=self._device, dtype=self._dtype if value.is_floating_point() else None)


class SpreadBatches:
    """Some of the batches, evenly spread, that hold about so many examples; all, where there are no more.

    Data may be sorted, so that the first examples would be all of one kind.
    """

    def __init__(self, batches: Batches, examples: int) -> None:
        self._batches = batches
        self._share = examples / (len(batches) * example_count(next(iter(batches))))

    def __iter__(self) -> Iterator[Batch]:
        """One pass."""
        for index, batch in enumerate(self._batches):
            if math.ceil((index + 1) * self._share) > math.ceil(index * self._share) or self._share >= 1:
                yield batch


def example_count(batch: Batch) -> int:
    """Examples of a batch: the length of its first tensor."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)


def few_examples(batch: Batch) -> Batch:
    """The first examples of a batch; all, where its tensors differ in length and it is not clear what is an example."""
    return next(split_examples(batch, FEW))


def split_examples(batch: Batch, count: int) -> Iterator[Batch]:
    """So many examples of a batch at a time; all, where its tensors differ in length."""
    lengths = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim}
    if len(lengths) != 1:
        yield batch
        return
    (length,) = lengths
    for start in range(0, max(length, 1), count):
        part = slice(start, start + count)
        yield {name: value[part] if _has_length(value, length) else value for name, value in batch.items()}


def _has_length(value: Any, length: int) -> bool:
    return isinstance(value, Tensor | list | tuple) and getattr(value, "ndim", 1) > 0 and len(value) == length


def real_tokens(batch: Batch, shape: Sequence[int], mask: str = "attention_mask") -> Tensor | None:
    """Which tokens `[examples, tokens]` are no padding, as 0 and 1; None if the batch has no mask of that shape."""
    found = batch.get(mask)
    return found if isinstance(found, Tensor) and found.shape == tuple(shape) else None


def is_label(name: str) -> bool:
    """Whether an entry of a batch is what Trainer would take for labels."""
    return "label" in name


def _without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if not is_label(name)}


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _holds_examples(data: Any) -> bool:
    """Whether it is a data set of single examples and not a sequence of batches; a list may be either."""
    if not isinstance(data, list | tuple):
        return isinstance(data, IterableDataset) or (hasattr(data, "__getitem__") and isinstance(data, Sized))
    first = data[0] if data else None
    first = first[0] if isinstance(first, tuple | list) and first else first
    if isinstance(first, Mapping):
        return _is_example(first)
    return first is not None and (not isinstance(first, Tensor) or first.ndim in (1, 3))


def _is_example(entries: Mapping[Any, Any]) -> bool:
    """Whether the entries are those of one example: without arrays, of a text, or of an image."""
    arrays = {
        str(name): value
        for name, value in entries.items()
        if not is_label(str(name)) and isinstance(value, Tensor | np.ndarray) and value.ndim
    }
    if not arrays:
        return True
    name, first = next(iter(arrays.items()))
    # Of three dimensions are images, too; not where several arrays agree on how many examples there are.
    image = first.ndim == 3 and name not in SEQUENCES
    return first.ndim == 1 or (image and not (len(arrays) > 1 and len(set(map(len, arrays.values()))) == 1))


def _advice(data: Any) -> str:
    if isinstance(data, Mapping) and any(hasattr(value, "column_names") for value in data.values()):
        return "; pass one of its data sets"
    return "; if it is a batch, pass [batch]" if isinstance(data, Tensor | Mapping) else ""


def _as_batch(found: Any) -> Batch:
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if isinstance(found, Tensor | np.ndarray):
        return {"": _tensor(found)}
    if isinstance(found, Mapping):
        return {str(name): _tensor(value) for name, value in found.items()}
    raise TypeError(f"a batch of calibration_data must be a mapping or a tensor, got {type(found).__name__}")


def _tensor(value: Any) -> Any:
    """An array of numbers as a tensor, anything else as it is."""
    return torch.as_tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value
