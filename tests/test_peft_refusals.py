"""PEFT's public methods one by one: each works on a Kronecker adapter or refuses and says what to do instead."""

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.functional import delete_adapter
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.hotswap import hotswap_adapter
from tiny_peft import INPUTS, PEFT_NOISE, adapted, add_adapter, config, load_base, logits, quiet_peft, save_base
from transformers.integrations.peft import PeftAdapterMixin

from kron_hf import get_kron_model, to_dense
from kron_hf.sparsity.pruning import kron_layers

pytestmark = [
    pytest.mark.filterwarnings(PEFT_NOISE),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    with quiet_peft():
        adapted(base, modules_to_save=["classifier"]).save_pretrained(folder)
    return folder


def enter(context):
    with context:
        pass


LORA = LoraConfig(target_modules=["q_proj"])
DENSE = "call merge_and_unload\\(\\) for a dense model"
AGAIN = "load the base model again"

# name: what is called, and what its error says; None where it works
PEFT_MODEL = {
    "active_adapters": (lambda m, a: m.active_adapters == ["default"], None),
    "active_peft_config": (lambda m, a: len(m.active_peft_config.modules) == 12, None),
    "add_adapter": (lambda m, a: m.add_adapter("two", config()), AGAIN),
    "base_model_torch_dtype": (lambda m, a: m.base_model_torch_dtype == torch.float32, None),
    "create_or_update_model_card": (lambda m, a: m.create_or_update_model_card(str(a)) is None, None),
    "delete_adapter": (lambda m, a: m.delete_adapter("default"), AGAIN),
    "disable_adapter": (lambda m, a: enter(m.disable_adapter()), AGAIN),
    "forward": (lambda m, a: torch.isfinite(m(**INPUTS).logits).all(), None),
    "from_pretrained": (lambda m, a: PeftModel.from_pretrained(m, a, "two"), AGAIN),
    "generate": (lambda m, a: m.generate(**INPUTS), "generate"),  # this model has no such method; see its own test
    "get_base_model": (lambda m, a: type(m.get_base_model()).__name__ == "ViTForImageClassification", None),
    "get_layer_status": (lambda m, a: {s.enabled for s in m.get_layer_status()} == {True}, None),
    "get_model_status": (lambda m, a: m.get_model_status().peft_types == {"default": "KRON"}, None),
    "get_nb_trainable_parameters": (lambda m, a: m.get_nb_trainable_parameters()[0] > 0, None),
    "get_prompt": (lambda m, a: m.get_prompt(1), "prompt"),  # prompt learning only
    "get_prompt_embedding_to_save": (lambda m, a: m.get_prompt_embedding_to_save("default"), "prompt"),
    "has_active_enabled_adapter": (lambda m, a: m.has_active_enabled_adapter, None),
    "load_adapter": (lambda m, a: m.load_adapter(a, "two"), AGAIN),
    "modules_to_save": (lambda m, a: m.modules_to_save == {"classifier"}, None),
    "peft_config": (lambda m, a: list(m.peft_config) == ["default"], None),
    "prepare_model_for_gradient_checkpointing": (
        lambda m, a: m.prepare_model_for_gradient_checkpointing(m.get_base_model()) is None,
        None,
    ),
    "print_trainable_parameters": (lambda m, a: m.print_trainable_parameters() is None, None),
    "save_pretrained": (lambda m, a: m.save_pretrained(a / "again") is None, None),
    "set_adapter": (lambda m, a: m.set_adapter("default") is None, None),
    "set_requires_grad": (lambda m, a: m.set_requires_grad("default") is None, None),
    "supports_lora_conversion": (lambda m, a: m.supports_lora_conversion() is False, None),
}
TUNER = {
    "active_adapters": (lambda m, a: m.base_model.active_adapters == ["default"], None),
    "delete_adapter": (lambda m, a: m.base_model.delete_adapter("default"), AGAIN),
    "disable_adapter_layers": (lambda m, a: m.base_model.disable_adapter_layers(), AGAIN),
    "enable_adapter_layers": (lambda m, a: m.base_model.enable_adapter_layers() is None, None),
    "forward": (lambda m, a: torch.isfinite(m.base_model(**INPUTS).logits).all(), None),
    "get_model_config": (lambda m, a: m.base_model.get_model_config(m)["model_type"] == "vit", None),
    "inject_adapter": (lambda m, a: m.base_model.inject_adapter(m.get_base_model(), "default"), AGAIN),
    "merge_adapter": (lambda m, a: m.merge_adapter(), DENSE),
    "merge_and_unload": (lambda m, a: m.merge_and_unload(adapter_names=["two"]), r"adapters are \['default'\]"),
    "set_adapter": (lambda m, a: m.base_model.set_adapter("two"), AGAIN),
    "set_requires_grad": (lambda m, a: m.base_model.set_requires_grad("default") is None, None),
    "supports_lora_conversion": (lambda m, a: m.base_model.supports_lora_conversion() is False, None),
    "unload": (lambda m, a: m.unload(), DENSE),
    "unmerge_adapter": (lambda m, a: m.unmerge_adapter(), AGAIN.replace("model", "model and the adapter")),
    "uses_shared_state": (lambda m, a: m.base_model.uses_shared_state is False, None),
}
OTHER = {
    "get_peft_model": (lambda m, a: get_peft_model(m, config()), AGAIN),
    "get_peft_model on the base model": (lambda m, a: get_peft_model(m.get_base_model(), config()), AGAIN),
    "get_kron_model": (
        lambda m, a: get_kron_model(m, config()),
        DENSE.split(" for")[0].replace("call ", "peft_model."),
    ),
    "get_kron_model on the base model": (lambda m, a: get_kron_model(m.get_base_model(), config()), AGAIN),
    "to_dense": (lambda m, a: to_dense(m), r"peft_model\.merge_and_unload\(\)"),
    "add_weighted_adapter": (lambda m, a: m.add_weighted_adapter(["default"], [1.0], "two"), AGAIN),
    "add_adapter of LoRA": (lambda m, a: m.add_adapter("two", LORA), "different peft types"),
    "a mixed batch": (lambda m, a: m(**INPUTS, adapter_names=["default", "__base__"]), AGAIN),
    "set_adapter of none": (lambda m, a: kron_tuner_layers(m)[0].set_adapter([]), AGAIN),
    "functional.delete_adapter": (lambda m, a: delete_adapter(m, "default", "kron_"), AGAIN),
    "merge of a layer": (lambda m, a: kron_tuner_layers(m)[0].merge(), DENSE),
    "unmerge of a layer": (lambda m, a: kron_tuner_layers(m)[0].unmerge(), "load the base model and the adapter again"),
    "unload of a layer": (
        lambda m, a: kron_tuner_layers(m)[0].unload_and_optionally_merge_module(False, False, None),
        DENSE,
    ),
    "hotswap_adapter": (lambda m, a: hotswap_adapter(m, a, "default"), "ot-?swap"),
    "convert_to_lora": (lambda m, a: peft.convert_to_lora(m, rank=2), "do not support LoRA conversion"),
    "weight conversion": (
        lambda m, a: m.save_pretrained(a / "b", path_initial_model_for_weight_conversion=a / "c"),
        "not supported for KronModel",
    ),
}
TRANSFORMERS = {
    "active_adapters": (lambda m, a: m.active_adapters() == ["default"], None),
    "add_adapter": (lambda m, a: m.add_adapter(config(), "two"), AGAIN),
    "delete_adapter": (lambda m, a: m.delete_adapter("default"), AGAIN),
    "disable_adapters": (lambda m, a: m.disable_adapters(), AGAIN),
    "enable_adapters": (lambda m, a: m.enable_adapters() is None, None),
    "enable_peft_hotswap": (lambda m, a: m.load_adapter(str(a), "default", hotswap=True), "only supported for LoRA"),
    "get_adapter_state_dict": (lambda m, a: len(m.get_adapter_state_dict()) == 50, None),
    "load_adapter": (lambda m, a: m.load_adapter(str(a), "two"), AGAIN),
    "set_adapter": (lambda m, a: m.set_adapter("default") is None, None),
}


def kron_tuner_layers(model):
    return [module for module in model.modules() if hasattr(module, "kron_layers")]


def public_names(cls):
    return {name for name in vars(cls) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("cls", "table"), [(PeftModel, PEFT_MODEL), (BaseTuner, TUNER), (PeftAdapterMixin, TRANSFORMERS)]
)
def test_the_tables_name_every_public_method(cls, table):
    assert public_names(cls) == set(table), "a new version has other methods: decide for each, and test it here"


def check(model, adapter, call, message):
    expected = logits(model)
    if message is None:
        assert call(model, adapter)
    else:
        with pytest.raises((ValueError, NotImplementedError, TypeError, AttributeError), match=message):
            call(model, adapter)
    # Nothing has changed for the adapter that is there.
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == ["default"]
    assert len(kron_layers(model)) == 12
    assert all(parameter.requires_grad for layer in kron_layers(model) for parameter in layer.parameters())


@pytest.fixture(scope="module")
def peft_model(base):
    with quiet_peft():
        return adapted(base, modules_to_save=["classifier"])


@pytest.mark.parametrize("name", PEFT_MODEL)
def test_peft_model(peft_model, saved, name):
    check(peft_model, saved, *PEFT_MODEL[name])


@pytest.mark.parametrize("name", TUNER)
def test_tuner(peft_model, saved, name):
    check(peft_model, saved, *TUNER[name])


@pytest.mark.parametrize("name", OTHER)
def test_other_ways_to_more_adapters(peft_model, saved, name):
    check(peft_model, saved, *OTHER[name])


@pytest.fixture(scope="module")
def transformers_model(base):
    return add_adapter(load_base(base), modules_to_save=["classifier"])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_adapter_methods(transformers_model, saved, name):
    check(transformers_model, saved, *TRANSFORMERS[name])


def test_a_model_with_another_adapter_takes_no_kronecker_adapter(base):
    lora = get_peft_model(load_base(base), LORA)
    with pytest.raises(ValueError, match=r"has an adapter already \('default'\).*load the base model again"):
        get_peft_model(lora.get_base_model(), config())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        lora.add_adapter("two", config())
    with pytest.raises(ValueError, match=r"carries PEFT adapters \(first: base_model.*q_proj\)"):
        get_kron_model(lora, config())
    assert not kron_layers(lora)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_lora_cannot_wrap_the_layers(base):
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(adapted(base).get_base_model(), LORA)


def test_a_model_of_the_other_door_takes_no_adapter(base):
    model = get_kron_model(load_base(base), config())
    with pytest.raises(ValueError, match="already has 12 Kronecker layers"):
        get_peft_model(model, config())


def test_mixed_models_are_refused_by_peft(base):
    with pytest.raises(ValueError, match="'KRON' is not compatible with the `PeftMixedModel`"):
        get_peft_model(load_base(base), config(), mixed=True)


def test_layers_from_a_state_dict_are_refused(base):
    model = load_base(base)
    with pytest.raises(ValueError, match="takes its modules from its KronConfig; pass no state_dict"):
        peft.inject_adapter_in_model(config(), model, state_dict={})
    assert not kron_layers(model)


def test_set_adapter_can_freeze_and_thaw(base):
    model = adapted(base)
    model.set_adapter("default", inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_requires_grad("default", True)
    assert all(parameter.requires_grad for layer in kron_layers(model) for parameter in layer.parameters())
