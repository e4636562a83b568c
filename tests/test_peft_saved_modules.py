"""`modules_to_save` and PEFT's classes for tasks."""

import peft
import pytest
import torch
import transformers as hf
from families import FAMILIES, example_input, outputs_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_peft import PEFT_NOISE, config, load_base, logits, save_base

from kron_hf import KronConfig, get_kron_model
from kron_hf.sparsity.pruning import kron_layers

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


SAVED_MODULES = {
    "an ending": (["classifier"], ["classifier"]),
    "a full name": (["vit.embeddings.patch_embeddings"], ["vit.embeddings.patch_embeddings"]),
    # PEFT compares the ends of names: "embeddings" alone would take patch_embeddings, too.
    "an ending that others share": (["embeddings"], ["vit.embeddings"]),
    "several": (["layernorm", "classifier"], ["vit.layernorm", "classifier"]),
}


@pytest.mark.parametrize(("given", "expected"), SAVED_MODULES.values(), ids=SAVED_MODULES)
def test_modules_to_save(base, tmp_path, given, expected):
    model = get_peft_model(load_base(base), config(modules_to_save=given))
    wrapped = [name for name, module in model.named_modules() if isinstance(module, peft.utils.ModulesToSaveWrapper)]
    assert sorted(wrapped) == sorted(f"base_model.model.{name}" for name in expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(base), tmp_path)), logits(model))
    assert torch.equal(logits(load_base(tmp_path)), logits(model))


def test_modules_to_save_stay_dense(base):
    model = get_peft_model(load_base(base), config(modules_to_save=["vit.layers.0", "classifier"]))
    assert len(kron_layers(model)) == 6
    assert len(kron_layers(get_kron_model(load_base(base), config(modules_to_save=["layers.1"])))) == 6


BAD_MODULES_TO_SAVE = {
    "nothing": (["nose"], "'nose' names no module"),
    "a list of modules": (["layers"], "vit.layers is a container"),
    "a pattern": (["class.*"], r"'class\.\*' names no module"),
}


@pytest.mark.parametrize(("given", "message"), BAD_MODULES_TO_SAVE.values(), ids=BAD_MODULES_TO_SAVE)
def test_bad_modules_to_save(base, given, message):
    model = load_base(base)
    with pytest.raises(ValueError, match=f"modules_to_save: {message}"):
        get_peft_model(model, config(target_modules=["classifier"], block_size=(2, 8), rank=1, modules_to_save=given))
    assert not kron_layers(model)


def test_modules_to_save_that_peft_would_match_too_widely():
    model = FAMILIES["bert"]()
    with pytest.raises(ValueError, match=r"would take .*bert\.embeddings\.word_embeddings.*write full names"):
        get_peft_model(model, KronConfig(block_size=8, rank=1, modules_to_save=["embeddings"], task_type="SEQ_CLS"))
    assert not kron_layers(model)


def test_a_task_type_trains_and_saves_its_head(tmp_path):
    FAMILIES["bert"]().save_pretrained(tmp_path / "base")
    model = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    inputs = example_input(model)
    options = {"block_size": 8, "rank": 1, "init_weights": "random", "task_type": "SEQ_CLS"}
    adapter = get_peft_model(model, KronConfig(**options))
    assert isinstance(adapter, peft.PeftModelForSequenceClassification)
    assert adapter.get_base_model().classifier.modules_to_save["default"].weight.requires_grad
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01 * parameter.requires_grad)
    adapter.save_pretrained(tmp_path / "adapter")
    assert any(".classifier." in name for name in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    fresh = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    for loaded in (
        PeftModel.from_pretrained(fresh, tmp_path / "adapter"),
        peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter"),
        hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(outputs_of(loaded, inputs), outputs_of(adapter, inputs))


def test_generation_with_a_causal_model(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(**sizes, vocab_size=50, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    )
    adapter = get_peft_model(model, KronConfig(block_size=8, rank=1, task_type="CAUSAL_LM"))
    assert len(kron_layers(adapter)) == 7
    prompt = torch.tensor([[1, 5, 7]])
    text = adapter.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape[1] > 3
    merged = adapter.merge_and_unload().generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(merged, text)
