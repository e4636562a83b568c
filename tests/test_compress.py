"""`kron-hf compress`, run in this process by `main`."""

import json
import re

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny_compress import NAMES, QUIET, SIZES, classifier, command, digits, trained
from tiny_runs import assert_equal
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from kron_hf import KronConfig, KronLinear, get_kron_model, kron_summary
from kron_hf.cli import main
from kron_hf.command.options import LayerOptions
from kron_hf.command.trainer import CommandTrainer
from kron_hf.compress import run
from kron_hf.compress.arguments import CompressionOptions, HealingOptions
from kron_hf.compress.comparison import Comparison
from kron_hf.compress.head import head_of, logistic_regression
from kron_hf.compress.parser import build_parser, parse_options
from kron_hf.compress.run import run_compress
from kron_hf.data.sources import load_splits
from kron_hf.summary import latency


@pytest.fixture(scope="module", autouse=True)
def few_forwards():
    """Of those whose time is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "RUNS", 3)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A trained classifier, its backbone, and models that do not fit."""
    folder = tmp_path_factory.mktemp("models")
    model = trained()
    model.save_pretrained(folder / "classifier")
    model.vit.save_pretrained(folder / "backbone")
    classifier(NAMES[:7]).save_pretrained(folder / "seven")
    classifier(NAMES[::-1]).save_pretrained(folder / "shuffled")
    get_kron_model(classifier(), KronConfig(block_size=4, rank=2)).save_pretrained(folder / "converted")
    return folder


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """A finished run, what it gave back and what it said."""
    output, said = tmp_path_factory.mktemp("finished") / "run", []
    others = ["--ood-dataset", "digits", "--ood-images", 10_000]
    arguments = command(models / "classifier", output, "--target-params", 0.5, *others)
    return output, run_compress(arguments[1:], write=said.append), "\n".join(said), arguments


def errors_of(arguments, capsys):
    assert main(list(map(str, arguments))) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("kron-hf: error: ") == 1
    return error.partition("kron-hf: error: ")[2].strip()


def score(model, split):
    pixels, labels = digits(split)
    with torch.no_grad():
        return (model(pixel_values=pixels).logits.argmax(-1) == labels).double().mean().item()


def test_the_saved_models_are_those_that_were_compared(finished, models):
    output, comparison, said, _ = finished
    compressed = AutoModelForImageClassification.from_pretrained(output).eval()
    dense = AutoModelForImageClassification.from_pretrained(models / "classifier").eval()
    for model, figures in ((dense, comparison.dense), (compressed, comparison.compressed)):
        for split in ("validation", "test"):
            assert score(model, split) == pytest.approx(figures[f"{split}_accuracy"])
        assert figures["milliseconds_1"] > 0
        assert figures["file_bytes"] > 4 * figures["params"]
    assert comparison.dense["test_accuracy"] > 0.5  # ten classes
    assert comparison.compressed["test_accuracy"] > 0.5
    summary = kron_summary(compressed)
    assert comparison.compressed["params"] == summary.deployed_params < comparison.dense["params"]
    assert comparison.dense["params"] == sum(parameter.numel() for parameter in dense.parameters())
    assert comparison.compressed["flops"] < comparison.dense["flops"]
    assert list(comparison.stages) == ["calibrated", "distilled", "fine-tuned"]
    assert comparison.stages["fine-tuned"]["validation_accuracy"] == comparison.compressed["validation_accuracy"]
    assert str(comparison) in said


def test_how_near_the_two_models_are_is_measured_on_images_of_the_task_and_on_others(finished, models):
    output, comparison, said, _ = finished
    own, others = comparison.fidelity.values()
    assert list(comparison.fidelity) == ["digits, test", "digits, out of domain"]
    assert own == others  # here they are the same images
    pixels, predictions, tokens = digits("test")[0], [], []
    for folder in (models / "classifier", output):
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            predictions.append(model(pixel_values=pixels).logits.argmax(-1))
            tokens.append(model.vit(pixel_values=pixels).last_hidden_state.double().flatten(0, 1))
    spread = (tokens[0] - tokens[0].mean(0)).square().sum()
    assert own["same_prediction"] == (predictions[0] == predictions[1]).double().mean().item()
    assert own["feature_error"] == pytest.approx(((tokens[0] - tokens[1]).square().sum() / spread).sqrt().item())
    assert 0 < own["feature_error"] < 1
    assert "digits, out of domain" in said


