import json

import pytest
import torch
from torch import nn

from kron_hf import KronLinear, block_summary, kron_summary
from kron_hf.summary.table import HEADER


def two_linears():
    """6 x 8 and 10 x 6 (out, in), with a bias on the first."""
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 10, bias=False))


def sizes(model, first=(2, 4), second=(5, 3)):
    return {"fc1": (model[0], first), "fc2": (model[2], second)}


def test_counts_by_hand():
    model = nn.Sequential(*two_linears(), nn.LayerNorm(10))
    with torch.no_grad():
        model[0].weight[:2, :4] = 0.0
        model[0].weight[4:, 4:] = -0.0
        model[2].weight[5:, 3:] = 0.0
    summary = block_summary(model, sizes(model))
    first, second = summary.layers
    assert (first.name, first.block_size, first.rank) == ("fc1", (2, 4), None)
    assert (first.sparsity, first.nonzeros) == (2 / 6, 48 - 16 + 6)
    assert (second.sparsity, second.nonzeros) == (1 / 4, 60 - 15)
    assert (first.trained_params, first.deployed_params, first.dense_params) == (54, 54, 54)
    assert (first.forward_flops, first.training_flops, first.ideal_forward_flops) == (96, 288, 64)
    assert (first.dense_forward_flops, first.dense_training_flops) == (96, 288)
    assert summary.sparsity == (16 + 15) / (48 + 60)
    assert summary.nonzeros == 38 + 45 + 20
    assert summary.trained_params == summary.deployed_params == summary.dense_params == 54 + 60 + 20


@pytest.mark.parametrize("value", [-1e-30, 1e-30, float("nan"), float("inf")])
def test_one_entry_that_is_not_zero_keeps_its_block_alive(value):
    linear = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[1, 2] = value
    summary = block_summary(linear, {"fc": (linear, 2)})
    assert (summary.sparsity, summary.nonzeros) == (3 / 4, 4)


def test_zeros_that_fill_no_block_are_not_counted():
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[1::2] = 0.0
    summary = block_summary(linear, {"fc": (linear, 2)})
    assert (summary.sparsity, summary.nonzeros) == (0.0, 72)


def test_frozen_entries_are_not_trained():
    model = two_linears()
    model[0].weight.requires_grad_(False)
    summary = block_summary(model, sizes(model))
    assert (summary.trained_params, summary.nonzeros) == (6 + 60, 6 + 48 + 60)
    assert summary.layers[0].trained_params == 6


def test_both_meters_agree_on_one_weight():
    layer = KronLinear(24, 16, (4, 8), rank=2)
    layer.freeze_mask(torch.rand(4, 3) < 0.5)
    linear = layer.to_linear()
    kron, dense = kron_summary(layer).layers[0], block_summary(linear, {"fc": (linear, (4, 8))}).layers[0]
    living = int(layer.block_mask.sum())
    assert 0 < living < 12
    assert dense.sparsity == kron.sparsity == (12 - living) / 12
    assert dense.nonzeros == living * 32 + 16
    assert kron.nonzeros == living * 3 + 64 + 16
    same = ("block_size", "dense_params", "dense_forward_flops", "dense_training_flops")
    assert [getattr(dense, field) for field in same] == [getattr(kron, field) for field in same]


def test_table_and_dictionary():
    model = two_linears()
    summary = block_summary(model, sizes(model))
    lines = str(summary).splitlines()
    assert lines[0].split() == " ".join(HEADER).split()  # the columns of kron_summary
    assert [line.split()[0] for line in lines[2:4]] == ["fc1", "fc2"]
    assert lines[-1] == (
        "block-sparse layers, of dense: trained 1.000, nonzeros 1.000, deployed 1.000, FLOPs 1.000 (if zero blocks "
        "were skipped: 1.000; no kernel does)"
    )
    assert json.loads(json.dumps(summary.to_dict()))["layers"][1]["nonzeros"] == 60


def test_meta_device_has_counts_but_no_values():
    with torch.device("meta"):
        model = two_linears()
    summary = block_summary(model, sizes(model))
    assert summary.sparsity is summary.nonzeros is summary.converted.ideal_forward_flops is None
    assert summary.trained_params == 114


def test_shared_parameters_count_once():
    model = two_linears()
    tied = nn.Linear(6, 10, bias=False)
    tied.weight = model[2].weight
    model.append(tied)
    summary = block_summary(model, sizes(model))
    assert summary.trained_params == summary.nonzeros == 114


def other(model):
    return {"fc1": (nn.Linear(8, 6), 2)}


def twice(model):
    return {"fc1": (model[0], 2), "again\n": (model[0], 2)}


def converted(model):
    return {"fc1": (KronLinear(8, 8, 4, 1), 2)}


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        pytest.param(other, ValueError, r"'fc1' is given a layer that does not belong to the model", id="not in it"),
        pytest.param(twice, ValueError, r"'again\\n' is the layer that is named 'fc1', too", id="twice"),
        pytest.param(converted, TypeError, r"'fc1' must be an nn.Linear, got a KronLinear", id="converted"),
        pytest.param(lambda model: sizes(model, first=5), ValueError, r"fc1: block_size \(5, 5\) does not", id="size"),
        pytest.param(lambda model: sizes(model, second=16), ValueError, r"fc2: block_size \(16, 16\)", id="larger"),
    ],
)
def test_bad_layers(layers, error, message):
    model = two_linears()
    with pytest.raises(error, match=message):
        block_summary(model, layers(model))
