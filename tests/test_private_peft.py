"""What kron_hf takes for granted of PEFT."""

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.other import get_pattern_key, set_additional_trainable_modules
from private_names import relies_on
from tiny_peft import PEFT_NOISE, add_adapter
from torch import nn

from kron_hf import KronConfig
from kron_hf.peft_tuner import KronModel

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


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


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc2(self.fc1(x))


def lora():
    return get_peft_model(Pair(), LoraConfig(target_modules=["fc1"], r=2))


def kron():
    return get_peft_model(Pair(), KronConfig(target_modules=["fc1"], block_size=4, rank=1))


def record(monkeypatch, tuner, name):
    """Notes the arguments of every call of a tuner's method, after the tuner or its class."""
    original, calls = getattr(tuner, name), []
    if hasattr(original, "__self__"):  # a class method

        def noted(cls, *args, **kwargs):
            calls.append((args, kwargs))
            return original.__func__(cls, *args, **kwargs)

        monkeypatch.setattr(tuner, name, classmethod(noted))
        return calls

    def noted(self, *args, **kwargs):
        calls.append((args, kwargs))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(tuner, name, noted)
    return calls


@relies_on("peft", "PEFT_TYPE_TO_CONFIG_MAPPING", "register_peft_method")
def test_registration():
    """register_peft_method puts a method's config, tuner and prefix into PEFT's mappings, by the PeftType."""
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.KRON] is KronConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.KRON] is KronModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.KRON] == "kron_"


@relies_on("peft", "_create_and_replace")
def test_create_and_replace():
    """A tuner must define _create_and_replace; inject_adapter, which kron_hf overrides, is all that calls it."""
    assert "_create_and_replace" in BaseTuner.__abstractmethods__
    with pytest.raises(NotImplementedError, match="inject_adapter"):
        kron().base_model._create_and_replace()


@relies_on("peft", "_mark_only_adapters_as_trainable")
def test_mark_only_adapters_as_trainable():
    """BaseTuner._mark_only_adapters_as_trainable(model) freezes all parameters whose name lacks the prefix."""
    model = lora()
    model.requires_grad_(True)
    model.base_model._mark_only_adapters_as_trainable(model.base_model.model)
    trained = {name.split(".")[-3] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"lora_A", "lora_B"}


@relies_on("peft", "set_additional_trainable_modules")
def test_set_additional_trainable_modules():
    """set_additional_trainable_modules wraps the modules_to_save of a config and makes the copies trainable."""
    model = Pair()
    set_additional_trainable_modules(
        model=model,
        peft_config=LoraConfig(modules_to_save=["fc2"]),
        model_config={},
        adapter_name="default",
        activate_adapter=True,
    )
    assert model.fc2.modules_to_save["default"].weight.requires_grad
    assert not model.fc2.original_module.weight.requires_grad


@relies_on("peft", "_cast_adapter_dtype")
def test_cast_adapter_dtype(monkeypatch):
    """PeftModel leaves the dtype of a new adapter to the tuner's _cast_adapter_dtype."""
    calls = record(monkeypatch, LoraModel, "_cast_adapter_dtype")
    lora()
    assert calls
    assert {kwargs.get("adapter_name", *args[:1]) for args, kwargs in calls} == {"default"}
    calls = record(monkeypatch, KronModel, "_cast_adapter_dtype")
    model = get_peft_model(Pair().half(), KronConfig(target_modules=["fc1"], block_size=4, rank=1))
    assert calls
    assert model.base_model.model.fc1.layer.s.dtype == torch.float16


@relies_on("peft", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load")
def test_names_in_files(monkeypatch, tmp_path):
    """Tensors are saved under _remove_adapter_name_from_key and loaded under what _remap_..._for_load returns."""
    assert LoraModel._remove_adapter_name_from_key("fc1.lora_A.default.weight", "default") == "fc1.lora_A.weight"
    lora().save_pretrained(tmp_path)
    calls = record(monkeypatch, LoraModel, "_remap_adapter_state_dict_for_load")
    PeftModel.from_pretrained(Pair(), tmp_path)
    ((args, kwargs),) = calls
    model, config, adapter_name, state_dict = (*args, *kwargs.values())
    assert isinstance(model, nn.Module)
    assert (config.peft_type, adapter_name) == (PeftType.LORA, "default")
    assert "base_model.model.fc1.lora_A.weight" in state_dict
    remapped = LoraModel._remap_adapter_state_dict_for_load(*args, **kwargs)
    assert "base_model.model.fc1.lora_A.default.weight" in remapped


@relies_on("peft", "_replace_module", "unload_and_optionally_merge_module")
def test_merge_and_unload(monkeypatch):
    """merge_and_unload puts in, by _replace_module, what the layer's unload_and_optionally_merge_module returns."""
    model = kron()
    layer = model.base_model.model.fc1
    calls = record(monkeypatch, KronModel, "_replace_module")
    unloads = record(monkeypatch, type(layer), "unload_and_optionally_merge_module")
    merged = model.merge_and_unload()
    assert unloads == [((), {"merge": True, "safe_merge": False, "adapter_names": None})]
    (((parent, child_name, new, child), _),) = calls
    assert (parent, child_name, child) == (merged, "fc1", layer)
    assert merged.fc1 is new
    assert type(new) is nn.Linear


@relies_on("peft", "_enable_peft_forward_hooks")
def test_enable_peft_forward_hooks(monkeypatch):
    """PeftModel.forward runs within the tuner's _enable_peft_forward_hooks, which is told of adapter_names."""
    model = kron()
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model(torch.ones(1, 8), adapter_names=["default"])
    calls = record(monkeypatch, KronModel, "_enable_peft_forward_hooks")
    model(torch.ones(1, 8))
    assert len(calls) == 1


@relies_on("transformers", "_hf_peft_config_loaded")
def test_hf_peft_config_loaded():
    """A model without adapters has _hf_peft_config_loaded = False, add_adapter gives it True."""
    model = FAMILIES["vit"]()
    assert model._hf_peft_config_loaded is False
    assert add_adapter(model, init_weights=None)._hf_peft_config_loaded is True
