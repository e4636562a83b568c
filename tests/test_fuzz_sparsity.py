"""Damaged states of a Sparsifier in trainer_state.json: each is loaded as it is, or refused with a ValueError."""

import copy
import json
import random

import pytest
from fuzz_bytes import random_value, with_random_value
from torch import nn
from transformers import TrainerState

from kron_hf import KronLinear, Sparsifier, SparsityCallback


def sparsifier():
    model = nn.Sequential(KronLinear(16, 16, 4, 1), KronLinear(16, 32, 4, 1))
    model[0].s.data[0, 0] = 0.0
    model[0].freeze_mask()
    return Sparsifier(model, target_sparsity=0.5, total_steps=40)


def refusal(state) -> str:
    """Why a fresh Sparsifier refuses a state; empty if it takes it."""
    try:
        sparsifier().load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


def test_random_values_anywhere():
    intact = json.loads(json.dumps(sparsifier().state_dict()))
    assert not refusal(intact)
    messages = []
    for seed in range(600):
        state = copy.deepcopy(intact)
        with_random_value(state, random.Random(seed))
        messages.append(refusal(state))
    assert 300 < sum(map(bool, messages)) < 600
    assert all(message.isprintable() and len(message) < 500 for message in messages)


def test_other_values_than_dicts():
    assert all(refusal(random_value(random.Random(seed))) for seed in range(100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial_dead": "AQ=="}, "initial_dead must be a list"),
        ({"initial_dead": [1, None]}, "initial_dead must be a list"),
        ({"initial_dead": ["A", None]}, r"a mask in initial_dead is not base64"),
        ({"initial_dead": ["é===", None]}, r"a mask in initial_dead is not base64"),
        ({"initial_dead": ["AQ==", None]}, "a mask of 1 bytes for a layer of 16 blocks"),
        ({"initial_dead": [None]}, "of 1 Kronecker layers, this model has 2"),
        ({"step_count": -1}, "step_count must be a count"),
        ({"step_count": True}, "step_count must be a count"),
        ({"step_count": "7"}, "step_count must be a count"),
        ({"frozen": "no"}, "frozen a bool"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_messages(change, message):
    target = sparsifier()
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(target.state_dict() | change)


@pytest.mark.parametrize("saved", [{"attributes": None}, {}, 1, "x", {"attributes": [1]}], ids=str)
def test_damaged_callback_states(saved):
    state = TrainerState(stateful_callbacks={"SparsityCallback": saved}, global_step=3, max_steps=40)
    with pytest.raises(ValueError, match=r"trainer_state\.json: the state of SparsityCallback is malformed"):
        SparsityCallback(target_sparsity=0.5)._saved_state(state)
