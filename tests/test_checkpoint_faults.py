"""Broken checkpoints: each raises an error that names the file and the tensor or module, before anything is loaded."""

import json
import re

import pytest
import torch
from families import FAMILIES, VIT_SIZES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BertModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTForImageClassification,
)

from kron_hf import KronConfig, get_kron_model

FC1 = "vit.layers.0.mlp.fc1"


@pytest.fixture
def checkpoint(tmp_path):
    get_kron_model(FAMILIES["vit"](), KronConfig(block_size=(4, 8), rank=1)).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def load(folder, **options):
    return AutoModelForImageClassification.from_pretrained(folder, **options)


@pytest.mark.parametrize("key", ["s", "a", "b", "bias"])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["plain", "ignore_mismatched_sizes"])
def test_missing_tensor(checkpoint, key, options):
    edit_tensors(checkpoint, lambda tensors: tensors.pop(f"{FC1}.{key}"))
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{FC1}\.{key}' is missing"):
        load(checkpoint, **options)


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["plain", "ignore_mismatched_sizes"])
def test_misshapen_tensor(checkpoint, options):
    edit_tensors(checkpoint, lambda tensors: tensors.update({f"{FC1}.a": torch.zeros(1, 16, 5)}))
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: tensor '{FC1}\.a' has shape \[1, 16, 5\].*\[1, 16, 4\]"
    ):
        load(checkpoint, **options)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999], ids=str)
def test_truncated_file(checkpoint, share):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load(checkpoint)


def test_missing_shard(tmp_path):
    model = get_kron_model(FAMILIES["vit"](), KronConfig(block_size=(4, 8), rank=1))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=re.escape(shard.name)):
        load(tmp_path)


def test_missing_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(checkpoint)


