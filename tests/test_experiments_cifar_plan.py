"""The declared recipes of `examples/experiments/cifar100`, and what command lines make of them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "experiments" / "cifar100"))

from dry_run import describe
from measuring import model_figures
from recipe import RECIPES, load_recipes
from run_plan import make_plan, parse_arguments
from sparsity_methods import build_dense

VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


@pytest.mark.parametrize("model", ["vit-tiny", "swin-tiny"])
def test_dry_run_tells_what_would_be_run(model):
    told = describe(make_plan(parse_arguments(None, ["--model", model, "--method", "kron_target", "--rank", "1"])))
    assert "steps: 26,400, 88 an epoch of 45,000 images, 440 to warm up" in told
    assert "images a step: 512 = 64 x 1 processes x 8 accumulated" in told
    assert {"vit-tiny": "5,543,716 dense", "swin-tiny": "27,596,254 dense"}[model] in told
    assert {"vit-tiny": "960,170,496 of 2,507,020,800 dense", "swin-tiny": "of 8,979,750,912 dense"}[model] in told


def test_declared_recipes_are_the_papers():
    recipes = load_recipes()
    assert recipes.models.keys() == {"vit-tiny", "vit-base", "swin-tiny"}
    baselines = {"group_lasso", "elastic_group_lasso", "block_rigl", "iterative_pruning", "gradual_pruning"}
    assert recipes.methods.keys() == {"dense", "kron_target", "kron_l1", "selection"} | baselines
    assert recipes.methods["kron_target"].rate(4) == 1e-4
    assert recipes.methods["kron_target"].rate(1) == 1e-3
    training, images = recipes.training, recipes.augmentation
    assert (training.epochs, training.warmup_epochs, training.global_batch) == (300, 5, 512)
    assert (training.weight_decay, training.drop_path) == (0.05, 0.1)
    assert (images.mixup, images.cutmix, images.label_smoothing, images.erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (images.magnitude, images.magnitude_std, images.image_size) == (9, 0.5, 224)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit-huge"], "'vit-huge' is not declared"),
        (["--method", "magic"], "'magic' is not declared"),
        (["--method", "dense", "--rank", "2"], "--rank does not go with --method dense"),
        (["--method", "kron_target", "--l1", "1"], "--l1 does not go with"),
        (["--method", "kron_l1", "--target-sparsity", "0.5"], "--target-sparsity does not go with kron_l1"),
        (
            ["--method", "dense", "--method-options", '{"interval": 1}'],
            "--method-options does not go with --method dense",
        ),
        (["--rank", "3"], r"no learning rate is declared for rank 3, only for \[1, 2, 4\]"),
        (["--block-size", "1", "2", "3"], "takes one number or two"),
        (["--per-device-batch", "0"], "batches must be positive, got 0 a process"),
        (["--global-batch", "0"], "batches must be positive, got 64 a process and 0 a step"),
        (["--per-device-batch", "48"], "512 images a step cannot be made of 48 on each of 1 processes"),
    ],
)
def test_command_lines_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(parse_arguments(None, arguments))


def test_a_run_may_go_on_with_another_spread_of_its_batches():
    plans = [
        make_plan(parse_arguments(None, arguments))
        for arguments in (["--per-device-batch", "32"], ["--per-device-batch", "64"], ["--global-batch", "256"])
    ]
    assert plans[0].settings() == plans[1].settings() != plans[2].settings()
    assert plans[0].accumulation == 2 * plans[1].accumulation


def test_processes_share_the_global_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    plan = make_plan(parse_arguments(None, ["--per-device-batch", "32", "--global-batch", "256", "--rank", "1"]))
    assert (plan.processes, plan.accumulation, plan.global_batch) == (4, 2, 256)
    assert plan.learning_rate == pytest.approx(1e-3 / 2)
    assert plan.steps_per_epoch(45_000) == 176  # 352 batches of 32 on each process, two a step


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mixup: 0.8", "mixupp: 0.8", "mixupp"),
        ("erasing: 0.25", "erasing: 25", "augmentation.erasing is a probability, got 25"),
        ("kind: dense", "kind: dens", "kind must be one of"),
    ],
    ids=["name", "range", "kind"],
)
def test_recipes_that_are_wrong_are_refused(tmp_path, old, new, message):
    text = RECIPES.read_text()
    assert old in text
    (tmp_path / "mine.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=f"mine.yaml: .*{message}"):
        load_recipes(tmp_path / "mine.yaml")


def test_figures_of_a_pruned_dense_model_are_counted_from_its_zeros():
    plan = make_plan(parse_arguments(None, ["--method", "dense"]))
    model = build_dense(plan.model, ["a", "b"], 32, VIT, 0.0)
    weight = model.vit.layers[0].mlp.fc1.weight  # [64, 32]
    with torch.no_grad():
        weight[4:8, 8:12] = 0
        weight[0, :] = 0  # no block of 4 x 4
        weight[12:16, 0:4] = -weight[12:16, 0:4].abs() - 1  # negative is not zero
    total = sum(parameter.numel() for parameter in model.parameters())
    figures = model_figures(model, 4)
    projections = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert figures["sparsity"] == 16 / projections
    assert figures["nonzeros"] == total - 16
    assert figures["trained_params"] == figures["deployed_params"] == total
