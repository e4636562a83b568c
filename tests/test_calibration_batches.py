"""Calibration data is read again and again: the same batches each time."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kron_hf.calibration.batches import Batches, example_count, few_examples


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
        pytest.param(
            {"train": SimpleNamespace(column_names=[])}, TypeError, "dict; pass one of its data sets", id="splits"
        ),
        pytest.param([torch.zeros(2, 7), torch.zeros(0, 7)], ValueError, "batch 1 of .* no example", id="empty batch"),
        pytest.param([3, 4], TypeError, "a batch of calibration_data must be a mapping or a tensor", id="numbers"),
    ],
)
def test_bad_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        list(Batches(data, collate=lambda examples: examples[0]))


def test_data_that_changes_from_pass_to_pass_is_refused():
    batches = Batches(Changing())
    with pytest.raises(ValueError, match=r"gave another batch 0 than before.*shuffle=False"):
        next(iter(batches))


class Stream(IterableDataset):
    """Examples of a source that can be read once, or again and again."""

    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return iter(self.source)


EXAMPLES = [{"pixel_values": torch.full((1, 2, 2), float(i)), "labels": i} for i in range(5)]


def test_a_stream_of_examples_is_collated():
    assert [batch["pixel_values"].shape[0] for batch in Batches(Stream(EXAMPLES), batch_size=2)] == [2, 2, 1]


def test_a_source_that_is_used_up_is_refused():
    with pytest.raises(ValueError, match=r"calibration_data gave 0 batches in one pass and 1 in another.*generator"):
        list(Batches(DataLoader(Stream(iter(EXAMPLES[:2])), batch_size=2)))


def test_a_data_set_holds_examples_of_any_shape():
    class Videos(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"pixel_values": torch.zeros(2, 1, 4, 4)}

    assert [batch["pixel_values"].shape for batch in Batches(Videos(), batch_size=3)] == [(3, 2, 1, 4, 4)]


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param({"input_values": torch.zeros(2, 8, 4)}, id="spectrograms"),
        pytest.param({"input_features": torch.zeros(2, 8, 4)}, id="features of sound"),
        pytest.param({"inputs_embeds": torch.zeros(2, 8, 4)}, id="embeddings"),
        pytest.param({"pixel_values": torch.zeros(2, 8, 4), "spatial_shapes": torch.ones(2, 2)}, id="patches"),
    ],
)
def test_a_list_of_batches_of_sequences_is_one_of_batches(batch):
    (found,) = Batches([batch])
    assert [value.shape for value in found.values()] == [value.shape for value in batch.values()]


def test_an_image_with_a_mask_of_its_pixels_is_an_example():
    example = {"pixel_values": torch.zeros(3, 8, 4), "pixel_mask": torch.ones(8, 4), "labels": torch.zeros(3)}
    (found,) = Batches([example] * 2)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "pixel_values": (2, 3, 8, 4),
        "pixel_mask": (2, 8, 4),
    }


def test_arrays_are_taken_as_tensors():
    (batch,) = Batches([{"pixel_values": np.ones((2, 1, 4, 4), np.float32), "names": np.array(["a", "b"])}])
    assert torch.equal(batch["pixel_values"], torch.ones(2, 1, 4, 4))
    assert list(batch["names"]) == ["a", "b"]
    (batch,) = Batches([{"pixel_values": np.ones((1, 4, 4), np.float32)}] * 3)
    assert batch["pixel_values"].shape == (3, 1, 4, 4)


def test_few_examples_are_taken_where_all_tensors_agree_on_what_one_is():
    batch = {"pixel_values": torch.zeros(9, 1, 2, 2), "captions": list("abcdefghi"), "scale": torch.tensor(2.0)}
    few = few_examples(batch)
    assert few["pixel_values"].shape[0] == len(few["captions"]) == 4
    assert few["scale"] == 2
    assert example_count({"scale": torch.tensor(2.0), **batch}) == 9
    patches = {"input_ids": torch.zeros(2, 7), "pixel_values": torch.zeros(30, 12)}
    assert few_examples(patches) is patches


def test_a_single_batch_is_to_be_put_into_a_list():
    with pytest.raises(TypeError, match=r"got dict; if it is a batch, pass \[batch\]"):
        Batches({"pixel_values": torch.zeros(3, 1, 2, 2)})


def test_a_loader_that_does_not_know_its_length_is_counted():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.arange(10.0)[:, None])

    assert len(Batches(DataLoader(Stream(), batch_size=4))) == 3