def test_pickle_weights_are_refused(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: Kronecker checkpoints are safetensors files only"):
        load(checkpoint)


def test_dense_weights_under_a_kron_config(checkpoint):
    FAMILIES["vit"]().save_pretrained(checkpoint / "dense")
    (checkpoint / "dense" / "model.safetensors").rename(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'vit\.layers.*\.s' is missing"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=3), r"format_version is 3, this kron_hf reads up to 2; upgrade kron_hf"),
        (lambda q: q.update(format_version="1"), "format_version must be an int, got '1'"),
        (lambda q: q.pop("format_version"), "format_version must be an int, got None"),
        (lambda q: q.update(modules={}), "modules must be a non-empty dict"),
        (lambda q: q.update(modules=["fc1"]), "modules must be a non-empty dict"),
        (lambda q: q.update(extra=1), r"unknown keys \['extra'\]"),
        (lambda q: q["modules"][FC1].pop("rank"), rf"modules\['{FC1}'\] must be"),
        (lambda q: q["modules"][FC1].update(rank=0), rf"modules\['{FC1}'\] must be"),
        (lambda q: q["modules"][FC1].update(rank=True), rf"modules\['{FC1}'\] must be"),
        (lambda q: q["modules"][FC1].update(rank=10**12), rf"'{FC1}'.*rank must be an int from 1 to bo \* bi = 32"),
        (lambda q: q["modules"][FC1].update(block_size=8), rf"modules\['{FC1}'\] must be"),
        (lambda q: q["modules"][FC1].update(block_size=[5, 8]), rf"'{FC1}' is \(64, 32\).*does not divide"),
        (lambda q: q["modules"][FC1].update(block_size=[-1, 8]), rf"modules\['{FC1}'\] must be"),
        (lambda q: q["modules"].update(nowhere={"block_size": [4, 8], "rank": 1}), "has no module 'nowhere'"),
        (
            lambda q: q["modules"].update({"vit.layernorm": {"block_size": [4, 8], "rank": 1}}),
            r"'vit\.layernorm': only nn\.Linear and nn\.Conv2d can become a Kronecker layer, this is a LayerNorm",
        ),
        (
            lambda q: q["modules"].update(classifier={"block_size": [1, 8], "rank": 1}),
            r"tensor 'classifier\.s' is missing",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_module_map(checkpoint, change, message):
    edit_config(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


def test_a_module_missing_from_the_map(checkpoint):
    edit_config(checkpoint, lambda q: q["modules"].pop(FC1))
    with pytest.raises(ValueError, match=rf"model\.safetensors holds Kronecker factors of '{FC1}'"):
        load(checkpoint, ignore_mismatched_sizes=True)


def test_unknown_keys_that_are_names_of_arguments(checkpoint):
    edit_config(checkpoint, lambda q: q.update(self=1, cls=2))
    with pytest.raises(ValueError, match=r"unknown keys \['cls', 'self'\]"):
        load(checkpoint)


def test_messages_are_bounded(checkpoint):
    deep: object = 1
    for _ in range(8):
        deep = {"a" * 500: [deep] * 2}
    edit_config(checkpoint, lambda q: q["modules"].update({"x" * 10_000: {"block_size": deep, "rank": [1] * 10_000}}))
    with pytest.raises(ValueError, match="must be") as caught:
        load(checkpoint)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", [f"{FC1}.s", f"{FC1}.a", f"{FC1}.b", f"{FC1}.bias", "vit.layernorm.weight"])
def test_integers_where_parameters_are_floats(checkpoint, key):
    edit_tensors(checkpoint, lambda tensors: tensors.update({key: tensors[key].long()}))
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{re.escape(key)}' has dtype I64, not one of"):
        load(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_floats_are_cast(checkpoint, dtype):
    edit_tensors(checkpoint, lambda tensors: tensors.update({f"{FC1}.a": tensors[f"{FC1}.a"].to(dtype)}))
    assert load(checkpoint).vit.layers[0].mlp.fc1.a.dtype == torch.float32


def test_values_that_are_not_finite_load_as_they_are(checkpoint):
    def spoil(tensors):
        tensors[f"{FC1}.s"][0, 0] = float("nan")
        tensors[f"{FC1}.a"][0, 0, 0] = float("inf")

    edit_tensors(checkpoint, spoil)
    layer = load(checkpoint).vit.layers[0].mlp.fc1
    assert layer.s[0, 0].isnan()
    assert layer.a[0, 0, 0].isinf()
    assert layer.dead_blocks is None


def test_tensors_with_unprintable_names(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({"\x1b[2J": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"model\.safetensors: the name of tensor '\\x1b\[2J' holds unprintable"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("shard", "error", "message"),
    [
        ("../outside.safetensors", ValueError, r"outside\.safetensors lies outside of the checkpoint's directory"),
        ("sub/../../outside.safetensors", ValueError, "lies outside of the checkpoint's directory"),
        ("/etc/passwd", ValueError, "passwd lies outside of the checkpoint's directory"),
        ("pytorch_model.bin", ValueError, r"pytorch_model\.bin: Kronecker checkpoints are safetensors files only"),
        ("gone.safetensors", FileNotFoundError, r"gone\.safetensors: this file of the checkpoint does not exist"),
        ("folder.safetensors", FileNotFoundError, r"folder\.safetensors: this file of the checkpoint does not exist"),
    ],
)
def test_index_that_points_elsewhere(checkpoint, shard, error, message):
    inner = checkpoint / "model"
    inner.mkdir()
    (inner / "folder.safetensors").mkdir()
    (checkpoint / "config.json").rename(inner / "config.json")
    weights = (checkpoint / "model.safetensors").rename(checkpoint / "outside.safetensors")
    torch.save(load_file(weights), inner / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), shard)}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        load(inner)


def test_a_folder_under_a_path_with_dots_and_links(checkpoint, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(checkpoint)
    assert load(link / ".." / ".." / checkpoint.parent.name / checkpoint.name)
    assert load(link)


CLAIMS = [
    pytest.param({"num_hidden_layers": 10**9}, "'num_hidden_layers' claims 1e[+]09, at most 1024", id="layers"),
    pytest.param({"task_specific_params": {"depths": [600, 600]}}, "'depths' claims 1200, at most 1024", id="depths"),
    pytest.param({"intermediate_size": 10**9}, r"fc1.*does not divide|has shape .*config\.json requires", id="width"),
    pytest.param({"hidden_size": 2**28}, r"has shape .*config\.json requires", id="hidden"),
    pytest.param({"image_size": 2**20}, r"claims a model of 5.498e[+]11 elements, but", id="images"),
    pytest.param({"num_channels": 10**9}, r"claims a model of 2.048e[+]12 elements, but", id="channels"),
    pytest.param({"id2label": {"0": json.loads("[" * 50 + "]" * 50)}}, "nested deeper than 32 levels", id="nested"),
]


@pytest.mark.parametrize(("claims", "message"), CLAIMS)
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["plain", "ignore_mismatched_sizes"])
def test_claims_are_checked_before_anything_is_allocated(checkpoint, claims, message, options):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | claims))
    with pytest.raises(ValueError, match=message):
        load(checkpoint, **options)


def test_a_new_head_of_many_classes_is_no_false_claim(checkpoint):
    model = load(checkpoint, num_labels=30_000, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (30_000, VIT_SIZES["hidden_size"])


def test_a_linear_whose_weight_is_read_directly(tmp_path):
    sizes = {key: value for key, value in VIT_SIZES.items() if key != "num_labels"}
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(tmp_path)
    name = next(
        name
        for name, module in SiglipVisionModel(SiglipVisionConfig(**sizes)).named_modules()
        if isinstance(module, nn.MultiheadAttention)
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "kron",
        "format_version": 1,
        "modules": {f"{name}.out_proj": {"block_size": [4, 8], "rank": 1}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"out_proj': only .* this is a NonDynamicallyQuantizableLinear"):
        SiglipVisionModel.from_pretrained(tmp_path)


def test_another_architecture(checkpoint):
    with pytest.raises(ValueError, match="BertModel has no module"):
        BertModel.from_pretrained(checkpoint)


def test_dense_checkpoint_with_a_quantization_config(tmp_path):
    FAMILIES["vit"]().save_pretrained(tmp_path)
    quantization_config = {
        "quant_method": "kron",
        "format_version": 1,
        "modules": {FC1: {"block_size": [4, 8], "rank": 1}},
    }
    with pytest.raises(ValueError, match="this checkpoint is dense: load it without quantization_config"):
        ViTForImageClassification.from_pretrained(tmp_path, quantization_config=quantization_config)


def test_a_smaller_model_than_the_map(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = VIT_SIZES["num_hidden_layers"] - 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no module 'vit\.layers\.1\.attention\.k_proj'"):
        load(checkpoint)
