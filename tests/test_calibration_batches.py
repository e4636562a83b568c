"""Calibration data is read again and again: the same batches each time."""

import random

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from kron_hf.calibration.batches import Batches


class Noisy(Dataset):
    """Examples with augmentation."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"pixel_values": torch.rand(1, 4, 4) + random.random(), "labels": index}


def read(batches):
    return torch.cat([batch["pixel_values"] for batch in batches])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shuffled_loader_with_augmentation_repeats_itself_and_leaves_the_random_states(workers):
    batches = Batches(DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers))
    state, python_state = torch.get_rng_state(), random.getstate()
    first, second = read(batches), read(batches)
    assert torch.equal(first, second)
    assert len(first) == 10
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    other = Batches(DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers), seed=1)
    assert not torch.equal(read(other), first)


def test_examples_of_a_data_set_are_collated_and_batches_are_taken_as_they_are():
    examples = [{"pixel_values": torch.full((1, 2, 2), float(i)), "labels": i} for i in range(5)]
    batches = Batches(examples, batch_size=2)
    assert [batch["pixel_values"].shape[0] for batch in batches] == [2, 2, 1]
    assert all(list(batch) == ["pixel_values"] for batch in batches)
    ready = [{"pixel_values": torch.zeros(3, 1, 2, 2)}]
    assert [batch["pixel_values"].shape[0] for batch in Batches(ready)] == [3]
    pairs = [(torch.zeros(3, 7), torch.zeros(3))]
    assert [batch[""].shape for batch in Batches(pairs)] == [(3, 7)]


def test_floating_point_inputs_take_the_dtype_and_others_keep_theirs():
    ready = [{"pixel_values": torch.zeros(1, 1, 2, 2), "input_ids": torch.zeros(1, 2, dtype=torch.long)}]
    (batch,) = Batches(ready, dtype=torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["input_ids"].dtype == torch.long


class Changing:
    """Another pass, other batches."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        yield {"pixel_values": torch.full((2, 1, 2, 2), float(self.passes))}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        pytest.param([], ValueError, "calibration_data is empty", id="empty"),
        pytest.param(iter([{}]), TypeError, "read several times, which a list_iterator", id="iterator"),
        pytest.param(torch.zeros(3, 1, 2, 2), TypeError, "a data set or a list of batches, got Tensor", id="tensor"),
        pytest.param(7, TypeError, "got int", id="number"),
        pytest.param([3, 4], TypeError, "a batch of calibration_data must be a mapping or a tensor", id="numbers"),
    ],
)
def test_bad_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        Batches(data, collate=lambda examples: examples[0])


def test_data_that_changes_from_pass_to_pass_is_refused():
    batches = Batches(Changing())
    with pytest.raises(ValueError, match=r"gave another batch 0 than before.*shuffle=False"):
        next(iter(batches))
