"""Models with convolutions, shared: compact files, cards that hold, the page, graphs of the factors."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from kron_hf import KronConfig, KronConv2d, export, get_kron_model
from kron_hf.page.run import write_page
from kron_hf.verify.run import verify

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def build():
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": 4}
    resnet = ResNetForImageClassification(ResNetConfig(**sizes))
    config = KronConfig(block_size=4, rank=1, target_modules=r".*encoder.*convolution")
    model = get_kron_model(resnet, config).eval()
    for layer in convolutions(model):
        dead = torch.rand_like(layer.s) < 0.7
        dead[0, 0] = False
        layer.freeze_mask(dead)
    return model


def convolutions(model):
    return [layer for layer in model.modules() if isinstance(layer, KronConv2d)]


def logits(model):
    with torch.no_grad():
        return model(IMAGES).logits


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    model, folder = build(), tmp_path_factory.mktemp("shared") / "compact"
    export(model, folder, "compact")
    return model, folder


def test_compact_files_compute_the_same_bits(compact):
    model, folder = compact
    with safe_open(folder / "model.safetensors", "pt") as file:
        packed = [name for name in file.keys() if name.endswith(".live_a")]  # noqa: SIM118  # it is no dict
    assert len(packed) == 4  # the other layers would not become smaller
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model))
    for own, other in zip(convolutions(model), convolutions(loaded), strict=True):
        assert torch.equal(own.block_mask, other.block_mask)


def test_the_card_holds_until_a_weight_changes(compact):
    folder = compact[1]
    assert verify(str(folder)).holds
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".b"))
    tensors[name][0, 0, 0, 0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert not verify(str(folder)).holds


def test_the_page_shows_each_layer(compact, tmp_path):
    model, folder = compact
    write_page(str(folder), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<figure>") == len(convolutions(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch-export", "onnx"])
def test_graphs_give_the_outputs(tmp_path, kind):
    model = build()
    report = export(model, tmp_path / "graph", kind, example={"pixel_values": IMAGES})
    assert report.max_difference <= 1e-6 * report.output_scale
    assert json.loads((tmp_path / "graph" / "kron_export.json").read_text())["bytes"] == report.bytes
