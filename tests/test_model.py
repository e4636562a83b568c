import copy
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import BERT_SIZES, FAMILIES, VIT_SIZES, example_input
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

from kron_hf import KronConfig, KronLinear, get_kron_model

CHOICES = [
    'KronConfig(..., init_weights="random")',
    'KronConfig(..., init_weights="nearest")',
    "get_kron_model(..., calibration_data=images)",
]


def config(**kwargs):
    return KronConfig(**{"block_size": (4, 8), "rank": 1, **kwargs})


def vit():
    return FAMILIES["vit"]()


def kron_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, KronLinear)}


class Composite(nn.Module):
    """A user's module around a transformers encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.project = nn.Linear(32, 16)
        self.classifier = nn.Linear(16, 8)

    def forward(self, pixel_values):
        return self.classifier(self.project(self.encoder(pixel_values=pixel_values).last_hidden_state[:, 0]))


@pytest.fixture
def headed_dir(tmp_path):
    """A dense checkpoint with a head for three classes."""
    ViTForImageClassification(ViTConfig(**VIT_SIZES, num_labels=3)).save_pretrained(tmp_path / "headed")
    return tmp_path / "headed"


@pytest.fixture
def backbone_dir(tmp_path):
    """A dense checkpoint without a head."""
    ViTModel(ViTConfig(**VIT_SIZES)).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


# get_kron_model(model, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted_in_place_and_trains(family):
    model = FAMILIES[family]()
    modules = dict(model.named_modules())
    assert get_kron_model(model, config()) is model
    assert len(kron_layers(model)) >= 12
    kept = {name: module for name, module in model.named_modules() if name not in kron_layers(model)}
    assert all(module is modules[name] for name, module in kept.items())

    model.double().eval()  # without dropout, and precise enough to see a small step
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in example_input(model).items()}
    before = model(**inputs, labels=torch.tensor([0, 1])).loss
    before.backward()
    for name, layer in kron_layers(model).items():
        assert all(torch.any(factor.grad != 0) for factor in (layer.s, layer.a, layer.b)), name
    # Of the converted layers only: the class token starts at zero, where a layer norm's gradient explodes.
    torch.optim.SGD([p for layer in kron_layers(model).values() for p in layer.parameters()], lr=1e-5).step()
    assert model(**inputs, labels=torch.tensor([0, 1])).loss < before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:These modules need as many FLOPs:UserWarning")
def test_nearest_at_full_rank_keeps_the_function(family):
    model = FAMILIES[family]().double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in example_input(model).items()}
    before = model(**inputs).logits
    get_kron_model(model, config(block_size=2, rank=4, init_weights="nearest"))
    torch.testing.assert_close(model(**inputs).logits, before)


def test_plain_module():
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 4))
    converted: nn.Sequential = get_kron_model(model, config(rank_pattern={"2": 2}))
    assert converted is model
    assert {name: layer.rank for name, layer in kron_layers(model).items()} == {"0": 1, "2": 2}
    model(torch.randn(3, 16)).sum().backward()


def test_encoder_inside_a_plain_module_trains_saves_and_loads(tmp_path):
    model = get_kron_model(Composite(ViTModel(ViTConfig(**VIT_SIZES))), config())
    assert len(kron_layers(model)) == 12
    assert type(model.project) is nn.Linear
    x = torch.randn(2, 3, 16, 16)
    model(x).sum().backward()
    model.encoder.save_pretrained(tmp_path)
    loaded = ViTModel.from_pretrained(tmp_path)
    assert kron_layers(loaded).keys() == kron_layers(model.encoder).keys()
    assert torch.equal(loaded(x).last_hidden_state, model.encoder.eval()(x).last_hidden_state)


def test_an_encoder_that_stays_dense_is_left_as_it_was():
    image, text = ViTModel(ViTConfig(**VIT_SIZES)), hf.BertModel(hf.BertConfig(**BERT_SIZES))
    model = nn.ModuleDict({"image": image, "text": text})
    get_kron_model(model, config(target_modules=r"image\.layers\..*fc1"))
    assert kron_layers(model).keys() == {"image.layers.0.mlp.fc1", "image.layers.1.mlp.fc1"}
    assert "quantization_config" in image.config.to_dict()
    assert "quantization_config" not in text.config.to_dict()


def test_mode_and_what_is_trained_are_kept():
    model = vit().eval()
    model.vit.layers[0].requires_grad_(False)
    get_kron_model(model, config())
    assert not any(module.training for module in model.modules())
    for name, layer in kron_layers(model).items():
        assert {p.requires_grad for p in layer.parameters()} == {"layers.1" in name}


def test_dtype_is_kept():
    model = get_kron_model(vit().to(torch.bfloat16), config())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_on_meta():
    with torch.device("meta"):
        model = vit()
    get_kron_model(model, config())
    assert all(p.is_meta for p in model.parameters())


def test_the_config_object_of_another_model_is_not_changed():
    shared = ViTConfig(**VIT_SIZES)
    first, second = ViTForImageClassification(shared), ViTForImageClassification(shared)
    get_kron_model(first, config())
    assert "quantization_config" not in shared.to_dict()
    assert second.config is shared


def test_the_kron_config_is_not_changed():
    wanted = config(target_modules=["fc1"], block_size_pattern={"fc1": [2, 8]})
    before = copy.deepcopy(wanted)
    get_kron_model(vit(), wanted)
    assert wanted == before


@pytest.mark.parametrize("init_weights", ["random", "nearest"])
@pytest.mark.filterwarnings("ignore:init_weights='nearest' kept:UserWarning")
def test_prints_nothing(capfd, init_weights):
    get_kron_model(vit(), config(init_weights=init_weights))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"init_weights": "nearest"}, "init_weights='nearest' kept"),
        ({"rank_pattern": {"fc9": 1}}, "rank_pattern: 'fc9' matches none"),
        ({"exclude_modules": ["fc9"]}, "exclude_modules: 'fc9' matches none"),
        ({"block_size_pattern": {"fc1": 5}}, "Left dense: "),
        ({"rank": 32}, "These modules need as many FLOPs"),
    ],
    ids=["nearest", "pattern", "exclude", "skipped", "flops"],
)
def test_warnings_point_at_the_callers_line(kwargs, message, headed_dir):
    with pytest.warns(UserWarning, match=message) as caught:
        get_kron_model(vit(), config(**kwargs))
    with pytest.warns(UserWarning, match=message) as caught_loading:
        get_kron_model(
            config(base_model_name_or_path=headed_dir, **kwargs), pretrained=kwargs.get("init_weights") == "nearest"
        )
    files = [Path(warning.filename).name for warning in [*caught, *caught_loading]]
    assert files == [Path(__file__).name] * 2


# Errors leave the model as it was


def nan_weight():
    model = vit()
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.weight[0, 0] = float("nan")
    return model


def tied():
    model = vit()
    model.vit.layers[0].mlp.fc1.weight = model.vit.layers[1].mlp.fc1.weight
    return model


@pytest.mark.parametrize(
    ("build", "kwargs", "message"),
    [
        (nan_weight, {}, "vit.layers.1.mlp.fc2: its weight holds NaN"),
        (nan_weight, {"init_weights": "nearest"}, "vit.layers.1.mlp.fc2: its weight holds NaN"),
        (tied, {"target_modules": ["fc1"]}, "vit.layers.0.mlp.fc1: its weight is tied to"),
        (vit, {"target_modules": ["q_proj", "classifier"], "block_size": (4, 8)}, "classifier: block_size (4, 8)"),
        (vit, {"target_modules": ["fc9"]}, "no module to replace matches ['fc9']"),
        (vit, {"block_size": 7}, "no module to replace matches the default target_modules"),
        (vit, {"init_weights": "calibrated"}, "init_weights='calibrated' needs calibration data"),
    ],
    ids=["nan", "nan-nearest", "tied", "block", "no-match", "no-block-fits", "calibrated"],
)
def test_after_an_error_the_model_is_untouched(build, kwargs, message):
    model = build()
    modules, parameters = list(model.modules()), list(model.parameters())
    tensors, entries = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match=re.escape(message)):
        get_kron_model(model, config(**kwargs))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(dict(model.state_dict()), dict(tensors), rtol=0, atol=0, equal_nan=True)
    assert model.config.to_dict() == entries


def test_converted_twice():
    model = get_kron_model(vit(), config())
    layers = kron_layers(model)
    with pytest.raises(ValueError, match=r"already has 12 Kronecker layers .*kron_hf\.to_dense\(model\) first"):
        get_kron_model(model, config())
    assert kron_layers(model) == layers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_kron_model(vit()), "got ViTForImageClassification and NoneType"),
        (lambda: get_kron_model(vit(), {"rank": 1}), "got ViTForImageClassification and dict"),
        (lambda: get_kron_model("google/vit", config()), "got str and KronConfig"),
        (lambda: get_kron_model(config(), vit()), "got a KronConfig and then a ViTForImageClassification"),
        (lambda: get_kron_model(config(), config()), "got a KronConfig and then a KronConfig"),
        (lambda: get_kron_model(vit(), config(), num_labels=3), r"only go with get_kron_model\(config, \.\.\.\)"),
        (lambda: get_kron_model(vit(), config(), pretrained=False), r"only go with get_kron_model\(config, \.\.\.\)"),
        (
            lambda: get_kron_model(vit(), config(), auto_class=ViTModel),
            r"only go with get_kron_model\(config, \.\.\.\)",
        ),
    ],
    ids=["no-config", "dict", "name", "swapped", "two-configs", "num_labels", "pretrained", "auto_class"],
)
def test_wrong_arguments(call, message):
    with pytest.raises(TypeError, match=message):
        call()


# The choice of init_weights


def test_random_for_a_model_built_from_its_config():
    model = get_kron_model(vit(), config())
    for layer in kron_layers(model).values():
        torch.testing.assert_close(layer.dense_weight().std().item(), 0.02, rtol=0.6, atol=0)


def load_model(path):
    return AutoModelForImageClassification.from_pretrained(path)


def load_inside_a_module(path):
    return Composite(load_model(path).vit)


@pytest.mark.parametrize("load", [load_model, load_inside_a_module])
def test_a_loaded_model_needs_a_choice(headed_dir, load):
    model = load(headed_dir)
    with pytest.raises(ValueError, match="this model holds trained weights") as error:
        get_kron_model(model, config())
    assert all(choice in str(error.value) for choice in CHOICES)
    assert not kron_layers(model)
    assert kron_layers(get_kron_model(model, config(init_weights="random")))


# get_kron_model(config)


def test_nearest_needs_the_weights(headed_dir):
    wanted = config(base_model_name_or_path=str(headed_dir), init_weights="nearest")
    with pytest.raises(ValueError, match="fits the factors to trained weights, which pretrained=False does not load"):
        get_kron_model(wanted, pretrained=False)


def test_from_a_checkpoint(headed_dir):
    dense = load_model(headed_dir)
    wanted = config(base_model_name_or_path=str(headed_dir), init_weights="nearest")
    with pytest.warns(UserWarning, match="init_weights='nearest' kept"):
        model = get_kron_model(wanted)
    assert type(model) is ViTForImageClassification
    assert torch.equal(model.classifier.weight, dense.classifier.weight)
    expected = KronLinear.from_linear(dense.vit.layers[0].mlp.fc1, (4, 8), 1)
    assert torch.equal(model.vit.layers[0].mlp.fc1.dense_weight(), expected.dense_weight())


def test_from_a_checkpoint_needs_a_choice_before_anything_is_loaded():
    with pytest.raises(ValueError, match="write one of") as error:
        get_kron_model(config(base_model_name_or_path="no/such-model"))
    message = str(error.value)
    assert all(choice in message for choice in CHOICES)
    assert "get_kron_model(config, pretrained=False)" in message


def test_not_pretrained_loads_no_weights(headed_dir):
    (headed_dir / "model.safetensors").unlink()
    model = get_kron_model(config(base_model_name_or_path=str(headed_dir)), pretrained=False)
    assert type(model) is ViTForImageClassification
    assert len(kron_layers(model)) == 12
    assert model.num_labels == 3
    assert model(torch.randn(1, 3, 16, 16)).logits.shape == (1, 3)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.filterwarnings("ignore:init_weights='nearest' kept:UserWarning")
def test_num_labels_on_a_headless_checkpoint(backbone_dir, pretrained):
    wanted = config(base_model_name_or_path=str(backbone_dir), init_weights="random")
    assert type(get_kron_model(wanted, pretrained=pretrained)) is ViTModel
    model = get_kron_model(wanted, pretrained=pretrained, num_labels=7)
    assert type(model) is ViTForImageClassification
    assert model(torch.randn(1, 3, 16, 16)).logits.shape == (1, 7)


def test_num_labels_on_a_headed_checkpoint(headed_dir):
    model = get_kron_model(config(base_model_name_or_path=str(headed_dir)), pretrained=False, num_labels=7)
    assert model.classifier.out_features == 7


@pytest.mark.parametrize(
    "auto_class", [AutoModelForImageClassification, ViTForImageClassification], ids=["auto", "own"]
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_auto_class(backbone_dir, auto_class, pretrained):
    wanted = config(base_model_name_or_path=str(backbone_dir), init_weights="random")
    model = get_kron_model(wanted, auto_class=auto_class, pretrained=pretrained)
    assert type(model) is ViTForImageClassification


@pytest.mark.parametrize("pretrained", [True, False])
def test_model_arguments_are_passed_on(headed_dir, pretrained):
    wanted = config(base_model_name_or_path=str(headed_dir), init_weights="random")
    model = get_kron_model(
        wanted, pretrained=pretrained, dtype=torch.bfloat16, attn_implementation="eager", hidden_dropout_prob=0.25
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.config.hidden_dropout_prob == 0.25


@pytest.mark.parametrize(
    "architecture",
    ["AutoTokenizer", "os", "__import__", "ViTNoSuchModel", "BertModel", "ViTConfig", "pipeline", 3, None],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_wrong_architecture_is_refused(backbone_dir, architecture, pretrained):
    model_config = hf.AutoConfig.from_pretrained(backbone_dir)
    model_config.architectures = None if architecture is None else [architecture]
    model_config.save_pretrained(backbone_dir)
    wanted = config(base_model_name_or_path=str(backbone_dir), init_weights="random")
    with pytest.raises(ValueError, match="is no transformers model for a ViTConfig; pass auto_class="):
        get_kron_model(wanted, pretrained=pretrained)
    assert get_kron_model(wanted, auto_class=ViTModel, pretrained=pretrained)


def test_a_name_is_required():
    with pytest.raises(ValueError, match=r"needs config\.base_model_name_or_path"):
        get_kron_model(config(init_weights="random"))


def test_a_kronecker_checkpoint_as_base_is_refused(tmp_path):
    get_kron_model(vit(), config()).save_pretrained(tmp_path)
    wanted = config(base_model_name_or_path=str(tmp_path), init_weights="random")
    with pytest.raises(ValueError, match="already has 12 Kronecker layers"):
        get_kron_model(wanted)


def test_the_config_of_a_kronecker_checkpoint_is_no_base_to_start_anew_from(tmp_path):
    get_kron_model(vit(), config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="built from the config of a Kronecker checkpoint, but not loaded from it"):
        get_kron_model(config(base_model_name_or_path=str(tmp_path)), pretrained=False)
