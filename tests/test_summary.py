import json
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, KronLinear, get_kron_model
from kron_hf.selection import KronCandidates
from kron_hf.summary import kron_summary
from kron_hf.summary.table import HEADER

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
    layer = KronLinear(256, 8, block_size=(4, 16), rank=1, bias=False)
    summary = kron_summary(layer)
    assert (summary.trained_params, summary.deployed_params, summary.dense_params) == (128, 96, 2048)
    assert summary.nonzeros == 32 + 32 + 64
    dead = torch.zeros(2, 16, dtype=torch.bool)
    dead[0, :8] = True
    layer.freeze_mask(dead)
    summary = kron_summary(layer)
    assert (summary.trained_params, summary.nonzeros, summary.sparsity) == (128, 24 + 24 + 64, 8 / 32)


# A layer of 15 inputs and 21 outputs in 7 x 3 blocks at rank 2: S is 3 x 5, A 2 x 3 x 5, B 2 x 7 x 3.
@pytest.mark.parametrize(
    ("dead", "living", "ideal_flops"),
    [
        pytest.param([], 15, 432, id="none"),  # A first: 2 * 2 * (15 * 3 + 3 * 21); B first takes 840
        pytest.param([(0, 0)], 14, 4 * (14 * 3 + 3 * 21), id="one"),
        pytest.param([(0, column) for column in range(5)], 10, 4 * (10 * 3 + 2 * 21), id="a-row"),
        # A last living column makes B first the cheaper order.
        pytest.param([(row, column) for row in range(3) for column in range(4)], 3, 4 * (21 + 3 * 7), id="columns"),
        pytest.param([(row, column) for row in range(3) for column in range(5)], 0, 0, id="all"),
    ],
)
def test_counts_of_a_rectangular_layer_by_hand(dead, living, ideal_flops):
    layer = KronLinear(15, 21, block_size=(7, 3), rank=2)
    with torch.no_grad():
        for row, column in dead:
            layer.s[row, column] = 0.0
    line = kron_summary(layer).layers[0]
    assert (line.trained_params, line.deployed_params, line.dense_params) == (15 + 30 + 42 + 21, 30 + 42 + 21, 336)
    assert line.nonzeros == 3 * living + (42 if living else 0) + 21
    assert line.sparsity == (15 - living) / 15
    assert (line.forward_flops, line.training_flops) == (432, 1296)
    assert (line.dense_forward_flops, line.dense_training_flops) == (630, 1890)
    assert line.ideal_forward_flops == ideal_flops


def test_nonzeros_follow_the_mask_and_not_the_values():
    layer = KronLinear(8, 8, 4, 1, bias=False)
    with torch.no_grad():
        layer.a.zero_()
        layer.b[0, 0, 0] = 0.0
        layer.s.copy_(torch.tensor([[-1.0, -1e-30], [0.0, -0.0]]))  # negative is not zero, negative zero is
    summary = kron_summary(layer)
    assert (summary.nonzeros, summary.sparsity) == (2 + 2 + 16, 0.5)


def test_nonzeros_of_the_model_are_those_of_the_layers_and_all_other_entries():
    model = get_kron_model(tiny_vit(), KronConfig(block_size=4, rank=2))
    fc1 = model.vit.layers[0].mlp.fc1
    fc1.freeze_mask(torch.ones_like(fc1.s, dtype=torch.bool).tril())
    dead = int((~fc1.block_mask).sum())
    summary = kron_summary(model)
    assert dead > 0
    assert summary.nonzeros == numel(model) - dead * 3
    assert summary.converted.nonzeros == sum(line.nonzeros for line in summary.layers)


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
    assert summary.nonzeros == numel(model)
    model[0].s.requires_grad_(False)
    summary = kron_summary(model)
    assert summary.trained_params == summary.converted.trained_params == numel(model[0]) - 16
    assert (summary.nonzeros, summary.converted.training_flops) == (numel(model), 3 * summary.converted.forward_flops)


def test_a_module_used_twice_counts_once():
    layer = KronLinear(16, 16, 4, 1)
    summary = kron_summary(nn.Sequential(layer, nn.ReLU(), layer))
    assert summary.trained_params == summary.nonzeros == numel(layer)
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


def test_meta_device_has_counts_but_no_values():
    with torch.device("meta"):
        model = get_kron_model(tiny_vit(), KronConfig(block_size=4, rank=2))
    summary = kron_summary(model)
    assert summary.sparsity is summary.nonzeros is summary.converted.nonzeros is None
    assert summary.converted.ideal_forward_flops is None
    assert summary.converted.shares_of_dense()["nonzeros"] is None
    assert summary.trained_params == numel(model)
    assert str(summary).splitlines()[2].split().count("-") == 2
    assert "nonzeros -, " in str(summary).splitlines()[-1]


def test_model_without_kronecker_layers():
    model = tiny_vit()
    summary = kron_summary(model)
    assert summary.layers == ()
    assert summary.trained_params == summary.deployed_params == summary.dense_params == numel(model)
    assert (summary.sparsity, summary.nonzeros) == (0.0, numel(model))
    assert set(summary.converted.shares_of_dense().values()) == {None}
    assert str(summary).splitlines()[-1].startswith("whole model")


