import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace

import evaluate
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from kron_hf import KronLinear, kron_summary
from kron_hf.data.idx import read_idx
from kron_hf.demo.evaluation import evaluate_in_fresh_process
from kron_hf.demo.images import load_image_data
from kron_hf.demo.report import draw_masks
from kron_hf.demo.run import check_output_dir, run_demo
from kron_hf.demo.training import Recipe, build_model
from kron_hf.metrics import ACCURACY

TINY = Recipe(hidden_size=32, layers=1, epochs=4, learning_rates=(3e-3, 6e-3), block_size=4, rank=2)


@pytest.fixture(scope="module")
def digits():
    return load_image_data("digits")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory, lines = tmp_path_factory.mktemp("demo") / "out", []
    return directory, run_demo(directory, recipe=TINY, write=lines.append), "\n".join(lines)


def test_demo_end_to_end(demo):
    directory, metrics, report = demo
    assert metrics == json.loads((directory / "metrics.json").read_text())
    assert metrics["sparsity"] >= 0.499
    assert 0.2 < metrics["eval_accuracy"] <= 1  # four epochs of a tiny model: well above chance
    assert metrics["steps"] == 40
    rates = [run["learning_rate"] for run in metrics["search"]["dense"]]
    assert sorted(rates) == sorted(run["learning_rate"] for run in metrics["search"]["kronecker"]) == [3e-3, 6e-3]
    assert f"{metrics['eval_accuracy']:.4f}" in report
    assert "▜" in report
    assert (directory / "masks.png").read_bytes().startswith(b"\x89PNG")
    card = (directory / "README.md").read_text()
    assert "import kron_hf" in card
    assert str(directory.parent) not in card


def test_figures_are_those_of_the_saved_models(demo):
    directory, metrics, _ = demo
    summary = kron_summary(AutoModelForImageClassification.from_pretrained(directory))
    dense = AutoModelForImageClassification.from_pretrained(directory / "dense")
    assert metrics["trainable_params"] == summary.trained_params
    assert metrics["deployed_params"] == summary.deployed_params
    assert metrics["dense_params"] == sum(parameter.numel() for parameter in dense.parameters())
    assert metrics["sparsity"] == summary.sparsity
    assert metrics["file_bytes"] == (directory / "model.safetensors").stat().st_size


