import subprocess
import sys

import pytest
import torch
from tiny_dense import TinyDense, adamw, tiny_layers, zeros
from tiny_training import train
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from kron_hf.baselines import GradualPruning, block_layers, block_sparsity, to_kron
from kron_hf.baselines.block_layer import entry_mask
from kron_hf.baselines.to_kron import exact_factors
from kron_hf.config import KronConfig
from kron_hf.factors import kron_weight
from kron_hf.layers import KronLinear
from kron_hf.summary import kron_summary
from kron_hf.surgery import to_dense

# rank, alive blocks: what random weights of 6 x 5 blocks of size (2, 4) need
CASES = {"all": (30, 8), "many": (12, 8), "few": (5, 5), "one": (1, 1), "none": (0, 1)}


def sparse_weight(alive, dtype=torch.float32, rank=None):
    torch.manual_seed(alive)
    linear = nn.Linear(20, 12)
    mask = (torch.randperm(30) < alive).view(6, 5)
    if rank is None:
        weight = torch.randn(12, 20)
    else:
        weight = kron_weight(*(torch.randn(*shape, dtype=dtype) for shape in ((6, 5), (rank, 6, 5), (rank, 2, 4))))
    layer = next(iter(block_layers(nn.Sequential(linear), (2, 4)).values()))
    return weight.masked_fill(~entry_mask(mask, layer), 0.0).to(dtype), mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("alive", "rank"), CASES.values(), ids=CASES)
def test_full_rank_is_exact_to_the_bit(alive, rank, dtype):
    weight, mask = sparse_weight(alive, dtype)
    s, a, b = exact_factors(weight, (2, 4))
    assert len(b) == rank
    assert torch.equal(s, mask.to(dtype))
    assert torch.equal(kron_weight(s, a, b), weight)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lower_ranks_are_found(rank, dtype):
    weight, mask = sparse_weight(20, dtype, rank)
    s, a, b = exact_factors(weight, (2, 4))
    assert (len(b), a.shape) == (rank, (rank, 6, 5))
    again = kron_weight(s, a, b)
    torch.testing.assert_close(again, weight)
    assert torch.equal(again == 0, weight == 0)
    assert torch.equal(s.bool(), mask)


def test_tolerance_is_the_relative_error_that_counts_as_exact():
    weight, _ = sparse_weight(20, torch.float64)
    ranks = [len(exact_factors(weight, (2, 4), tolerance)[2]) for tolerance in (0.0, 0.1, 0.5, 1.0)]
    assert ranks[0] == 8
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 1
    s, a, b = exact_factors(weight, (2, 4), 0.5)
    assert 0.3 < float((kron_weight(s, a, b) - weight).norm() / weight.norm()) <= 0.5


CONFIG = KronConfig(block_size=(2, 4), rank=1, block_size_pattern={"fc2": (5, 5), "fc3": (2, 3)})


def pruned():
    model = TinyDense()
    optimizer = adamw(model)
    pruner = GradualPruning(tiny_layers(model), target_sparsity=0.7, total_steps=40)
    pruner.attach(optimizer)
    train(model, optimizer, range(40))
    return model


@pytest.mark.filterwarnings("ignore:the exact Kronecker form has")
def test_a_trained_model_there_and_back():
    model = pruned()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    masks, x = zeros(tiny_layers(model)), torch.randn(3, 16)
    outputs = model(x)["logits"]
    converted = to_kron(model, CONFIG)
    assert converted is model
    assert [type(layer) for layer in model.children()] == [KronLinear] * 3 + [nn.Linear]
    torch.testing.assert_close(model(x)["logits"], outputs)
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.dead_blocks.flatten(), mask)
        assert set(layer.s.flatten().tolist()) <= {0.0, 1.0}
    assert kron_summary(model).sparsity == pytest.approx(0.7, abs=25 / 1110)
    for name, value in to_dense(model).state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("ignore:the exact Kronecker form has")
