"""Damaged states of a Sparsifier in trainer_state.json: each is loaded as it is, or refused with a ValueError."""

import copy
import json
import random

import pytest
import torch
from fuzz_bytes import random_value, with_random_value
from torch import nn
from transformers import TrainerState

from kron_hf import KronLinear, Sparsifier, SparsityCallback

METHODS = {
    "target": {"target_sparsity": 0.5},
    "straight-through": {"target_sparsity": 0.5, "regrowth": "straight_through"},
    "l1": {"l1": 1.0},
}


def sparsifier(method="target", steps=0):
    model = nn.Sequential(KronLinear(16, 16, 4, 1), KronLinear(16, 32, 4, 1))
    model[0].s.data[0, 0] = 0.0
    model[0].freeze_mask()
    made = Sparsifier(model, **METHODS[method], total_steps=40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        made.step(optimizer)
    return made


def refusal(state, method="target") -> str:
    """Why a fresh Sparsifier refuses a state; empty if it takes it."""
    try:
        sparsifier(method).load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("method", METHODS)
def test_random_values_anywhere(method):
    intact = json.loads(json.dumps(sparsifier(method, steps=12).state_dict()))
    assert bool(intact["method"]) == (method != "target")
    assert not refusal(intact, method)
    messages = []
    for seed in range(400):
        state = copy.deepcopy(intact)
        with_random_value(state, random.Random(seed))
        messages.append(refusal(state, method))
    assert 200 < sum(map(bool, messages)) < 400
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
        ({"method": "x"}, "method must be a mapping"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_messages(change, message):
    target = sparsifier()
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(target.state_dict() | change)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"references": 1.0, "kept": [0, 0]}, "references and kept must be lists of the same length"),
        ({"references": [1.0, 1.0], "kept": "00"}, "references and kept must be lists of the same length"),
        ({"references": None, "kept": [0, 0]}, "references and kept must be lists of the same length"),
        ({"references": [1.0], "kept": [0]}, "references of 1 layers, this model has 2"),
        ({"references": [1.0, float("nan")], "kept": [0, 0]}, "references must be finite floats"),
        ({"references": [1.0, "1"], "kept": [0, 0]}, "references must be finite floats"),
        ({"references": [1.0, -1.0], "kept": [0, 0]}, "references must be finite floats"),
        ({"references": [1.0, 1.0], "kept": [0, 32]}, "kept must name one of the 32 blocks"),
        ({"references": [1.0, 1.0], "kept": [-1, 0]}, "kept must name one of the 16 blocks"),
        ({"references": [1.0, 1.0], "kept": [True, 0]}, "kept must name one of the 16 blocks"),
    ],
)
def test_messages_about_l1(method, message):
    target = sparsifier("l1")
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(target.state_dict() | {"method": method})


@pytest.mark.parametrize("saved", [{"attributes": None}, {}, 1, "x", {"attributes": [1]}], ids=str)
def test_damaged_callback_states(saved):
    state = TrainerState(stateful_callbacks={"SparsityCallback": saved}, global_step=3, max_steps=40)
    with pytest.raises(ValueError, match=r"trainer_state\.json: the state of SparsityCallback is malformed"):
        SparsityCallback(target_sparsity=0.5).saved_attributes(state)
