"""What kron_hf takes for granted of other libraries without their word: each assumption, tried on what is installed.

A test here needs as little of kron_hf as possible. The first to fail with a new version says what that version broke.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from private_names import (
    OVERRIDDEN,
    PRIVATE,
    TESTED,
    UNDOCUMENTED,
    class_at,
    files_with,
    foreign_private_names,
    overridden_private_methods,
    relies_on,
)
from safetensors.torch import load_file
from tiny_training import arguments
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.trainer_callback import ExportableState, TrainerState

from kron_hf import KronConfig, get_kron_model
from kron_hf.checkpoint import KronHfQuantizer

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def vit():
    return ViTForImageClassification(ViTConfig(**SIZES))


@pytest.fixture
def dense(tmp_path):
    vit().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def kron(tmp_path):
    get_kron_model(vit(), KronConfig(block_size=4, rank=1)).save_pretrained(tmp_path / "kron")
    return tmp_path / "kron"


@pytest.mark.parametrize(("name", "file"), [*PRIVATE.items(), *UNDOCUMENTED.items()])
def test_one_file_touches_it(name, file):
    assert files_with(name) == {file}


def test_every_private_name_is_in_the_table():
    assert foreign_private_names() == set(PRIVATE)
    assert overridden_private_methods() == {name: class_at(path) for name, path in OVERRIDDEN.items()}


def test_every_name_in_the_table_is_tested():
    assert {*PRIVATE, *UNDOCUMENTED, *OVERRIDDEN} == TESTED


# torch


@relies_on("torch", "_C", "_AutoDispatchBelowAutograd")
def test_dispatch_below_autograd():
    """Under torch._C._AutoDispatchBelowAutograd() operators build no graph, and after it they do again."""
    x = torch.ones(2, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert torch.ops.aten.mul.Tensor(x, x).grad_fn is None
    assert torch.ops.aten.mul.Tensor(x, x).grad_fn is not None


class Recorder(nn.Linear):
    """A linear that notes which of the overridden methods torch called, and with what."""

    def __init__(self):
        super().__init__(2, 2)
        self.calls = {}

    def _apply(self, fn, recurse=True):
        self.calls["_apply"] = (fn, recurse)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.calls["_save_to_state_dict"] = (destination, prefix, keep_vars)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.calls["_load_from_state_dict"] = (state_dict, prefix, args, kwargs)


@relies_on("torch", "_apply")
def test_module_apply():
    """nn.Module moves and casts a layer through its _apply(fn, recurse), whose fn maps any tensor."""
    model = nn.Sequential(Recorder())
    model.to(torch.float64)
    fn, recurse = model[0].calls["_apply"]
    assert recurse is True
    assert fn(torch.ones(2, dtype=torch.bool)).dtype == torch.bool
    assert model[0].weight.dtype == torch.float64


@relies_on("torch", "_save_to_state_dict")
def test_module_save_to_state_dict():
    """nn.Module.state_dict calls every layer's _save_to_state_dict(destination, prefix, keep_vars)."""
    model = nn.Sequential(Recorder())
    state = model.state_dict()
    destination, prefix, keep_vars = model[0].calls["_save_to_state_dict"]
    assert destination is state
    assert (prefix, keep_vars) == ("0.", False)


@relies_on("torch", "_load_from_state_dict")
def test_module_load_from_state_dict():
    """load_state_dict calls every layer's _load_from_state_dict, whose fifth argument lists the missing keys."""
    model = nn.Sequential(Recorder())
    state = {key: value for key, value in model.state_dict().items() if key != "0.bias"}
    missing = model.load_state_dict(state, strict=False).missing_keys
    _, prefix, args, kwargs = model[0].calls["_load_from_state_dict"]
    assert prefix == "0."
    assert args[2] == missing == ["0.bias"]
    assert not kwargs
    names = list(inspect.signature(nn.Module._load_from_state_dict).parameters)
    assert names.index("missing_keys") == 5


# transformers: loading and saving


@relies_on("transformers", "_weight_conversions")
def test_weight_conversions(dense):
    """from_pretrained sets _weight_conversions; [] makes save_pretrained write the names of state_dict."""
    assert "_weight_conversions" not in vars(vit())
    model = ViTForImageClassification.from_pretrained(dense)
    assert "_weight_conversions" in vars(model)
    model._weight_conversions = []
    model.save_pretrained(dense)
    assert load_file(dense / "model.safetensors").keys() == model.state_dict().keys()
    again = ViTForImageClassification.from_pretrained(dense)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@relies_on("transformers", "_is_hf_initialized")
