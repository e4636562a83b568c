"""Making PEFT adapters, and merging them to a dense model."""

import copy
import json

import pytest
import torch
from families import FAMILIES, example_input, outputs_of
from peft import PeftModel, get_peft_model
from tiny_peft import DOORS, PEFT_NOISE, adapted, config, dead_blocks, load_base, logits, save_base

from kron_hf import KronConfig, KronLinear, get_kron_model, kron_summary
from kron_hf.sparsity.pruning import kron_layers

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_the_base_is_frozen_and_its_projections_are_replaced(base, door):
    before = load_base(base)
    dense = {name: module for name, module in before.named_modules() if isinstance(module, torch.nn.Linear)}
    model = door(base, modules_to_save=["classifier"])
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KronLinear)}
    assert len(layers) == 12
    assert all(name.endswith(".kron_layers.default") for name in layers)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    inside = {f"{name}.{key}" for name, layer in layers.items() for key in ("s", "a", "b", "bias")}
    head = {name for name in trained if ".modules_to_save.default." in name}
    assert trained == inside | head
    assert len(head) == 2
    # No dense weight is left anywhere, in memory or in a file.
    replaced = {name.removeprefix("base_model.model.").removesuffix(".kron_layers.default") for name in layers}
    shapes = {tuple(dense[name].weight.shape) for name in replaced}
    assert not [name for name, tensor in model.state_dict().items() if tuple(tensor.shape) in shapes]
    assert not [name for name in model.state_dict() if name.endswith("kron_layers.default.weight")]


def test_both_doors_make_the_same_model(base):
    torch.manual_seed(1)
    plain = get_kron_model(load_base(base), config())
    torch.manual_seed(1)
    model = get_peft_model(load_base(base), config())
    assert torch.equal(logits(model), logits(plain))
    assert kron_summary(model).converted.forward_flops == kron_summary(plain).converted.forward_flops


def test_trainable_parameters_are_counted_right(base, capsys):
    model = get_peft_model(load_base(base), config())
    in_layers = sum(parameter.numel() for layer in kron_layers(model) for parameter in layer.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert model.get_nb_trainable_parameters() == (in_layers, everything)
    assert kron_summary(model).trained_params == in_layers
    model.print_trainable_parameters()
    assert f"trainable params: {in_layers:,d} || all params: {everything:,d} " in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_and_merge_of_a_family(tmp_path, family):
    model = FAMILIES[family]()
    inputs = example_input(model)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = type(model)(model.config)
    fresh.load_state_dict(dense)
    adapter = get_peft_model(model, KronConfig(block_size=(4, 8), rank=2))
    adapter.save_pretrained(tmp_path / "adapter")
    expected = outputs_of(adapter, inputs)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(outputs_of(loaded, inputs), expected)
    merged = loaded.merge_and_unload()
    assert merged is fresh
    assert not kron_layers(merged)
    torch.testing.assert_close(outputs_of(merged, inputs), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == {
        name: tensor.shape for name, tensor in dense.items()
    }
    assert torch.equal(outputs_of(type(model).from_pretrained(tmp_path / "merged"), inputs), outputs_of(merged, inputs))
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


def test_merging_keeps_zero_blocks_and_the_trained_head(base):
    model = adapted(base, modules_to_save=["classifier"])
    torch.nn.init.normal_(model.get_base_model().classifier.modules_to_save["default"].weight)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected)
    weight = merged.vit.layers[0].mlp.fc1.weight.reshape(16, 4, 4, 8)  # [O, bo, I, bi]
    assert int((weight.abs().amax((1, 3)) == 0).sum()) == 16 * 4 // 2
    assert not hasattr(merged, "peft_config")
    with pytest.raises(ValueError, match="this model holds trained weights"):
        get_kron_model(merged, config(init_weights=None))
    assert get_peft_model(merged, config()).get_nb_trainable_parameters()[0] > 0


def test_safe_merge_touches_nothing_if_a_weight_is_not_finite(base):
    model = adapted(base)
    torch.nn.init.constant_(kron_layers(model)[-1].a, float("inf"))
    with pytest.raises(ValueError, match=r"vit\.layers\.1\.mlp\.fc2: its weight holds NaN or infinite values"):
        model.merge_and_unload(safe_merge=True)
    assert len(kron_layers(model)) == 12


@pytest.mark.filterwarnings("ignore:These modules need as many FLOPs:UserWarning")
def test_nearest_at_full_rank_keeps_the_model(base):
    expected = logits(load_base(base))
    model = get_peft_model(load_base(base), KronConfig(block_size=(2, 2), rank=4, init_weights="nearest"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


SAME_ERRORS = {
    "init_weights missing": ({"init_weights": None}, 'init_weights="nearest"'),
    "calibrated": ({"init_weights": "calibrated"}, "needs calibration data"),
    "no match": ({"target_modules": ["fc7"]}, "no module to replace matches"),
    "block does not divide": ({"target_modules": ["fc1"], "block_size": 5}, "fc1: block_size .5, 5. does not divide"),
    "rank too high": ({"block_size": (1, -1), "rank": 999}, "rank must be at most"),
    "no linear": ({"target_modules": ["layernorm_before"]}, "only nn.Linear and nn.Conv2d can become"),
}


@pytest.mark.parametrize(("options", "message"), SAME_ERRORS.values(), ids=SAME_ERRORS)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.filterwarnings("ignore:target_modules. 'fc7' matches none:UserWarning")
def test_errors_are_those_of_get_kron_model_and_leave_the_model_alone(base, monkeypatch, door, options, message):
    models = [load_base(base) for _ in range(2)]
    with pytest.raises(ValueError, match=message) as plain:
        get_kron_model(models[0], config(**options))
    monkeypatch.setattr("tiny_peft.load_base", lambda folder: models[1])
    with pytest.raises(ValueError, match=message) as adapter:
        door(base, **options)
    assert str(adapter.value) == str(plain.value)
    assert not kron_layers(models[1])
    assert not hasattr(models[1], "peft_config")
    assert all(parameter.requires_grad for parameter in models[1].parameters())
    door(base)  # the next try works
    assert len(kron_layers(models[1])) == 12


def test_warnings_are_those_of_get_kron_model(base):
    for door in (get_kron_model, get_peft_model):
        with pytest.warns(UserWarning, match="need as many FLOPs as dense ones or more") as caught:
            door(load_base(base), config(block_size=(4, 8), rank=32))
        assert len([entry for entry in caught if entry.category is UserWarning]) == 1


def test_the_callers_config_stays_as_it_was(base):
    mine = config(target_modules=["fc1", "fc2"], rank_pattern={"fc2": 1})
    before = repr(mine)
    model = get_peft_model(load_base(base), mine)
    assert repr(mine).replace(repr(base), "None") == before
    assert {entry["rank"] for entry in model.peft_config["default"].modules.values()} == {1, 2}
    assert get_kron_model(load_base(base), mine) is not None


def test_copies_stand_alone(base):
    model = adapted(base)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    with torch.no_grad():
        for layer in kron_layers(copied):
            layer.a.zero_()
    assert not torch.equal(logits(copied), logits(model))
    assert all(dead is not None for dead in dead_blocks(copied))
    assert copied.peft_config == model.peft_config
