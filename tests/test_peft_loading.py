"""Adapters saved and loaded through every stock call, bit-equal."""

import json
import shutil

import peft
import pytest
import torch
import transformers as hf
from families import outputs_of
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_peft import (
    DOORS,
    INPUTS,
    PEFT_NOISE,
    adapted,
    config,
    dead_blocks,
    load_base,
    logits,
    prune,
    quiet_peft,
    save_base,
)

from kron_hf import KronConfig, get_kron_model
from kron_hf.sparsity.pruning import kron_layers

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """An adapter with zeros in S and a head of its own: its folder, and what the model gave before saving."""
    folder = tmp_path_factory.mktemp("adapter")
    with quiet_peft():
        model = adapted(base, modules_to_save=["classifier"])
    model.save_pretrained(folder)
    return folder, logits(model)


LOADERS = {
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(load_base(base), adapter),
    "PeftModel, trainable": lambda base, adapter: PeftModel.from_pretrained(
        load_base(base), adapter, is_trainable=True
    ),
    "PeftModel, low_cpu_mem_usage": lambda base, adapter: PeftModel.from_pretrained(
        load_base(base), adapter, low_cpu_mem_usage=True
    ),
    "PeftModel, low_cpu_mem_usage, trainable": lambda base, adapter: PeftModel.from_pretrained(
        load_base(base), adapter, low_cpu_mem_usage=True, is_trainable=True
    ),
    "PeftModel, another name": lambda base, adapter: PeftModel.from_pretrained(load_base(base), adapter, "mine"),
    "PeftModel, config given": lambda base, adapter: PeftModel.from_pretrained(
        load_base(base), adapter, config=PeftConfig.from_pretrained(adapter)
    ),
    "AutoPeftModel": lambda base, adapter: AutoPeftModel.from_pretrained(adapter),
    "load_adapter": lambda base, adapter: with_loaded(load_base(base), adapter),
    "load_adapter, trainable": lambda base, adapter: with_loaded(load_base(base), adapter, is_trainable=True),
    "AutoModelForImageClassification": lambda base, adapter: load_base(adapter),
}
TRAINABLE = [name for name in LOADERS if "trainable" in name]


def with_loaded(model, adapter, **options):
    model.load_adapter(str(adapter), **options)
    return model


def test_the_adapter_file_holds_the_factors_and_the_head_alone(saved):
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    keys = {name.rpartition(".")[2] for name in tensors if ".kron_layers." in name}
    assert keys == {"s", "a", "b", "bias"}
    assert len(tensors) == 12 * 4 + 2
    stored = json.loads((saved[0] / "adapter_config.json").read_text())
    assert stored["peft_type"] == "KRON"
    assert len(stored["modules"]) == 12
    assert stored["modules"]["vit.layers.0.mlp.fc1"] == {"block_size": [4, 8], "rank": 2}
    assert stored["modules_to_save"] == ["classifier"]
    selections = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    assert [stored[key] for key in selections] == [None] * 4
    assert (stored["block_size_pattern"], stored["rank_pattern"]) == ({}, {})


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_gives_the_same_model(base, saved, name):
    model = LOADERS[name](base, saved[0])
    assert torch.equal(logits(model), saved[1])
    assert all(dead is not None and int(dead.sum()) == dead.numel() // 2 for dead in dead_blocks(model))
    grads = [parameter.requires_grad for layer in kron_layers(model) for parameter in layer.parameters()]
    assert set(grads) == {name in TRAINABLE}
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_pipeline_on_an_adapter_folder(saved):
    processor = hf.ViTImageProcessor(size={"height": 16, "width": 16})
    classify = hf.pipeline("image-classification", model=str(saved[0]), image_processor=processor, device="cpu")
    image = hf.image_utils.to_numpy_array(INPUTS["pixel_values"][0]).transpose(1, 2, 0)
    from PIL import Image

    picture = Image.fromarray(((image - image.min()) / (image.max() - image.min()) * 255).astype("uint8"))
    found = classify(picture)
    expected = logits_of(saved[0], processor(picture, return_tensors="pt"))
    assert [entry["score"] for entry in found] == pytest.approx(expected.softmax(-1).sort(descending=True)[0].tolist())


@torch.no_grad()
def logits_of(adapter, inputs):
    return load_base(adapter).eval()(**inputs).logits[0]


def test_saving_again_gives_the_same_files(base, saved, tmp_path):
    model = PeftModel.from_pretrained(load_base(base), saved[0])
    model.save_pretrained(tmp_path)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (saved[0] / file).read_bytes()


def test_add_adapter_saves_the_same_format(base, tmp_path):
    model = DOORS["add_adapter"](base, modules_to_save=["classifier"])
    prune(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_base(tmp_path)), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(base), tmp_path)), expected)