def test_snippet_of_the_card_loads_the_demo(demo):
    code = (demo[0] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    where = demo[0].parent  # the card names the directory, not the path to it
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_demo_replaces_an_earlier_demo_only(demo, tmp_path):
    check_output_dir(demo[0])
    check_output_dir(tmp_path)
    check_output_dir(tmp_path / "new")
    (tmp_path / "metrics.json").write_text('{"accuracy": 1}')
    with pytest.raises(FileExistsError, match="not written by kron-hf demo"):
        check_output_dir(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        check_output_dir(tmp_path / "metrics.json")


@pytest.mark.slow
def test_failure_of_the_fresh_process_is_shown(tmp_path):
    with pytest.raises(RuntimeError, match="fresh process failed"):
        evaluate_in_fresh_process([tmp_path])


def test_default_recipe_is_below_dense(digits):
    recipe = Recipe()
    summary = kron_summary(build_model(recipe, digits, kronecker=True, seed=0))
    assert summary.trained_params < 0.6 * summary.dense_params
    assert all(layer.forward_flops < layer.dense_forward_flops for layer in summary.layers)
    dense = build_model(recipe, digits, kronecker=False, seed=0)
    assert summary.dense_params == sum(parameter.numel() for parameter in dense.parameters())


def test_digits_have_fixed_disjoint_stratified_splits(digits):
    again = load_image_data("digits")
    rows = {}
    for split in ("train", "validation", "test"):
        plain = getattr(digits, split).with_format(None)
        assert plain["image"] == getattr(again, split).with_format(None)["image"]
        counts = np.bincount(plain["label"], minlength=10)
        assert counts.max() - counts.min() <= 0.1 * len(plain)
        rows[split] = len(plain)
    assert rows == {"train": 1200, "validation": 237, "test": 360}
    images = [
        image
        for split in ("train", "validation", "test")
        for image in getattr(digits, split).with_format(None)["image"]
    ]
    assert len(set(images)) == 1797  # no two digits are the same image, so none is in two splits


def test_only_training_images_are_shifted(digits):
    row = digits.validation[0]
    torch.testing.assert_close(row["pixel_values"], digits.validation[0]["pixel_values"], rtol=0, atol=0)
    variants = {digits.train[0]["pixel_values"].numpy().tobytes() for _ in range(40)}
    assert 1 < len(variants) <= 9


def test_pixels_are_normalised(digits):
    pixels = torch.stack([digits.validation[i]["pixel_values"] for i in range(237)])
    assert pixels.shape == (237, 1, 8, 8)
    assert abs(float(pixels.mean())) < 0.05
    assert abs(float(pixels.std()) - 1) < 0.05


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


@pytest.mark.parametrize("suffix", [pytest.param("", id="plain"), pytest.param(".gz", id="gzip")])
def test_folder_with_idx_files(tmp_path, suffix):
    generator = np.random.default_rng(0)
    for split, count in (("train", 50), ("t10k", 7)):
        images = generator.integers(0, 256, (count, 12, 12), dtype=np.uint8)
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 5)
    data = load_image_data(str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (45, 5, 7)
    assert (data.size, data.label_names) == (12, ["0", "1", "2", "3", "4"])
    pixels = data.test[6]["pixel_values"] * data.std + data.mean
    torch.testing.assert_close(pixels[0], torch.from_numpy(images[6]) / 255, rtol=0, atol=1e-6)
    assert data.test[6]["labels"] == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(b"", "not an IDX file", id="empty"),
        pytest.param(b"\x00\x00\x0d\x01\x00\x00\x00\x01x", "not an IDX file", id="floats"),
        pytest.param(b"\x00\x00\x08\x03\x00\x00", "not an IDX file", id="header-cut-off"),
        pytest.param(b"\x00\x00\x08\x01\x00\x00\x00\x05abc", r"announces \[5\], 5 bytes, but 3 follow", id="cut-off"),
    ],
)
def test_broken_idx_file(tmp_path, raw, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw: raw[:-12], id="cut-off"),
        pytest.param(lambda raw: raw[:-8] + bytes(8), id="checksum"),
        pytest.param(lambda raw: raw[:10] + b"\xff" * (len(raw) - 10), id="deflate"),
        pytest.param(lambda raw: b"no gzip", id="foreign"),
    ],
)
def test_broken_gzip(tmp_path, damage):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.compress(b"\x00\x00\x08\x01" * 50)))
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_idx(path)


def test_unknown_data():
    with pytest.raises(FileNotFoundError, match="'digits', 'fashion_mnist' or a folder"):
        load_image_data("cifar")


def test_missing_idx_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither train-images-idx3-ubyte nor"):
        load_image_data(str(tmp_path))


def test_accuracy_metric_loads_offline():
    metric = evaluate.load(ACCURACY)
    assert metric.compute(predictions=[1, 2, 3, 4], references=[1, 2, 3, 0]) == {"accuracy": 0.75}


def test_masks_are_drawn_block_by_block():
    mask = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 1, 0]], dtype=torch.bool)
    assert draw_masks({"vit.layers.0.mlp.fc1": mask}).splitlines() == ["0 fc1", "▘▌", "▝"]


def test_masks_wrap_at_the_width():
    picture = draw_masks({f"layers.{i}.fc": KronLinear(16, 8, 4, 1).block_mask for i in range(3)}, width=12)
    assert re.findall(r"\d fc", picture) == ["0 fc", "1 fc", "2 fc"]
    assert max(map(len, picture.splitlines())) <= 12
    assert len(picture.splitlines()) == 2 + 1 + 2


def test_recipe_counts_the_last_short_batch():
    assert replace(TINY, epochs=2, batch_size=100).steps(250) == 6
