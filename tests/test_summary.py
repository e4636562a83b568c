import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, KronLinear, get_kron_model
from kron_hf.summary import kron_summary

SHAPES = [
    pytest.param(64, 64, (4, 4), 2, id="square"),
    pytest.param(64, 256, (8, 8), 3, id="expanding"),
    pytest.param(256, 64, (8, 8), 3, id="contracting"),
    pytest.param(48, 96, (4, 16), 2, id="rectangular"),
    pytest.param(48, 96, (1, -1), 4, id="low-rank"),
    pytest.param(48, 96, (-1, 1), 4, id="low-rank-transposed"),
]


def b_first(x, m, b):
    rank, out_blocks, in_blocks = m.shape
    blocks = x.view(len(x), in_blocks, -1) @ b.flatten(0, 1).T  # [N, I, rank * bo]
    z = blocks.view(len(x), in_blocks, rank, -1).permute(2, 1, 0, 3).reshape(rank * in_blocks, -1)  # [rank * I, N * bo]
    return m.permute(1, 0, 2).reshape(out_blocks, -1) @ z


def a_first(x, m, b):
    rank, out_blocks, in_blocks = m.shape
    columns = x.view(len(x), in_blocks, -1).transpose(0, 1).reshape(in_blocks, -1)  # [I, N * bi]
    t = (m.flatten(0, 1) @ columns).view(rank, out_blocks, len(x), -1).permute(1, 2, 0, 3)
    return t.reshape(out_blocks * len(x), -1) @ b.permute(0, 2, 1).flatten(0, 1)


def counted_flops(function, *tensors):
    with FlopCounterMode(display=False) as forward:
        out = function(*tensors)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def tiny_vit():
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def numel(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("in_features", "out_features", "block_size", "rank"), SHAPES)
def test_flops_are_those_of_two_explicit_products(in_features, out_features, block_size, rank):
    layer = KronLinear(in_features, out_features, block_size, rank, bias=False)
    tokens = 5
    x = torch.randn(tokens, in_features, requires_grad=True)
    m = layer.a.detach().requires_grad_()
    b = layer.b.detach().requires_grad_()
    b_out = b_first(x, m, b).view(layer.out_blocks, tokens, -1).transpose(0, 1).reshape(tokens, -1)
    torch.testing.assert_close(b_out, x @ layer.dense_weight().T)
    a_out = a_first(x, m, b).view(layer.out_blocks, tokens, -1).transpose(0, 1).reshape(tokens, -1)
    torch.testing.assert_close(a_out, x @ layer.dense_weight().T)

    forward, training = min(counted_flops(b_first, x, m, b), counted_flops(a_first, x, m, b))
    summary = kron_summary(layer)
    assert (summary.converted.forward_flops * tokens, summary.converted.training_flops * tokens) == (forward, training)

    dense = counted_flops(nn.Linear(in_features, out_features, bias=False), x)
    line = summary.layers[0]
    assert (line.dense_forward_flops * tokens, line.dense_training_flops * tokens) == dense


def test_example_of_the_paper():
    summary = kron_summary(KronLinear(256, 8, block_size=(4, 16), rank=1, bias=False))
    assert (summary.trained_params, summary.deployed_params, summary.dense_params) == (128, 96, 2048)


def test_parameters_are_those_of_the_tensors():
    dense = tiny_vit()
    dense_count, dense_layer = numel(dense), numel(dense.vit.layers[0].mlp.fc1)
    model = get_kron_model(dense, KronConfig(block_size=4, rank=2))
    summary = kron_summary(model)
    assert len(summary.layers) == 12
    assert summary.trained_params == numel(model)
    assert summary.dense_params == dense_count
    masks = [parameter for name, parameter in model.named_parameters() if name.endswith(".s")]
    assert summary.deployed_params == numel(model) - sum(map(torch.numel, masks))
    line = next(line for line in summary.layers if line.name == "vit.layers.0.mlp.fc1")
    assert (line.trained_params, line.dense_params) == (numel(model.vit.layers[0].mlp.fc1), dense_layer)
    assert summary.converted.trained_params == sum(line.trained_params for line in summary.layers)


def test_frozen_parameters_are_not_trained():
    model = nn.Sequential(KronLinear(16, 16, 4, 1), nn.Linear(16, 4))
    model[1].requires_grad_(False)
    summary = kron_summary(model)
    assert summary.trained_params == numel(model[0])
    assert summary.deployed_params == numel(model) - model[0].s.numel()


def test_a_module_used_twice_counts_once():
    layer = KronLinear(16, 16, 4, 1)
    summary = kron_summary(nn.Sequential(layer, nn.ReLU(), layer))
    assert summary.trained_params == numel(layer)
    assert len(summary.layers) == 1


def test_sparsity_is_read_from_exact_zeros_and_weighted_with_entries():
    small, large = KronLinear(8, 8, 4, 1), KronLinear(16, 16, 2, 1)
    with torch.no_grad():
        small.s[0] = 0.0
        large.s[0, :4] = 0.0
        large.s[1, 0] = -1e-30  # negative and tiny, yet not zero
    summary = kron_summary(nn.Sequential(small, large))
    assert [line.sparsity for line in summary.layers] == [2 / 4, 4 / 64]
    assert summary.sparsity == (32 + 16) / (64 + 256)


def test_frozen_mask_counts_where_the_optimizer_moved_a_dead_entry():
    layer = KronLinear(8, 8, 4, 1)
    with torch.no_grad():
        layer.s[0, 0] = 0.0
        layer.freeze_mask()
        layer.s[0, 0] = 1.0
    assert kron_summary(layer).sparsity == 1 / 4


def test_meta_device_has_counts_but_no_sparsity():
    with torch.device("meta"):
        model = get_kron_model(tiny_vit(), KronConfig(block_size=4, rank=2))
    summary = kron_summary(model)
    assert summary.sparsity is None
    assert summary.trained_params == numel(model)
    assert "-" in str(summary).splitlines()[2].split()


def test_model_without_kronecker_layers():
    model = tiny_vit()
    summary = kron_summary(model)
    assert summary.layers == ()
    assert summary.trained_params == summary.deployed_params == summary.dense_params == numel(model)
    assert summary.sparsity == 0.0
    assert "whole model" in str(summary)


def test_to_dict_is_json():
    summary = kron_summary(get_kron_model(tiny_vit(), KronConfig(block_size=(4, 8), rank=2)))
    read = json.loads(json.dumps(summary.to_dict()))
    assert read["layers"][0]["block_size"] == [4, 8]
    assert read["converted"]["dense_params"] == summary.converted.dense_params
    assert read["trained_params"] == summary.trained_params


def test_table_is_aligned():
    lines = str(kron_summary(get_kron_model(tiny_vit(), KronConfig(block_size=4, rank=2)))).splitlines()
    assert len(lines) == 1 + 1 + 12 + 1 + 2
    header, first = lines[0], lines[2]
    for column in ("block", "rank", "sparsity", "trained", "deployed", "dense", "FLOPs/token", "of dense"):
        assert first[header.index(column) + len(column) - 1] != " ", column
    assert "vit.layers.0.attention.q_proj" in first