def test_state_dicts_pass_between_models_without_sharing_memory(base):
    torch.manual_seed(1)
    first = adapted(base)
    torch.manual_seed(2)
    for second in (
        get_peft_model(load_base(base), config()),
        get_peft_model(load_base(base), first.peft_config["default"]),  # waits for tensors on the meta device
    ):
        state = peft.get_peft_model_state_dict(first)
        assert len(state) == 12 * 4
        assert not peft.set_peft_model_state_dict(second, state).unexpected_keys
        assert torch.equal(logits(second), logits(first))
        kept = kron_layers(first)[0].a.clone()
        with torch.no_grad():
            kron_layers(second)[0].a.zero_()
        assert torch.equal(kron_layers(first)[0].a, kept)


def test_loading_into_the_same_adapter_replaces_its_weights(base, saved):
    model = get_peft_model(load_base(base), config(modules_to_save=["classifier"]))
    assert not torch.equal(logits(model), saved[1])
    model.load_adapter(saved[0], "default")
    assert torch.equal(logits(model), saved[1])


@pytest.mark.parametrize("loader", ["PeftModel", "load_adapter"])
@pytest.mark.parametrize(("made_on", "loaded_on"), [("head", "backbone"), ("backbone", "head")])
def test_backbone_and_headed_class_load_each_others_adapters(base, tmp_path, loader, made_on, loaded_on):
    classes = {"head": hf.ViTForImageClassification, "backbone": hf.ViTModel}

    def hidden(model):
        return outputs_of(getattr(model, "vit", model), INPUTS)

    original = classes[made_on].from_pretrained(base)
    get_peft_model(original, config(modules_to_save=["classifier"] if made_on == "head" else None)).save_pretrained(
        tmp_path
    )
    model = classes[loaded_on].from_pretrained(base)
    if loader == "PeftModel":
        PeftModel.from_pretrained(model, tmp_path)
    else:
        model.load_adapter(str(tmp_path))
    assert torch.equal(hidden(model), hidden(original))


def test_a_stored_map_converts_under_the_other_door_too(base, saved):
    model = get_kron_model(
        load_base(base), KronConfig(modules=PeftConfig.from_pretrained(saved[0]).modules, init_weights="random")
    )
    assert {(layer.block_size, layer.rank) for layer in kron_layers(model)} == {((4, 8), 2)}
    assert len(kron_layers(model)) == 12


def test_low_cpu_mem_usage_of_a_new_adapter_waits_for_weights(base):
    model = get_peft_model(load_base(base), config(), low_cpu_mem_usage=True)
    assert all(layer.s.is_meta for layer in kron_layers(model))
    source = adapted(base)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert torch.equal(logits(model), logits(source))


def test_a_stored_config_without_its_weights_does_not_run(base, saved):
    model = get_peft_model(load_base(base), PeftConfig.from_pretrained(saved[0]))
    for run in (logits, lambda model: model.merge_and_unload()):
        with pytest.raises(ValueError, match=r"q_proj: the adapter's s, a, b, bias were not loaded"):
            run(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_the_adapter_has_the_dtype_of_the_model(base, saved, tmp_path, dtype, low):
    model = get_peft_model(load_base(base, dtype=dtype), config())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    inputs = {"pixel_values": INPUTS["pixel_values"].to(dtype)}
    expected = outputs_of(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base(base, dtype=dtype), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(outputs_of(loaded, inputs), expected)
    other = PeftModel.from_pretrained(load_base(base, dtype=dtype), saved[0], low_cpu_mem_usage=low)
    assert {layer.a.dtype for layer in kron_layers(other)} == {dtype}  # whatever the file holds


DAMAGE = {
    "a missing tensor": (lambda tensors, key: tensors.pop(key), "lack tensor .*{key}"),
    "a misshapen tensor": (lambda tensors, key: tensors.update({key: tensors[key][:1]}), r"{key}.* has shape \[1, "),
    "a layer that the map lacks": (
        lambda tensors, key: tensors.update({key.replace("layers.0", "layers.9"): torch.zeros(1)}),
        "which its config does not name",
    ),
}


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_weights_are_an_error(base, saved, tmp_path, damage, message, low):
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    key = min(name for name in tensors if name.endswith(".s"))
    damage(tensors, key)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(saved[0] / "adapter_config.json", tmp_path)
    with pytest.raises(ValueError, match=message.format(key=r"q?k?v?o?_proj\.kron_layers\.default\.s")):
        PeftModel.from_pretrained(load_base(base), tmp_path, low_cpu_mem_usage=low)


def test_load_adapter_never_runs_on_weights_that_the_file_lacks(base, saved, tmp_path):
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    del tensors["base_model.model.vit.layers.1.mlp.fc2.kron_layers.b"]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(saved[0] / "adapter_config.json", tmp_path)
    model = load_base(base)
    report = model.load_adapter(str(tmp_path))
    assert report.missing_keys == {"vit.layers.1.mlp.fc2.kron_layers.default.b"}
    with pytest.raises(ValueError, match=r"vit\.layers\.1\.mlp\.fc2: the adapter's b were not loaded"):
        logits(model)