def test_is_hf_initialized(dense):
    """from_pretrained marks the parameters that it read from a file, and only these, by _is_hf_initialized."""
    marked = {name for name, value in vit().named_parameters() if getattr(value, "_is_hf_initialized", False)}
    assert marked == set()
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    model = ViTForImageClassification.from_pretrained(dense, **options)
    marked = {name for name, value in model.named_parameters() if getattr(value, "_is_hf_initialized", False)}
    assert {name for name, _ in model.named_parameters()} - marked == {"classifier.weight", "classifier.bias"}


@relies_on("transformers", "_from_config")
def test_from_config():
    """Every model class builds a model from its config alone by _from_config."""
    config = ViTConfig(**SIZES)
    assert type(ViTModel._from_config(config)) is ViTModel
    assert type(ViTForImageClassification._from_config(config)) is ViTForImageClassification


@relies_on("transformers", "MODEL_MAPPING")
def test_model_mapping():
    """MODEL_MAPPING of transformers.models.auto.modeling_auto gives the class without a head for a config's class."""
    assert ViTConfig in MODEL_MAPPING
    assert MODEL_MAPPING[ViTConfig] is ViTModel


@relies_on("transformers", "fusion_config")
def test_fusion_config(dense):
    """from_pretrained refuses a config.json whose fusion_config names an unknown fusion, whatever else it is told."""
    model = ViTForImageClassification.from_pretrained(dense)
    model.config.fusion_config = {"nobody's fusion": True}
    model.save_pretrained(dense)
    for options in ({}, {"ignore_mismatched_sizes": True}, {"num_labels": 5, "ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="nobody's fusion"):
            AutoModelForImageClassification.from_pretrained(dense, **options)


@relies_on("transformers", "update_attn_implementation")
def test_update_attn_implementation_sees_the_config_first(kron, monkeypatch):
    """A quantizer's update_attn_implementation(config) is called before fusions are read and the model is built."""
    order = []

    def record(self, config):
        order.append(dict(config.fusion_config))
        config.fusion_config = None
        return config

    def built(self, *args, **kwargs):
        order.append("built")
        raise RuntimeError("far enough")

    monkeypatch.setattr(KronHfQuantizer, "update_attn_implementation", record)
    monkeypatch.setattr(ViTForImageClassification, "__init__", built)
    with pytest.raises(RuntimeError, match="far enough"):
        ViTForImageClassification.from_pretrained(kron)
    guard, after = order
    assert [name.split()[0] for name in guard] == ["kron_hf"]
    assert after == "built"


@relies_on("transformers", "_process_model_before_weight_loading", "_process_model_after_weight_loading")
def test_quantizer_hooks_around_loading(kron, monkeypatch):
    """A quantizer sees the model on meta, with the paths of the weight files, before loading, and filled after it."""
    before, after = (
        KronHfQuantizer._process_model_before_weight_loading,
        KronHfQuantizer._process_model_after_weight_loading,
    )
    seen = {}

    def record_before(self, model, **kwargs):
        seen["before"] = {parameter.device.type for parameter in model.parameters()}
        seen["files"] = [str(file) for file in kwargs["checkpoint_files"]]
        return before(self, model, **kwargs)

    def record_after(self, model, **kwargs):
        seen["after"] = {parameter.device.type for parameter in model.parameters()}
        return after(self, model, **kwargs)

    monkeypatch.setattr(KronHfQuantizer, "_process_model_before_weight_loading", record_before)
    monkeypatch.setattr(KronHfQuantizer, "_process_model_after_weight_loading", record_after)
    ViTForImageClassification.from_pretrained(kron)
    assert seen == {"before": {"meta"}, "files": [str(kron / "model.safetensors")], "after": {"cpu"}}


@pytest.fixture
def untouched(kron, monkeypatch):
    """A model as transformers hands it to the last hook of its quantizer."""
    monkeypatch.setattr(KronHfQuantizer, "_process_model_after_weight_loading", lambda self, model, **_: model)
    return ViTForImageClassification.from_pretrained(kron)


@relies_on("transformers", "_is_quantized")
def test_is_quantized(untouched):
    """Loading with a quantizer sets is_quantized and config._is_quantized; without them .half() and .float() work."""
    assert untouched.is_quantized is True
    assert untouched.config._is_quantized is True
    with pytest.raises(ValueError, match="quantized"):
        untouched.half()
    untouched.is_quantized = False
    untouched.config._is_quantized = False
    assert untouched.half().dtype == torch.float16
    assert untouched.float().dtype == torch.float32


@relies_on("transformers", "hf_quantizer")
def test_hf_quantizer(untouched, tmp_path):
    """A model may lose its hf_quantizer: it saves the state_dict it is given, and its quantization_config."""
    del untouched.hf_quantizer
    untouched._weight_conversions = []
    state = {name: torch.full_like(value, 3) for name, value in untouched.state_dict().items()}
    untouched.save_pretrained(tmp_path / "saved", state_dict=state)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(bool((value == 3).all()) for value in saved.values())
    assert ViTConfig.from_pretrained(tmp_path / "saved").quantization_config["quant_method"] == "kron"


# transformers: training


class Exported(TrainerCallback, ExportableState):
    def __init__(self):
        self.seen = None

    def state(self):
        return {"args": {}, "attributes": {"kept": 3}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen = state.stateful_callbacks


@relies_on("transformers", "ExportableState", "stateful_callbacks")
def test_exportable_state(tmp_path):
    """What an ExportableState callback's state() gives is saved, and is in state.stateful_callbacks on resuming."""
    data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 4
    for resume in (False, True):
        model, callback = Fit(), Exported()
        options = {"max_steps": 2 + resume, "save_strategy": "steps", "save_steps": 2}
        trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        assert callback.seen["Exported"] in ({"args": {}, "attributes": {"kept": 3}}, callback)
    assert isinstance(callback.seen["Exported"], dict)
    state = TrainerState(stateful_callbacks=[Exported(), TrainerControl()])
    assert state.stateful_callbacks["Exported"]["attributes"] == {"kept": 3}


class Fit(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


@relies_on("transformers", "optimizer_cls_and_kwargs")
def test_optimizer_cls_and_kwargs(tmp_path):
    """Trainer builds its optimizer from optimizer_cls_and_kwargs, with the groups that "params" holds."""
    model = Fit()
    groups = [{"params": [model.linear.weight], "lr": 0.5}, {"params": [model.linear.bias], "lr": 0.25}]
    chosen = (torch.optim.SGD, {"params": groups})
    trainer = Trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=chosen)
    assert trainer.optimizer_cls_and_kwargs is chosen
    optimizer = trainer.create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert optimizer.param_groups[1]["params"] == [model.linear.bias]


# peft


@relies_on("peft", "check_target_module_exists")
@pytest.mark.parametrize(
    ("fields", "matching"),
    [
        ({"target_modules": ["fc1"]}, {"layers.0.fc1", "layers.1.fc1"}),
        ({"target_modules": ["0.fc1"]}, {"layers.0.fc1"}),
        ({"target_modules": ["c1"]}, set()),
        ({"target_modules": r"layers\.1\..*"}, {"layers.1.fc1", "layers.1.fc2"}),
        ({"target_modules": "fc1"}, set()),
        ({"target_modules": ".*", "exclude_modules": ["fc1"]}, {"layers.0.fc2", "layers.1.fc2"}),
        ({"target_modules": ".*", "exclude_modules": r".*\.1\..*"}, {"layers.0.fc1", "layers.0.fc2"}),
        ({"target_modules": ["fc1"], "layers_to_transform": [1]}, {"layers.1.fc1"}),
        ({"target_modules": ["fc1"], "layers_to_transform": 0, "layers_pattern": "layers"}, {"layers.0.fc1"}),
        ({"target_modules": ["fc1"], "layers_to_transform": 0, "layers_pattern": "blocks"}, set()),
    ],
    ids=lambda value: None if isinstance(value, set) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_check_target_module_exists(fields, matching):
    """check_target_module_exists(config, name) matches endings or a whole regular expression, exclusions and layers."""
    unset = dict.fromkeys(["exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"])
    names = [f"layers.{index}.fc{number}" for index in (0, 1) for number in (1, 2)]
    config = SimpleNamespace(**unset | fields)
    found = {
        name
        for name in names
        if check_target_module_exists(config, f".{name}" if config.layers_to_transform is not None else name)
    }
    assert found == matching


@relies_on("peft", "get_pattern_key")
@pytest.mark.parametrize(
    ("patterns", "key"),
    [(["fc1"], "fc1"), (["c1"], "layers.0.fc1"), ([r"layers\.0\..*", "fc1"], r"layers\.0\..*"), ([], "layers.0.fc1")],
    ids=["ending", "none", "first", "empty"],
)
def test_get_pattern_key(patterns, key):
    """get_pattern_key(patterns, name) gives the first pattern that the name ends with, or else the name itself."""
    assert get_pattern_key(patterns, "layers.0.fc1") == key
