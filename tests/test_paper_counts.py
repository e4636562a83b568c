"""The committed counts of the paper's models are what the command gives, and fit what the paper prints."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMITTED = json.loads((ROOT / "examples" / "results" / "paper_counts.json").read_text())
PAPER_SETTING = {"block_size": 4, "rank": 1}


@pytest.fixture
def command(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("examples.experiments.paper_counts")


def count(model, **setting):
    return next(row for row in COMMITTED["counts"] if row["model"] == model and setting.items() <= row.items())


@pytest.mark.slow
def test_the_command_gives_what_is_committed(tmp_path):
    output = tmp_path / "counts.json"
    words = [sys.executable, "-m", "examples.experiments.paper_counts", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text()) == COMMITTED
    assert "ViT-tiny, training FLOPs: published 65.37M; ours: rank 1 2,822.709M" in done.stdout


@pytest.mark.parametrize(("block_size", "rank"), [(None, None), (4, 1)], ids=["dense", "4x4"])
def test_vit_tiny_counts_as_committed(command, block_size, rank):
    assert command.count_row("ViT-tiny", block_size, rank) == count("ViT-tiny", block_size=block_size, rank=rank)


def test_vit_tiny_is_read_as_committed(command):
    published = [figure for figure in COMMITTED["published"] if figure["model"] == "ViT-tiny"]
    traces = command.traces_of("ViT-tiny")
    for figure, wanted in zip(command.PUBLISHED, published, strict=False):
        readings = command.readings(figure.what, traces)
        fitting = [reading._asdict() for reading in readings if command.fits(figure, reading.count)]
        assert (figure._asdict().items() <= wanted.items(), len(readings)) == (True, wanted["readings_tried"])
        assert fitting == wanted["readings_that_fit"]


def test_settings_are_those_that_are_committed(command):
    assert list(command.settings()) == [(row["model"], row["block_size"], row["rank"]) for row in COMMITTED["counts"]]


def test_vit_tiny_by_hand():
    width, tokens, layers = 192, 197, 12
    weights = layers * 12 * width**2
    dense = 5_543_716  # 12 layers of 4 projections and an MLP of 4 x 192, patches of 16 x 16, 100 classes
    blocks = weights // 16
    b = layers * 6 * 16
    kron = count("ViT-tiny", **PAPER_SETTING)
    assert count("ViT-tiny", rank=None)["trained_params"] == dense
    assert kron["trained_params"] == dense - weights + 2 * blocks + b
    assert kron["nonzeros_at_50"] == kron["deployed_params"] == dense - weights + blocks + b  # half of S and A, or A
    attention = layers * 2 * 2 * tokens**2 * width
    patches, head = 2 * 196 * 768 * width, 2 * width * 100
    square = 2 * (width * 4 + width * width // 4)
    wide = 2 * (width * 4 + 4 * width * width // 4)
    forward = tokens * layers * (4 * square + 2 * wide) + attention + patches + head
    assert kron["forward_flops"] == forward
    assert kron["training_flops"] == 3 * forward - patches


@pytest.mark.parametrize("figure", COMMITTED["published"], ids=lambda figure: f"{figure['model']} {figure['what']}")
def test_every_published_figure_has_a_reading(figure):
    number, unit = figure["printed"][:-1], {"M": 1e6, "G": 1e9}[figure["printed"][-1]]
    half_a_digit = 0.5 * 10 ** -len(number.partition(".")[2])
    assert figure["readings_that_fit"]
    for reading in figure["readings_that_fit"]:
        assert abs(reading["count"] / unit - float(number)) <= half_a_digit
    assert abs(figure["nearest_other"]["count"] / unit - float(number)) > half_a_digit


def test_parts_of_our_forward_are_all_of_it():
    figures = [figure for figure in COMMITTED["published"] if figure["our_forward_flops"]]
    assert len(figures) == 4
    for figure in figures:
        setting = {"rank": None} if figure["what"].startswith("dense") else PAPER_SETTING
        assert sum(figure["our_forward_flops"].values()) == count(figure["model"], **setting)["forward_flops"]
        # The dense products were traced by hooks, the whole by the dispatcher: they agree if nothing is left over.
        if setting["rank"] is None and figure["model"] == "ViT-tiny":
            assert figure["our_forward_flops"]["projections"] == 197 * 2 * 12 * 12 * 192**2
