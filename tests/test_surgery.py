import copy
import re

import pytest
import torch
from families import FAMILIES, example_input
from torch import nn
from transformers import AutoModel

from kron_hf import KronConfig, KronLinear, get_kron_model, to_dense
from kron_hf.selection import KronCandidates
from kron_hf.surgery import make_layers, replace_modules
from kron_hf.targets import Target, find_targets


def vit():
    return FAMILIES["vit"]()


def target(linear, block_size=(4, 8), rank=1, name="encoder.fc1", candidates=()):
    return Target(name, linear, block_size, rank, candidates)


CANDIDATES = (((16, 16), 1), ((8, 8), 2), ((4, 16), 4))


def make(linear, init_weights="random", **kwargs):
    return make_layers([target(linear, **kwargs)], init_weights)["encoder.fc1"]


def relative_error(layer, linear):
    return ((layer.dense_weight() - linear.weight).norm() / linear.weight.norm()).item()


# How the factors start


@pytest.mark.parametrize("std", [0.02, 3.0])
@pytest.mark.parametrize("rank", [1, 4])
def test_random_has_the_variance_of_the_replaced_weight(std, rank):
    linear = nn.Linear(512, 512)
    nn.init.normal_(linear.weight, std=std)
    layer = make(linear, block_size=(16, 16), rank=rank)
    # b has rank * 256 entries: its variance is known to 9 %, that of a to 4 %
    torch.testing.assert_close(layer.dense_weight().var().item(), std**2, rtol=0.3, atol=0)
    assert torch.all(layer.s == 1)
    torch.testing.assert_close(layer.a.std().item(), (std**2 / rank) ** 0.25, rtol=0.15, atol=0)
    torch.testing.assert_close(layer.b.std().item(), (std**2 / rank) ** 0.25, rtol=0.15, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.5], ids=["zeros", "constant"])
def test_random_for_a_constant_weight_is_that_of_a_new_layer(value):
    linear = nn.Linear(256, 256)
    nn.init.constant_(linear.weight, value)
    layer = make(linear, block_size=(16, 16), rank=4)
    torch.testing.assert_close(layer.dense_weight().var().item(), 1 / (3 * 256), rtol=0.3, atol=0)


def test_random_leaves_the_weight_alone():
    linear = nn.Linear(16, 16)
    before = copy.deepcopy(linear.state_dict())
    layer = make(linear)
    assert relative_error(layer, linear) > 0.5
    torch.testing.assert_close(dict(linear.state_dict()), dict(before), rtol=0, atol=0)


def test_random_works_on_meta():
    layer = make(nn.Linear(16, 16, device="meta"))
    assert all(p.is_meta for p in layer.parameters())


