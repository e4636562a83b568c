"""The experiment that converts a backbone: every way of it on a tiny one, with noise for images."""

import dataclasses
import json

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from examples.conversion import images, run
from examples.conversion.plan import PLAN, Conversion
from examples.conversion.report import differences, table
from examples.conversion.saliency import SALIENCIES, compare, surgeon
from kron_hf.calibration.block_pruning import block_saliency
from kron_hf.calibration.fit import error_scale
from kron_hf.calibration.moments import Moments


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(image_size=56, **sizes, initializer_range=0.1)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def noise(monkeypatch):
    """Images in the place of Fashion-MNIST and of the photographs."""

    def some(part, start=0, count=None, seed=0):
        generator = torch.Generator().manual_seed(len(part) + seed)
        pixels = torch.randn(40, 3, images.SIZE, images.SIZE, generator=generator)
        return pixels[:count], torch.arange(40)[:count] % 2

    monkeypatch.setattr(run, "POOL", 40)
    monkeypatch.setattr(run, "fashion", some)
    monkeypatch.setattr(run, "photograph_crops", lambda part, count, seed=0: some(part, count=count, seed=seed))


@pytest.mark.filterwarnings("ignore:init_weights='nearest' kept")
@pytest.mark.parametrize(
    "conversion",
    [
        pytest.param({"budget": 0.5}, id="budget"),
        pytest.param(
            {"budget": 0.5, "menu": ((1, -1),), "distill_steps": 2, "learning_rate": 1e-4}, id="low rank, distilled"
        ),
        pytest.param({"block_size": (4, 32), "rank": 2, "mixed": True}, id="uniform, mixed"),
        pytest.param({"method": "nearest", "block_size": (4, 32), "rank": 2}, id="nearest"),
    ],
)
def test_a_conversion_is_measured_and_shown(conversion, backbone, noise):
    conversion = Conversion(**conversion, images=20)
    row = vars(conversion) | run._measured(backbone, conversion, run._probes(backbone))
    row = json.loads(json.dumps(row))
    assert run._key(row) == run._key(vars(conversion))
    assert row["params_of_dense"] <= 0.5
    assert row["feature_error"] > 0
    assert all(0 <= row[f"{prefix}{key}"] <= 1 for prefix in ("", "photograph_") for key in ("refit", "kept", "dense"))
    header, _, dense, line = table([row]).splitlines()
    assert header.count("|") == dense.count("|") == line.count("|")
    assert f"| {row['params_of_dense']:.3f} |" in line


def test_chosen_shapes_are_compared_with_low_rank_seed_by_seed():
    plain = {"budget": 0.04, "mixed": False, "distill_steps": 0, "refit": 0.5, "photograph_refit": 0.0}
    rows = [
        plain | {"menu": menu, "seed": seed, "kept": kept, "photograph_kept": 1.0 if menu else 0.75}
        for menu, seed, kept in [
            (None, 0, 0.7),
            (None, 1, 0.8),
            (None, 2, 0.1),
            ([[1, -1]], 1, 0.6),
            ([[1, -1]], 0, 0.6),
        ]
    ]
    rows.append(rows[0] | {"mixed": True, "kept": 0.0})
    last = differences(rows).splitlines()[-1]
    assert last == "| 0.04 | +0.000 ± 0.000 | +0.150 ± 0.050 | +0.000 ± 0.000 | -0.250 ± 0.000 | 2 |"


def test_all_declared_conversions_differ():
    assert len({run._key(vars(conversion)) for conversion in PLAN}) == len(PLAN)


def test_crops_of_photographs_are_of_their_own_halves(monkeypatch):
    left_black = torch.zeros(1, 3, 90, 120)
    left_black[..., 60:] = 1
    monkeypatch.setattr(images, "_photograph", lambda name: left_black)
    black, white = (images.photograph_crops(part, 9)[0] * images.STD + images.MEAN for part in ("train", "test"))
    torch.testing.assert_close(black, torch.zeros_like(black), rtol=0, atol=1e-6)
    torch.testing.assert_close(white, torch.ones_like(white), rtol=0, atol=1e-6)
    pixels, labels = images.photograph_crops("calibration", 20, seed=1)
    assert pixels.shape == (20, 3, 56, 56)
    assert set(labels.tolist()) == set(range(9))
    assert torch.equal(pixels, images.photograph_crops("calibration", 20, seed=1)[0])
    assert not torch.equal(pixels, images.photograph_crops("calibration", 20, seed=2)[0])


def test_measures_of_what_a_block_is_worth_are_compared(backbone):
    model = Dinov2Model.from_pretrained(backbone).eval()
    fitted_on, held_out = torch.randn(2, 20, 3, images.SIZE, images.SIZE, generator=torch.Generator().manual_seed(0))
    errors = compare(model, fitted_on, held_out, size=8, rank=2)
    assert list(errors) == ["not pruned", *SALIENCIES]
    assert {len(each) for each in errors.values()} == {6}
    assert all(min(each) > 0 and max(each) < 2 for each in errors.values())
    assert len({tuple(errors[name]) for name in SALIENCIES}) == 3  # they choose other blocks


def test_the_surgeon_counts_what_other_entries_make_up_for():
    """With uncorrelated inputs there is nothing to make up for: the error of leaving a block out, and its ridge."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator) * torch.arange(1, 9)
    moments = Moments(8)
    moments.update(x)
    covariances = moments.result().linear(torch.randn(4, 8, generator=generator))
    covariances = dataclasses.replace(covariances, c=torch.diag(covariances.c.diagonal()))
    a, b = torch.randn(2, 2, 4, generator=generator), torch.randn(2, 2, 2, generator=generator)
    alone = block_saliency(covariances, None, a, b) * error_scale(covariances)
    torch.testing.assert_close(surgeon(covariances, None, a, b).to(alone), alone, rtol=1e-2, atol=1e-3)
