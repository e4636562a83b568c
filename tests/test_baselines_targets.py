import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from kron_hf.baselines import BlockLayer, block_layers, block_sparsity
from kron_hf.config import KronConfig
from kron_hf.model import get_kron_model


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


def test_chooses_what_get_kron_model_converts():
    layers = block_layers(vit(), KronConfig(block_size=(2, 4), block_size_pattern={"fc1": 8}, rank=1))
    converted = get_kron_model(vit(), KronConfig(block_size=(2, 4), block_size_pattern={"fc1": 8}, rank=1))
    expected = {name: m.block_size for name, m in converted.named_modules() if type(m).__name__ == "KronLinear"}
    assert {name: layer.block_size for name, layer in layers.items()} == expected
    assert layers["vit.layers.0.mlp.fc1"].block_size == (8, 8)
    assert all(isinstance(layer, BlockLayer) for layer in layers.values())


def test_the_config_s_ranks_do_not_count():
    config = KronConfig(block_size=4, rank=16, rank_pattern={"fc1": 12}, block_size_pattern={"fc2": 2})
    assert block_layers(vit(), config)["vit.layers.0.mlp.fc2"].block_size == (2, 2)


def test_a_block_size_alone_takes_the_default_modules_or_those_named():
    assert len(block_layers(vit(), 4)) == 6
    assert list(block_layers(vit(), (2, -1), ["fc1"])) == ["vit.layers.0.mlp.fc1"]
    with pytest.raises(ValueError, match="goes with a block size"):
        block_layers(vit(), KronConfig(block_size=4), ["fc1"])


def test_refuses_converted_models():
    converted = get_kron_model(vit(), KronConfig(block_size=4, rank=1))
    for function in (block_layers, block_sparsity):
        with pytest.raises(ValueError, match="already has 6 Kronecker layers"):
            function(converted, 4)


def test_a_block_that_does_not_fit_is_an_error_if_named_and_a_warning_if_not():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"Left dense: 0: block_size \(8, 8\) does not divide") as caught:
        assert list(block_layers(model, 8)) == ["1"]
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match=r"0: block_size \(8, 8\) does not divide its weight of shape \(8, 6\)"):
        block_layers(model, 8, ["0"])
    with pytest.raises(ValueError, match="no module to replace matches"):
        block_layers(model, 4, ["fc1"])


@torch.no_grad()
def test_block_sparsity_counts_blocks_that_are_zero_in_every_entry():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 2))
    config = KronConfig(block_size=(2, 4), rank=1, block_size_pattern={"1": 4})
    for linear in model:
        linear.weight.fill_(-1.0)  # negative entries are not zero
    assert block_sparsity(model, config) == 0.0
    model[0].weight[:2, :4] = 0.0
    model[0].weight[2:4, :4] = 0.0
    model[0].weight[3, 3] = -1e-38
    model[1].weight[:, 4:] = 0.0
    assert block_sparsity(model, config) == (8 + 16) / (64 + 32)
    assert block_sparsity(model, 1) == (16 - 1 + 16) / (64 + 32)