@pytest.mark.parametrize("rank", [1, 3])
def test_nearest_is_from_linear(rank):
    linear = nn.Linear(32, 16)
    with pytest.warns(UserWarning, match="init_weights='nearest' kept"):
        layer = make(linear, "nearest", rank=rank)
    expected = KronLinear.from_linear(linear, (4, 8), rank)
    torch.testing.assert_close(dict(layer.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_nearest_tells_the_retained_energy_of_all_layers_once():
    linears = [nn.Linear(32, 16), nn.Linear(16, 32)]
    with torch.no_grad():
        linears[0].weight.mul_(5)
    with pytest.warns(UserWarning, match="init_weights='nearest' kept") as caught:
        layers = make_layers([target(linear, name=str(i)) for i, linear in enumerate(linears)], "nearest")
    assert len(caught) == 1
    weights = [linear.weight.detach() for linear in linears]
    lost = sum((layers[str(i)].dense_weight() - weight).square().sum() for i, weight in enumerate(weights)).item()
    kept = 1 - lost / sum(weight.square().sum() for weight in weights).item()
    assert f"kept {kept:.1%} of the energy of the replaced weights (relative error {(1 - kept) ** 0.5:.2f})" in str(
        caught[0].message
    )


def test_nearest_is_exact_at_full_rank_and_then_does_not_warn():
    linear = nn.Linear(8, 16, dtype=torch.float64)
    layer = make(linear, "nearest", block_size=(2, 2), rank=4)
    torch.testing.assert_close(layer.dense_weight(), linear.weight)


def test_nearest_needs_values():
    message = "^encoder.fc1: init_weights='nearest' needs its values, but the weight is on the meta device$"
    with pytest.raises(ValueError, match=message):
        make(nn.Linear(16, 16, device="meta"), "nearest")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("init_weights", ["random", "nearest"])
def test_weights_that_are_not_finite_are_refused_by_name(init_weights, value):
    linear = nn.Linear(16, 16)
    with torch.no_grad():
        linear.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"^encoder\.fc1: its weight holds NaN or infinite values$"):
        make(linear, init_weights)


@pytest.mark.parametrize("std", [0.02, 3.0])
def test_candidates_share_the_variance_of_the_replaced_weight(std):
    linear = nn.Linear(512, 512)
    nn.init.normal_(linear.weight, std=std)
    layer = make(linear, candidates=CANDIDATES)
    torch.testing.assert_close(layer.dense_weight().var().item(), std**2, rtol=0.3, atol=0)
    for candidate in layer.candidates.values():
        torch.testing.assert_close(candidate.dense_weight().var().item(), std**2 / 3, rtol=0.4, atol=0)


def test_candidates_are_not_fitted():
    with pytest.raises(ValueError, match=r"^encoder\.fc1: candidates start with init_weights='random', got 'nearest'$"):
        make(nn.Linear(512, 512), "nearest", candidates=CANDIDATES)


# What is kept of the replaced layer


@pytest.mark.parametrize("trained", [(), ("bias",), ("weight",)], ids=str)
def test_candidates_keep_mode_bias_and_what_is_trained(trained):
    linear = nn.Linear(16, 16, dtype=torch.bfloat16).eval()
    for name, parameter in linear.named_parameters():
        parameter.requires_grad_(name in trained)
    layer = make(linear, candidates=CANDIDATES)
    assert type(layer) is KronCandidates
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.requires_grad == ("bias" in trained)
    factors = [parameter for name, parameter in layer.named_parameters() if name != "bias"]
    assert {factor.requires_grad for factor in factors} == {"weight" in trained}
    assert {factor.dtype for factor in factors} == {torch.bfloat16}
    assert not any(module.training for module in layer.modules())


@pytest.mark.parametrize("init_weights", ["random", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:init_weights='nearest' kept")
def test_dtype_mode_and_bias_are_kept(init_weights, dtype):
    linear = nn.Linear(16, 16, dtype=dtype).eval()
    layer = make(linear, init_weights)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert not layer.training
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias is not linear.bias
    assert make(nn.Linear(16, 16, bias=False)).bias is None


@pytest.mark.parametrize("trained", [(), ("bias",), ("weight",), ("weight", "bias")], ids=str)
def test_what_is_trained_is_kept(trained):
    linear = nn.Linear(16, 16)
    for name, parameter in linear.named_parameters():
        parameter.requires_grad_(name in trained)
    layer = make(linear)
    assert layer.bias.requires_grad == ("bias" in trained)
    assert {p.requires_grad for p in (layer.s, layer.a, layer.b)} == {"weight" in trained}


def test_replace_modules_reaches_into_containers():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))})
    new = {"a.0": nn.Identity(), "a.1.0": nn.Identity()}
    replace_modules(model, new)
    assert model["a"][0] is new["a.0"]
    assert model["a"][1][0] is new["a.1.0"]


def test_a_progress_bar_shows_for_long_decompositions_only(capfd, monkeypatch):
    targets = find_targets(vit(), KronConfig(block_size=(4, 8), rank=1))
    make_layers(targets, "random")
    assert capfd.readouterr() == ("", "")

    ticks = iter(range(0, 10_000, 5))  # seconds
    monkeypatch.setattr("tqdm.std.time", lambda: next(ticks))
    make_layers(targets, "random")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Kronecker factors" in shown.err


