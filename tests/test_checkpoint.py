import copy
import json
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from families import FAMILIES, VIT_SIZES, example_input, outputs_of
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

from kron_hf import KronConfig, KronLinear, get_kron_model, to_dense

CONFIG = KronConfig(block_size=(4, 8), rank=1)


def build() -> PreTrainedModel:
    """A converted tiny model with some zero blocks, as training would leave it."""
    model = get_kron_model(FAMILIES["vit"](), CONFIG).eval()
    for layer in kron_layers(model).values():
        with torch.no_grad():
            layer.s.copy_(torch.randn_like(layer.s))
            layer.s[0, 0] = 0
        layer.freeze_mask()
    return model


def kron_layers(model) -> dict[str, KronLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, KronLinear)}


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def run_python(code: str, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_converted_head_is_skipped_by_the_backbone(tmp_path):
    model = get_kron_model(
        ViTForImageClassification(ViTConfig(**VIT_SIZES, num_labels=4)),
        KronConfig(block_size=4, rank=1, target_modules=["fc1", "classifier"]),
    )
    model.save_pretrained(tmp_path)
    assert list(kron_layers(ViTModel.from_pretrained(tmp_path))) == ["layers.0.mlp.fc1", "layers.1.mlp.fc1"]
    assert "classifier" in kron_layers(ViTForImageClassification.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "save_options", [{"max_shard_size": "10KB"}, {"state_dict": True}, {"variant": "ema"}], ids=lambda o: next(iter(o))
)
def test_save_options(tmp_path, save_options):
    model = build()
    inputs = example_input(model)
    load_options = {"variant": "ema"} if "variant" in save_options else {}
    if "state_dict" in save_options:
        save_options = {"state_dict": {name: tensor * 2 for name, tensor in model.state_dict().items()}}
    model.save_pretrained(tmp_path, **save_options)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, **load_options)
    if "state_dict" in save_options:
        assert_equal(loaded.state_dict(), save_options["state_dict"])
    else:
        assert_equal(outputs_of(loaded, inputs), outputs_of(model, inputs))
    if "max_shard_size" in save_options:
        assert len(list(tmp_path.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_round_trip(tmp_path, dtype):
    model = build().to(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in example_input(model).items()}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_equal(outputs_of(loaded, inputs), outputs_of(model, inputs))


def test_dtype_on_loading_and_conversion_afterwards(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float16)
    assert_equal(loaded.state_dict(), {k: v.half() for k, v in model.state_dict().items()})
    for convert in (loaded.half, loaded.float, lambda: loaded.to(torch.bfloat16), lambda: loaded.to("cpu")):
        convert()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(layer.dead_blocks.dtype == torch.bool for layer in kron_layers(loaded).values())


@pytest.mark.parametrize(
    "load_options",
    [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}, {"attn_implementation": "eager"}],
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_load_options(tmp_path, load_options):
    model = build()
    inputs = example_input(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, **load_options)
    torch.testing.assert_close(outputs_of(loaded, inputs), outputs_of(model, inputs))
    assert_equal(loaded.state_dict(), model.state_dict())


def test_load_from_a_state_dict(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(None, config=config, state_dict=model.state_dict())
    assert_equal(loaded.state_dict(), model.state_dict())
    broken = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("0.mlp.fc1.a")}
    with pytest.raises(ValueError, match=r"vit\.layers\.0\.mlp\.fc1\.a"):
        ViTForImageClassification.from_pretrained(None, config=config, state_dict=broken)


def test_new_head_on_loading(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded.classifier.out_features == 7
    assert_equal(loaded.vit.state_dict(), model.vit.state_dict())


def test_pipeline(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path))
    from PIL import Image

    scores = {entry["label"]: entry["score"] for entry in classify(Image.new("RGB", (20, 20), (10, 200, 30)))}
    pixels = ViTImageProcessor.from_pretrained(tmp_path)(Image.new("RGB", (20, 20), (10, 200, 30)), return_tensors="pt")
    expected = outputs_of(model, dict(pixels)).softmax(-1)[0]
    assert len(kron_layers(classify.model)) == len(kron_layers(model))
    for index, label in model.config.id2label.items():
        assert scores[label] == pytest.approx(expected[index].item())


def test_saving_again_changes_nothing(tmp_path):
    build().save_pretrained(tmp_path / "first")
    AutoModelForImageClassification.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_zeros_are_zeros_in_the_file(tmp_path):
    build().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    zeros = {name: int((tensor == 0).sum()) for name, tensor in stored.items() if name.endswith(".s")}
    assert len(zeros) == 12
    assert set(zeros.values()) == {1}


def test_a_loaded_model_is_a_plain_model(tmp_path):
    build().save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")
    assert model.config.quantization_config["quant_method"] == "kron"
    assert "kron_hf" in model.model_tags


def test_another_model_with_the_same_config_object_stays_dense(tmp_path):
    config = ViTConfig(**VIT_SIZES)
    dense = ViTForImageClassification(config)
    get_kron_model(ViTForImageClassification(config), CONFIG)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


WITHOUT_KRON_HF = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
tensors = load_file(sys.argv[2])
logits = AutoModelForImageClassification.from_pretrained(sys.argv[1])(pixel_values=tensors["pixel_values"]).logits
assert "kron_hf" not in sys.modules
torch.testing.assert_close(logits.detach(), tensors["outputs"], rtol=1e-4, atol=1e-5)
print("equal")
"""


def test_to_dense_loads_without_kron_hf(tmp_path):
    model = build()
    inputs = example_input(model)
    save_file(inputs | {"outputs": outputs_of(model, inputs)}, tmp_path / "tensors.safetensors")
    to_dense(model).save_pretrained(tmp_path / "model")
    assert run_python(WITHOUT_KRON_HF, tmp_path / "model", tmp_path / "tensors.safetensors").stdout == "equal\n"


NO_IMPORT = """
import sys
from transformers import AutoModel, ViTForImageClassification
for name, load in {
    "plain": lambda d: ViTForImageClassification.from_pretrained(d),
    "backbone": lambda d: AutoModel.from_pretrained(d),
    "ignore_mismatched_sizes": lambda d: ViTForImageClassification.from_pretrained(d, ignore_mismatched_sizes=True),
    "guard_removed": lambda d: ViTForImageClassification.from_pretrained(d, fusion_config={}),
}.items():
    try:
        load(sys.argv[1])
    except Exception as error:
        print(name, "raised", "kron_hf" in str(error), flush=True)
    else:
        print(name, "LOADED", flush=True)
"""


def test_loading_without_importing_kron_hf_raises(tmp_path):
    build().save_pretrained(tmp_path)
    done = run_python(NO_IMPORT, tmp_path)
    assert done.stdout.splitlines() == [
        "plain raised True",
        "backbone raised True",
        "ignore_mismatched_sizes raised True",
        "guard_removed raised False",
    ]


def test_the_backbone_inside_a_headed_model_saves_by_itself(tmp_path):
    model = build()
    inputs = example_input(model)
    model.vit.save_pretrained(tmp_path)
    loaded = ViTModel.from_pretrained(tmp_path)
    assert_equal(outputs_of(loaded, inputs), outputs_of(model.vit, inputs))


@pytest.mark.parametrize("route", ["deepcopy", "to_dense"])
def test_trained_weights_are_known_after(tmp_path, route):
    if route == "deepcopy":
        FAMILIES["vit"]().save_pretrained(tmp_path)
        model = copy.deepcopy(ViTForImageClassification.from_pretrained(tmp_path))
    else:
        build().save_pretrained(tmp_path)
        model = to_dense(ViTForImageClassification.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="holds trained weights"):
        get_kron_model(model, CONFIG)


def test_accelerate_saves_and_loads_its_state(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(build())
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.a.zero_()
    accelerator.load_state(tmp_path / "state")
    assert_equal(model.state_dict(), expected)


def test_accelerate_save_model_loads_again(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(model), tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_equal(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("present", ["some", "none"])
def test_files_without_the_empty_tensors_load(tmp_path, present):
    model = build()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if v.numel() or (present == "some" and k.endswith("fc1.weight"))}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal(AutoModelForImageClassification.from_pretrained(tmp_path).state_dict(), model.state_dict())
    model.load_state_dict(kept)


def test_loading_with_the_config_of_a_live_model(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path, config=model.config)
    assert_equal(loaded.state_dict(), model.state_dict())


def test_the_wording_of_the_guard_is_not_part_of_the_format(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["fusion_config"] = {"kron_hf in other words": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equal(AutoModelForImageClassification.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_new_head_of_a_loaded_backbone_holds_no_trained_weights(tmp_path):
    ViTModel(ViTConfig(**VIT_SIZES)).save_pretrained(tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path, num_labels=4)
    get_kron_model(model, KronConfig(block_size=4, rank=1, target_modules=["classifier"]))
    assert list(kron_layers(model)) == ["classifier"]


def test_to_dense_keeps_fusions_of_the_user():
    model = build()
    model.config.fusion_config = {"patch_embeddings": True, **model.config.fusion_config}
    assert to_dense(model).config.fusion_config == {"patch_embeddings": True}