def test_the_budget_is_kept_and_reported(finished):
    output, _, said, _ = finished
    report = json.loads((output / "calibration.json").read_text())
    assert report["settings"] == {"target_params": 0.5}
    assert 0.4 < report["params"] / report["dense_params"] <= 0.5
    model = AutoModelForImageClassification.from_pretrained(output)
    assert {name for name, layer in model.named_modules() if isinstance(layer, KronLinear)} == set(report["modules"])
    assert (output / "calibration.txt").read_text().strip() in said
    assert (output / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_what_lies_in_the_output_directory(finished, models):
    output, comparison, _, _ = finished
    assert sorted(path.name for path in output.iterdir()) == [
        *("README.md", "_kron_compress.json", "calibration.json", "calibration.png", "calibration.txt"),
        *("comparison.json", "config.json", "kron_claims.json", "kron_masks.png", "model.safetensors"),
        *("preprocessor_config.json", "training_args.bin"),
    ]
    assert Comparison.from_dict(json.loads((output / "comparison.json").read_text())) == comparison
    card = (output / "README.md").read_text()
    assert "import kron_hf" in card
    assert str(comparison) in card
    assert f"| accuracy | {comparison.compressed['test_accuracy']:.4f} |" in card
    for path in output.iterdir():
        if path.name != "_kron_compress.json":  # is not pushed
            content = path.read_bytes().decode(errors="replace")
            assert str(output.parent) not in content, path.name
            assert str(models) not in content, path.name


def test_its_image_processor_makes_the_same_pixels(finished):
    processor, images = AutoImageProcessor.from_pretrained(finished[0]), load_splits("digits").test
    pixels = processor([images[index][0] for index in range(4)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, digits("test")[0][:4])


def test_a_finished_run_says_so_and_does_nothing(finished):
    output, comparison, _, arguments = finished
    before, said = (output / "model.safetensors").stat().st_mtime_ns, []
    assert run_compress(arguments[1:], write=said.append) == comparison
    assert len(said) == 1
    assert "holds this run, finished" in said[0]
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_another_command_in_the_same_directory_is_refused(finished, capsys):
    error = errors_of([*finished[3], "--distill-steps", 7], capsys)
    assert "holds a run with other settings (--distill-steps 6, now 7)" in error


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    output, comparison, _, arguments = finished
    again, said = [*arguments[1:], "--output-dir", str(tmp_path / "run")], []
    for place in ("distill", "finetune", "compare", "publish"):
        original = getattr(run, place)

        def stop(*args, original=original, **kwargs):
            original(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(run, place, stop)
            with pytest.raises(KeyboardInterrupt):
                run_compress(again, write=said.append)
        assert (tmp_path / "run" / "config.json").exists() == (place == "publish")
    result = run_compress(again, write=said.append)
    assert sum(text.startswith("Going on with the calibrated model") for text in said) == 4
    assert result.stages == comparison.stages
    weights = [(folder / "model.safetensors").read_bytes() for folder in (output, tmp_path / "run")]
    assert weights[0] == weights[1]
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_backbone_gets_a_head_once_and_no_training_is_a_choice(models, tmp_path, monkeypatch):
    said: list[str] = []
    arguments = command(models / "backbone", tmp_path / "run", "--block-size", 4, "--rank", 2, distill=0, finetune=0)
    with monkeypatch.context() as patch:
        patch.setattr(run, "calibrate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_compress(arguments[1:], write=said.append)
    assert "Calibrating on 128 images; killed in this, the command begins this anew" in said
    monkeypatch.setattr(run, "fit_head", lambda *args, **kwargs: pytest.fail("it fits the head again"))
    result = run_compress(arguments[1:], write=said.append)
    assert any(text.startswith("Going on with the dense model and its fitted head in") for text in said)
    assert list(result.stages) == ["calibrated"]
    assert "A head was fitted to the dense model's features of 1200 images" in said
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "_dense").eval()
    assert score(dense, "test") == pytest.approx(result.dense["test_accuracy"])
    assert result.dense["test_accuracy"] > 0.6
    assert "(dense: the backbone as it is, with a head fitted to its features)" in str(result)
    backbone = ViTModel.from_pretrained(models / "backbone", add_pooling_layer=False)
    assert_equal(dict(dense.vit.state_dict()), dict(backbone.state_dict()))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert {layer.block_size for layer in kron_summary(model).layers} == {(4, 4)}
    assert torch.equal(model.classifier.weight, dense.classifier.weight)


ERRORS = {
    "budget": ("classifier", ["--target-params", 0.001], "target_params=0.001 is below the smallest"),
    "budget of a backbone": ("backbone", ["--target-flops", 0.001], "target_flops=0.001 is below the smallest"),
    "two budgets": ("classifier", ["--target-params", 0.5, "--rank", 2], "--target-params, --rank: give one budget"),
    "rank": ("classifier", ["--rank", 2], "--block-size and --rank belong together"),
    "block": ("classifier", ["--block-size", 5, "--rank", 2, "--target-modules", "fc1"], "(5, 5) does not divide"),
    "share": ("classifier", ["--target-params", 1.5], "target_params"),
    "images": ("classifier", ["--calibration-images", 0], "--calibration-images must be at least 1, got 0"),
    "steps": ("classifier", ["--distill-steps", -1], "--distill-steps must be at least 0, got -1"),
    "size": ("classifier", ["--image-size", 16], "match"),
    "converted": ("converted", [], "has Kronecker layers already; kron-hf compress starts from a dense model"),
    "labels": ("seven", [], "has a head for 7 classes, the data set has 10; pass --ignore-mismatched-sizes"),
    "order": ("shuffled", [], "the same classes in another order"),
    "missing": ("missing", [], "there is no such directory"),
    "data": ("classifier", ["--dataset", "./missing"], "there is no such folder"),
    "others": ("classifier", ["--ood-dataset", "./missing"], "--ood-dataset ./missing: there is no such folder"),
    "number of others": ("classifier", ["--ood-images", 0], "--ood-images must be at least 1, got 0"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(models, tmp_path, kind, capsys):
    model, more, message = ERRORS[kind]
    assert message in errors_of(command(models / model, tmp_path / "run", *more), capsys)
    assert not list((tmp_path / "run").glob("*"))


def test_a_budget_out_of_reach_is_refused_before_any_image_is_read(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "fit_head", lambda *args, **kwargs: pytest.fail("it fits the head first"))
    arguments = command(models / "backbone", tmp_path / "run", "--target-params", 0.001)
    assert "below the smallest" in errors_of(arguments, capsys)


def test_a_head_for_other_classes_is_replaced_if_that_is_wanted(models, tmp_path, monkeypatch):
    seen = []

    def stop(dense, *args):
        seen.append(dense)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "calibrate", stop)
    with pytest.raises(KeyboardInterrupt):
        run_compress(command(models / "seven", tmp_path / "run", "--ignore-mismatched-sizes")[1:], write=str)
    assert seen[0].classifier.out_features == 10
    assert score(seen[0], "test") > 0.3  # of random features


def test_foreign_directories_and_the_model_itself_are_left_alone(models, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        error = errors_of(command(models / "classifier", tmp_path / "thesis", *more), capsys)
        assert error.endswith("is not empty and was not written by kron-hf compress; name another one")
    error = errors_of(command(models / "classifier", models, "--overwrite"), capsys)
    assert "--overwrite would delete the model that --model names" in error
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]
    assert (models / "classifier" / "model.safetensors").is_file()


def test_the_hub_is_asked_before_the_calibration_and_gets_the_model_at_the_end(models, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(CommandTrainer, "init_hf_repo", lambda self, token=None: order.append("repository"))
    monkeypatch.setattr(CommandTrainer, "push_to_hub", lambda self: order.append((self.args.hub_model_id, self.model)))
    original = run.calibrate
    monkeypatch.setattr(run, "calibrate", lambda *args: order.append("calibration") or original(*args))
    push = ["--push-to-hub", "--hub-model-id", "me/small", "--hub-token", "hf_secret", "--block-size", 4, "--rank", 2]
    arguments = command(models / "classifier", tmp_path / "run", *push, distill=0, finetune=0)
    run_compress(arguments[1:], write=str)
    assert order[:-1] == ["repository", "calibration", "repository"]
    assert order[-1][0] == "me/small"
    assert kron_summary(order[-1][1]).layers
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


def test_many_processes_are_refused(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "calibrates in one process" in errors_of(command(models / "classifier", tmp_path / "run"), capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--dataset", "digits", *QUIET], id="no model"),
        pytest.param(["--model", "x", *QUIET], id="no data"),
        pytest.param(["--model", "x", "--dataset", "digits", "--lerning-rate", "1"], id="unknown option"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compress", *arguments])
    assert "usage: kron-hf compress" in capsys.readouterr().err


def test_help_shows_each_option_once_and_the_defaults():
    text = build_parser().format_help()
    assert "%%" not in text
    for option in (
        "--model",
        "--dataset",
        "--target-params",
        "--rank",
        "--ood-dataset",
        "--push-to-hub",
        "--overwrite",
    ):
        assert len(re.findall(rf"^  {option}(?: |$)", text, flags=re.MULTILINE)) == 1
    assert "(default: 0.25)" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120


def test_options_from_a_file_and_the_default_budget(tmp_path):
    (tmp_path / "run.yaml").write_text("model: x\ndataset: digits\nblock_size: [4, -1]\nrank: 3\nbatch-size: 8\n")
    options = parse_options([str(tmp_path / "run.yaml"), "--batch-size", "16"])
    assert options.conversion() == {"block_size": (4, -1), "rank": 3}
    assert options.healing.batch_size == 16
    assert CompressionOptions().conversion(LayerOptions()) == {"target_params": 0.25}
    assert CompressionOptions(max_error=0.5).conversion(LayerOptions(exclude_modules=["fc1"])) == {
        **{"max_error": 0.5, "exclude_modules": ["fc1"]}
    }
    assert HealingOptions().distill_steps == 500


@pytest.mark.parametrize("ridge", [1e-1, 1e-3])
def test_the_head_is_the_logistic_regression_of_scikit_learn(ridge):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 6, generator=generator, dtype=torch.float64)
    labels = (features @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(-1)
    labels[::7] = 0  # not separable
    start = torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    weight, bias = logistic_regression(features, labels, *start, ridge)
    expected = LogisticRegression(C=1 / (len(labels) * ridge), tol=1e-10, max_iter=10_000).fit(features, labels)
    probabilities = (features @ weight.T + bias).softmax(-1)
    found = torch.as_tensor(expected.predict_proba(features))
    torch.testing.assert_close(probabilities, found, rtol=0, atol=1e-4)  # L-BFGS ends at a gradient of 1e-5


def test_two_heads_are_refused():
    config = DeiTConfig(**SIZES, num_labels=3)
    with pytest.raises(ValueError, match=r"has 2 linear layers outside of its backbone, \['cls_classifier', "):
        head_of(DeiTForImageClassificationWithTeacher(config))
    model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=3))
    assert head_of(model) is model.classifier


def test_models_run_in_turn():
    calls = []

    class Model(nn.Module):
        device = torch.device("cpu")

        def forward(self, number):
            calls.append(self)

    models = [Model(), Model()]
    medians, count = latency.alternating_milliseconds(models, {"number": 1})
    assert calls == models * (count + 1)
    assert len(medians) == 2
    assert count == 3


def test_a_table_of_a_comparison():
    figures = {"validation_accuracy": 0.5, "params": 2000, "milliseconds_1": 2.0}
    text = str(
        Comparison(
            dense=figures,
            compressed={"validation_accuracy": 0.25, "params": 500, "milliseconds_1": 1.0},
            stages={"calibrated": {"validation_accuracy": 0.125}},
            dataset="digits\x1b[31m",
            measured_on="cpu",
            fidelity={"photos\x1b": {"same_prediction": 0.75, "feature_error": 0.5}},
        )
    )
    lines = text.splitlines()
    assert lines[0] == "digits\\x1b[31m:"
    assert lines[1] == "validation accuracy: dense 0.5000, calibrated 0.1250"
    assert [line.split() for line in lines[4:7]] == [
        ["validation", "accuracy", "0.5000", "0.2500"],
        ["parameters,", "deployed", "2,000", "500", "0.250"],
        ["milliseconds,", "batch", "1", "2.00", "1.00", "0.500"],
    ]
    assert not lines[7]
    assert lines[8].split() == [
        "compressed",
        "beside",
        "dense",
        "same",
        "prediction",
        *["error", "of", "the", "final", "tokens"],
    ]
    assert lines[10].split() == ["photos\\x1b", "0.7500", "0.5000"]
    assert "measured now on this machine, cpu" in lines[-1]
