"""What kron_hf takes for granted of how transformers and huggingface_hub load and save models."""

import pytest
import torch
from huggingface_hub.utils import get_session, httpx
from private_names import relies_on
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    ConversionOps,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    WeightConverter,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from kron_hf import KronConfig, get_kron_model
from kron_hf.checkpoint.hook import KronHfQuantizer

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


@relies_on("huggingface_hub", "httpx")
def test_httpx():
    """huggingface_hub.utils.httpx is the module of its HTTP client, whose TransportError a lost connection raises."""
    assert isinstance(get_session(), httpx.Client)
    with httpx.Client(trust_env=False) as client, pytest.raises(httpx.TransportError):
        client.get("http://127.0.0.1:9")


@relies_on("transformers", "get_weight_conversions", "WeightConverter", "ConversionOps")
def test_weight_conversions_of_a_quantizer(kron, monkeypatch):
    """A quantizer's get_weight_conversions may give a WeightConverter of several tensors that fills several others."""
    fc1, seen = "vit.layers.0.mlp.fc1", []

    class Fill(ConversionOps):
        def convert(self, input_dict, source_patterns, target_patterns, *, full_layer_name, model, **kwargs):
            seen.append((full_layer_name, sorted(input_dict)))
            layer = model.get_submodule(full_layer_name.removesuffix(".s"))
            parts = [value[0] if isinstance(value, list) else value for value in input_dict.values()]
            return {
                full_layer_name: layer.s.new_full(layer.s.shape, 3, device="cpu"),
                f"{full_layer_name[:-1]}a": parts[0],
            }

    patterns = [r"\.one$", r"\.two$"]
    monkeypatch.setattr(
        KronHfQuantizer, "get_weight_conversions", lambda self: [WeightConverter(patterns, ".s", [Fill()])]
    )
    config, state = ViTConfig.from_pretrained(kron), load_file(kron / "model.safetensors")
    state[f"{fc1}.one"], state[f"{fc1}.two"] = state.pop(f"{fc1}.a"), state.pop(f"{fc1}.s")
    model = ViTForImageClassification.from_pretrained(None, config=config, state_dict=state)
    assert seen == [(f"{fc1}.s", sorted(patterns))]
    assert bool((model.get_submodule(fc1).s == 3).all())
    torch.testing.assert_close(model.get_submodule(fc1).a.detach(), state[f"{fc1}.one"], rtol=0, atol=0)