# And back


@pytest.mark.parametrize("family", FAMILIES)
def test_to_dense_has_the_same_function(family):
    model = get_kron_model(FAMILIES[family](), KronConfig(block_size=(4, 8), rank=1)).double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in example_input(model).items()}
    before = model(**inputs).logits
    assert to_dense(model) is model
    assert not any(isinstance(module, KronLinear) for module in model.modules())
    torch.testing.assert_close(model(**inputs).logits, before)


def test_to_dense_has_the_tensors_of_a_dense_model():
    model = to_dense(get_kron_model(vit(), KronConfig(block_size=(4, 8), rank=1)))
    expected = vit().state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert "quantization_config" not in model.config.to_dict()
    assert "kron" not in str(model.config)


def test_to_dense_keeps_zero_blocks_zero():
    model = get_kron_model(nn.Sequential(nn.Linear(16, 16)), KronConfig(block_size=(4, 8), rank=1))
    with torch.no_grad():
        model[0].s[1, 0] = 0
    model[0].freeze_mask()
    weight = to_dense(model)[0].weight
    assert torch.all(weight[4:8, :8] == 0)
    assert torch.count_nonzero(weight) == 256 - 32


def test_to_dense_keeps_mode_and_what_is_trained():
    model = get_kron_model(vit(), KronConfig(block_size=(4, 8), rank=1)).eval()
    model.vit.layers[0].requires_grad_(False)
    to_dense(model)
    assert not model.vit.layers[0].mlp.fc1.weight.requires_grad
    assert model.vit.layers[1].mlp.fc1.weight.requires_grad
    assert not any(module.training for module in model.modules())


def test_to_dense_keeps_shared_layers_shared():
    layer = KronLinear(8, 8, 4, 1)
    model = to_dense(nn.ModuleDict({"a": layer, "b": layer}))
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"]


def test_to_dense_keeps_shared_candidates_shared():
    layer = KronCandidates(8, 8, [(4, 1), (2, 1)])
    model = to_dense(nn.ModuleDict({"a": layer, "b": layer}))
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"]


@pytest.mark.parametrize(
    "layer", [KronLinear(8, 8, 4, 1), KronCandidates(8, 8, [(4, 1)])], ids=lambda x: type(x).__name__
)
def test_to_dense_refuses_a_single_layer(layer):
    with pytest.raises(ValueError, match=re.escape("for a single one use layer.to_dense()")):
        to_dense(layer)


def test_to_dense_of_an_encoder_inside_a_module_saves_a_plain_one(tmp_path):
    encoder = vit().vit
    model = get_kron_model(
        nn.ModuleDict({"encoder": encoder, "head": nn.Linear(32, 3)}), KronConfig(block_size=(4, 8), rank=1)
    )
    to_dense(model)
    encoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(loaded.layers[0].mlp.fc1.weight, encoder.layers[0].mlp.fc1.weight)


def test_a_dense_model_converts_again():
    kron = get_kron_model(vit(), KronConfig(block_size=(4, 8), rank=1))
    weight = kron.vit.layers[0].mlp.fc1.dense_weight().detach()
    again = get_kron_model(to_dense(kron), KronConfig(block_size=(4, 8), rank=1, init_weights="nearest"))
    torch.testing.assert_close(again.vit.layers[0].mlp.fc1.dense_weight(), weight)


@pytest.mark.parametrize("kind", ["zero", "rank one"])
def test_nearest_of_a_deficient_weight_can_still_be_trained(kind):
    linear = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.zeros(16, 16) if kind == "zero" else torch.ones(16, 16))
    layer = make(linear, "nearest", rank=3)
    torch.testing.assert_close(layer.dense_weight(), linear.weight)
    layer(torch.randn(4, 16)).sum().backward()
    norms = layer.a.detach().flatten(1).norm(dim=1) + layer.b.detach().flatten(1).norm(dim=1)
    assert norms.min() > 0.1
    assert (layer.b.grad.flatten(1).norm(dim=1) > 1e-3).all()
