"""Whole models with convolutions: round trips in a fresh process, and back to dense."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_convs import MODELS

from kron_hf import KronConfig, KronConv2d, get_kron_model, kron_summary, model_flops, to_dense
from kron_hf.sparsity.pruning import kron_layers

# argv: folder; one checkpoint a model in it, and its images.
CHILD = """
import json, sys
from pathlib import Path
folder, imported = Path(sys.argv[1]), sys.argv[2] == "kron_hf"
if imported:
    import kron_hf, tiny_convs
    from kron_hf.sparsity.pruning import kron_layers
import torch, transformers
from safetensors.torch import load_file, save_file
said = {}
for path in sorted(folder.iterdir()):
    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(path)
    except Exception as error:
        said[path.name] = f"{type(error).__name__}: {error}"
        continue
    images = load_file(path / "images.safetensors")["images"]
    with torch.no_grad():
        save_file({"logits": model(pixel_values=images).logits}, path / "logits.safetensors")
    if imported:
        said[path.name] = [type(layer).__name__ for layer in kron_layers(model)]
        model.save_pretrained(path / "again")
print(json.dumps(said))
"""


def run_child(folder: Path, first: str) -> dict:
    command = [sys.executable, "-c", CHILD, str(folder), first]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: model.converted() for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """A checkpoint of each model, and what a fresh process with kron_hf said of it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        save_file({"images": MODELS[name].images}, folder / name / "images.safetensors")
    return folder, run_child(folder, "kron_hf")


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_computes_the_same_bits_and_saves_the_same_files(saved, models, name, figures):
    folder, said = saved
    layers = kron_layers(models[name])
    assert said[name] == [type(layer).__name__ for layer in layers]
    assert "KronConv2d" in said[name]
    with torch.no_grad():
        expected = models[name](pixel_values=MODELS[name].images).logits
    assert torch.equal(load_file(folder / name / "logits.safetensors")["logits"], expected)
    for file in ("config.json", "model.safetensors"):
        assert (folder / name / "again" / file).read_bytes() == (folder / name / file).read_bytes()
    summary = kron_summary(models[name])
    figures(
        f"{sum(isinstance(layer, KronConv2d) for layer in layers)} convolutions of {len(layers)} layers, bit-equal; "
        f"deployed {summary.converted.deployed_params:,} of {summary.converted.dense_params:,} parameters"
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_map_holds_blocks_and_ranks_alone_and_zeros_are_stored_as_zeros(saved, models, name):
    folder, _ = saved
    entry = json.loads((folder / name / "config.json").read_text())["quantization_config"]
    assert (entry["format_version"], entry["quant_method"]) == (1, "kron")
    stored = load_file(folder / name / "model.safetensors")
    for path, size in entry["modules"].items():
        layer = models[name].get_submodule(path)
        assert size == {"block_size": list(layer.block_size), "rank": layer.rank}
        assert stored[f"{path}.b"].shape == layer.b.shape
        assert int((stored[f"{path}.s"] == 0).sum()) == 1


@pytest.mark.slow
def test_without_kron_hf_nothing_loads(saved, tmp_path):
    folder, _ = saved
    for name in ("resnet", "convnext", "vit-patches"):  # the class of LeNet-5 is known to the tests alone
        (tmp_path / name).symlink_to(folder / name)
    said = run_child(tmp_path, "torch")
    assert len(said) == 3
    assert all("import kron_hf" in message for message in said.values())


@pytest.mark.parametrize("name", MODELS)
def test_to_dense_is_the_plain_model_again(name, tmp_path):
    model, images = MODELS[name].converted(), MODELS[name].images
    with torch.no_grad():
        expected = model(pixel_values=images).logits
    dense = to_dense(model)
    assert [repr(module) for module in dense.modules()] == [repr(module) for module in MODELS[name]().modules()]
    dense.save_pretrained(tmp_path)
    loaded = MODELS[name].kind.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values=images).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_summary_counts_what_is_there(models, name):
    model, summary = models[name], kron_summary(models[name])
    assert summary.dense_params == sum(parameter.numel() for parameter in MODELS[name]().parameters())
    assert summary.trained_params == sum(parameter.numel() for parameter in model.parameters())
    weights = [layer.dense_weight() for layer in kron_layers(model)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert summary.sparsity == pytest.approx(zeros / sum(weight.numel() for weight in weights))
    assert json.loads(json.dumps(summary.to_dict()))["layers"][0]["kernel_size"] == (list(weights[0].shape[2:]) or None)


@pytest.mark.parametrize("name", ["lenet5", "resnet"])
def test_flops_of_a_model_are_those_of_its_layers_at_every_position(models, name):
    """`kron_summary` counts per position of the output, `model_flops` a model as it runs."""
    model, inputs = models[name], {"pixel_values": MODELS[name].images[:1]}
    positions = positions_of(model, inputs)
    layers = kron_summary(model).layers
    kron = sum(layer.forward_flops * positions[layer.name] for layer in layers)
    dense = sum(layer.dense_forward_flops * positions[layer.name] for layer in layers)
    assert model_flops(MODELS[name](), inputs).forward - model_flops(model, inputs).forward == dense - kron


def positions_of(model, inputs) -> dict[str, int]:
    """Positions of the output of each layer for one image."""
    seen: dict[str, int] = {}
    hooks = [
        layer.register_forward_hook(lambda *call, name=name: seen.update({name: call[-1].numel()}))
        for name, layer in model.named_modules()
        if layer in kron_layers(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return {name: count // model.get_submodule(name).weight_shape[0] for name, count in seen.items()}


@pytest.mark.filterwarnings("ignore:These modules need as many FLOPs as dense ones")
def test_nearest_at_full_rank_computes_what_the_dense_model_does():
    model, images = MODELS["resnet"]().double(), MODELS["resnet"].images.double()
    with torch.no_grad():
        expected = model(pixel_values=images).logits
        get_kron_model(
            model, KronConfig(block_size=2, rank=36, target_modules=["1.convolution"], init_weights="nearest")
        )
        torch.testing.assert_close(model(pixel_values=images).logits, expected)
    assert [layer.rank for layer in kron_layers(model)] == [36, 36, 36]