def test_to_dict_is_json():
    summary = kron_summary(get_kron_model(tiny_vit(), KronConfig(block_size=(4, 8), rank=2)))
    read = json.loads(json.dumps(summary.to_dict()))
    assert read["layers"][0]["block_size"] == [4, 8]
    assert read["converted"]["dense_params"] == summary.converted.dense_params
    assert read["trained_params"] == summary.trained_params
    assert read["nonzeros"] == summary.nonzeros


def test_shares_of_dense_are_those_of_the_converted_layers():
    layer = KronLinear(15, 21, block_size=(7, 3), rank=2)
    with torch.no_grad():
        layer.s[0] = 0.0
    summary = kron_summary(nn.Sequential(layer, nn.Linear(21, 100)))
    shares = {
        "trained_params": 108 / 336,
        "nonzeros": 93 / 336,
        "deployed_params": 93 / 336,
        "forward_flops": 432 / 630,
        "ideal_forward_flops": 288 / 630,
    }
    assert summary.converted.shares_of_dense() == summary.to_dict()["shares_of_dense"] == shares
    assert str(summary).splitlines()[-1] == (
        "converted layers, of dense: trained 0.321, nonzeros 0.277, deployed 0.277, FLOPs 0.686 (if zero blocks were "
        "skipped: 0.457; no kernel does)"
    )


def test_table_is_aligned():
    lines = str(kron_summary(get_kron_model(tiny_vit(), KronConfig(block_size=4, rank=2)))).splitlines()
    assert len(lines) == 1 + 1 + 12 + 1 + 2 + 1
    header, first = lines[0], lines[2]
    for column in HEADER[1:]:
        assert first[header.index(column) + len(column) - 1] != " ", column
    assert "vit.layers.0.attention.q_proj" in first


# Layers whose block size is being selected


def half_selected():
    """An 8 x 12 layer with a bias and two of three candidates left, each with zero blocks."""
    layer = KronCandidates(12, 8, [((4, 4), 2), ((2, 6), 1), ((8, 12), 3)])
    layer.drop("8x12_rank3")
    with torch.no_grad():
        layer.layer("4x4_rank2").s[0] = 0  # rows 0-3
        layer.layer("2x6_rank1").s[1:3, 1] = 0  # rows 2-5 of columns 6-11
    return layer


def test_a_layer_in_selection_by_hand():
    layer = half_selected()
    summary = kron_summary(layer)
    (counted,) = summary.layers
    # 4 x 4: S 2 x 3, A twice that, B 2 x 16; 2 x 6: S 4 x 2, A the same, B 12; bias 8
    assert counted.trained_params == summary.trained_params == (6 + 12 + 32) + (8 + 8 + 12) + 8
    assert counted.deployed_params == (12 + 32) + (8 + 12) + 8
    assert counted.nonzeros == summary.nonzeros == (3 * 3 + 32) + (6 * 2 + 12) + 8
    assert counted.sparsity == summary.sparsity == 2 * 6 / 96  # rows 2-3 of columns 6-11: zero in both
    assert int((layer.dense_weight() == 0).sum()) == 12
    assert counted.dense_params == summary.dense_params == 96 + 8
    assert (counted.dense_forward_flops, counted.dense_training_flops) == (2 * 96, 6 * 96)
    flops = [kron_summary(layer.layer(key)).converted for key in layer.alive]
    assert counted.forward_flops == sum(part.forward_flops for part in flops)
    assert counted.ideal_forward_flops == sum(part.ideal_forward_flops for part in flops)
    assert (counted.block_size, counted.rank) == (None, None)


def test_the_last_candidate_counts_as_the_chosen_layer():
    layer = half_selected()
    layer.drop("4x4_rank2", free=False)
    (left,), (chosen,) = kron_summary(layer).layers, kron_summary(layer.chosen()).layers
    fields = {"name", "block_size", "rank"}
    assert kron_summary(layer).trained_params == kron_summary(layer.chosen()).trained_params
    without = [{key: value for key, value in asdict(row).items() if key not in fields} for row in (left, chosen)]
    assert without[0] == without[1]


def test_a_model_in_selection_counts_dense_parameters_once():
    vit = tiny_vit()
    dense = numel(vit)
    model = get_kron_model(vit, KronConfig(candidate_block_sizes=[(4, 8), 8], candidate_ranks=[1]))
    summary = kron_summary(model)
    assert summary.dense_params == dense
    assert summary.trained_params == summary.nonzeros == numel(model)
    assert len(summary.layers) == 12
    assert str(summary)
    with torch.device("meta"):
        vit = tiny_vit()
    meta = kron_summary(get_kron_model(vit, KronConfig(candidate_block_sizes=[(4, 8), 8], candidate_ranks=[1])))
    assert (meta.sparsity, meta.nonzeros, meta.dense_params) == (None, None, dense)