def test_zeros_stay_in_later_training_of_the_kronecker_form():
    model = pruned()
    masks = zeros(tiny_layers(model))
    model.fc3.weight.requires_grad_(False)
    to_kron(model, CONFIG)
    assert [model.fc1.s.requires_grad, model.fc3.a.requires_grad, model.fc1.bias.requires_grad] == [True, False, True]
    before = model.fc1.dense_weight().detach()
    train(model, adamw(model), range(10))
    assert not torch.equal(model.fc1.dense_weight(), before)
    assert all(torch.equal(zeros(tiny_layers(to_dense(model)))[name], mask) for name, mask in masks.items())


def test_says_how_many_parameters_the_form_has():
    """8 x 8 with blocks of 2 x 2, 9 of 16 alive: rank 4 has 16 + 64 + 16 parameters, the blocks 36."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[6:] = 0.0
        model[0].weight[:, 6:] = 0.0
    with pytest.warns(UserWarning, match="has 96 parameters .* living blocks of the dense weights 36;") as caught:
        to_kron(model, 2)
    assert caught[0].filename == __file__
    assert model[0].rank == 4


@pytest.mark.parametrize("kind", ["nan", "meta"])
def test_refuses_weights_without_values(kind):
    model = nn.Sequential(nn.Linear(8, 8, device="meta" if kind == "meta" else None), nn.Linear(8, 2))
    if kind == "nan":
        nn.init.constant_(model[0].weight, torch.nan)
    with pytest.raises(ValueError, match=r"0: its weight (holds NaN|is on the meta device)"):
        to_kron(model, 2)
    assert type(model[0]) is nn.Linear


def test_refuses_converted_models():
    model = nn.Sequential(KronLinear(8, 8, 2, 1), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="already has 1 Kronecker layers"):
        to_kron(model, 2)


FRESH = """
import sys, torch
from transformers import ViTForImageClassification
dense = ViTForImageClassification.from_pretrained(sys.argv[1])
assert "kron_hf" not in sys.modules
import kron_hf
from kron_hf.baselines import block_sparsity
print(block_sparsity(dense, (4, 2)))
model = ViTForImageClassification.from_pretrained(sys.argv[2])
print(kron_hf.kron_summary(model).sparsity)
back = kron_hf.to_dense(model).state_dict()
print(all(torch.equal(value, back[name]) for name, value in dense.state_dict().items()))
"""


def sparse_vit(folder):
    """A ViT with zero blocks and its sparsity, saved dense and in Kronecker form."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    with torch.no_grad():
        for layer in block_layers(model, (4, 2)).values():
            layer.linear.weight[:, 4:] = 0.0
            layer.linear.weight[4:, :] = 0.0
    share = block_sparsity(model, (4, 2))
    model.save_pretrained(folder / "dense")
    weight = model.vit.layers[0].mlp.fc1.weight.clone()
    to_kron(model, (4, 2)).save_pretrained(folder / "kron")
    return weight, share


@pytest.mark.filterwarnings("ignore:the exact Kronecker form has")
def test_saves_loads_and_comes_back(tmp_path):
    weight, share = sparse_vit(tmp_path)
    dense = ViTForImageClassification.from_pretrained(tmp_path / "dense")
    assert torch.equal(dense.vit.layers[0].mlp.fc1.weight, weight)
    assert block_sparsity(dense, (4, 2)) == share > 0.5
    model = ViTForImageClassification.from_pretrained(tmp_path / "kron")
    assert kron_summary(model).sparsity == share
    back = to_dense(model).state_dict()
    assert all(torch.equal(value, back[name]) for name, value in dense.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the exact Kronecker form has")
def test_a_fresh_process_loads_it_and_goes_back(tmp_path):
    _, share = sparse_vit(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "dense"), str(tmp_path / "kron")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [str(share), str(share), "True"], done.stderr
