"""`kron-hf train`, run in this process by `main`."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_training_checkpoints import assert_equal
from tiny_runs import OVERRIDES, SIZES, TINY_VIT, checkpoints, command, pictures, write_idx_folder
from torch.distributed.fsdp import StateDictType
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)

import kron_hf.train.run
from kron_hf import kron_summary
from kron_hf.cli import main
from kron_hf.command.trainer import CommandTrainer
from kron_hf.data.sources import load_any_images
from kron_hf.sparsity import SparsityOptions
from kron_hf.train.arguments import KronOptions
from kron_hf.train.parser import build_parser, parse_options
from kron_hf.train.record import check_output_dir
from kron_hf.train.run import check_processes, run_train

NAMES = ["cat", "dog", "emu", "fox"]


def write_images(folder, count, names=NAMES, mode="RGB"):
    images, labels = pictures(count)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / names[label % len(names)] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert(mode).save(path)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """`datasets` writes no user's cache."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of colour images with a training and a test split."""
    folder = tmp_path_factory.mktemp("photos") / "animals"
    write_images(folder / "train", 80)
    write_images(folder / "test", 16)
    return folder


@pytest.fixture(scope="module")
def digits_like(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("idx") / "data")


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A finished run on the photos, what it said and its figures."""
    output, said = tmp_path_factory.mktemp("finished") / "run", []
    # Mirroring would turn the classes into each other.
    arguments = command(photos, output, "--horizontal-flip", "False", steps=40, every=20)[1:]
    return output, run_train(arguments, write=said.append), "\n".join(said), arguments


def errors_of(arguments, capsys):
    assert main(list(map(str, arguments))) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("kron-hf: error: ") == 1
    return error.partition("kron-hf: error: ")[2].strip()


def test_the_saved_model_is_the_one_that_was_measured(finished, photos):
    output, results, said, _ = finished
    assert {"validation_accuracy", "test_accuracy", "validation_loss", "test_loss", "sparsity"} == results.keys()
    assert json.loads((output / "all_results.json").read_text()) == results
    assert f"test accuracy {results['test_accuracy']:.4f}" in said
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: index for index, name in enumerate(NAMES)}
    assert 0.5 <= kron_summary(model).sparsity == results["sparsity"]
    assert str(kron_summary(model)) in said
    classify = pipeline("image-classification", model=str(output))
    hits = [classify(str(path))[0]["label"] == path.parent.name for path in sorted((photos / "test").glob("*/*.png"))]
    assert len(hits) == 16
    assert sum(hits) / 16 == results["test_accuracy"]
    assert results["test_accuracy"] > 0.4  # four classes; 40 steps are enough to be above chance


def test_the_best_model_with_frozen_masks_is_kept(finished):
    output, results, _, _ = finished
    state = json.loads((checkpoints(output)[-1] / "trainer_state.json").read_text())
    accuracies = {entry["step"]: entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry}
    assert list(accuracies) == [20, 40]
    best = output / f"checkpoint-{state['best_global_step']}"
    assert accuracies[state["best_global_step"]] == max(accuracies.values()) == results["validation_accuracy"]
    assert_equal(load_file(output / "model.safetensors"), load_file(best / "model.safetensors"))


def test_no_unfinished_mask_becomes_the_best_model(digits_like, tmp_path):
    run_train(command(digits_like, tmp_path / "run", "--sparsity-end", 0.9, steps=30, every=10)[1:], write=str)
    state = json.loads((tmp_path / "run" / "checkpoint-30" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 30


def test_the_card_names_data_and_figures_and_no_path(finished, photos):
    output, results, _, _ = finished
    card = (output / "README.md").read_text()
    assert "import kron_hf" in card
    assert "animals (test images)" in card
    assert f"| accuracy | {results['test_accuracy']:.4f} |" in card
    assert str(output.parent) not in card
    assert str(photos.parent) not in card
    assert str(output.parent) not in (output / "training_args.bin").read_bytes().decode(errors="replace")


def test_images_alone_need_no_labels(photos, tmp_path):
    name, images = load_any_images(str(photos))
    assert (name, len(images)) == ("animals", 16)  # its test split
    for index, (image, _) in enumerate(zip(*pictures(3), strict=True)):
        (tmp_path / "views").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "views" / f"{index}.png")
    name, images = load_any_images(str(tmp_path / "views"))
    assert (name, len(images)) == ("views", 3)
    assert np.array_equal(np.asarray(images[1][0]), pictures(3)[0][1])
    with pytest.raises(FileNotFoundError, match=r"^--ood-dataset \./missing: there is no such folder"):
        load_any_images("./missing", option="--ood-dataset")


def test_the_validation_split_is_cut_off_and_told(finished):
    said = finished[2]
    assert "animals: no validation split: 8 of the training images are held out for it" in said
    assert "72 images of 4 classes to train, 8 to validate, 16 to test" in said


def test_a_finished_run_says_so_and_trains_nothing(finished):
    output, results, _, arguments = finished
    before = (output / "model.safetensors").stat().st_mtime_ns
    said = []
    assert run_train(arguments, write=said.append) == results
    assert len(said) == 1
    assert "holds this run, finished" in said[0]
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_another_command_in_the_same_directory_is_refused(finished, capsys):
    error = errors_of(["train", *finished[3], "--learning-rate", "0.5"], capsys)
    assert "holds a run with other settings (--learning-rate 0.003, now 0.5)" in error
    assert "--overwrite" in error


def test_a_stopped_run_goes_on_and_overwrite_starts_anew(digits_like, tmp_path, monkeypatch):
    whole = run_train(command(digits_like, tmp_path / "whole", steps=20)[1:], write=str)
    arguments = command(digits_like, tmp_path / "run", steps=20)[1:]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kron_hf.train.run._measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run_train(arguments, write=str)
    said = []
    assert run_train(arguments, write=said.append) == whole
    assert any(text.startswith("Going on from") and text.endswith("checkpoint-20") for text in said)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole")]
    assert_equal(*weights)
    said.clear()
    assert run_train([*arguments, "--overwrite"], write=said.append) == whole
    assert not any(text.startswith("Going on") for text in said)


@pytest.mark.parametrize("call", range(1, 6))
def test_an_overwriting_that_is_killed_can_be_repeated(finished, tmp_path, monkeypatch, call):
    output, _, _, arguments = finished
    shutil.copytree(output, tmp_path / "run")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / "run" / name).touch()
    arguments = [*arguments, "--output-dir", str(tmp_path / "run")]
    anew, unlink, calls = parse_options([*arguments, "--overwrite"]), Path.unlink, []

    def stop(path, **options):
        calls.append(path)
        if len(calls) == call:
            raise KeyboardInterrupt
        unlink(path, **options)

    record = check_output_dir(anew)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            record.begin(overwrite=True)
    assert check_output_dir(parse_options(arguments)).results is None  # goes on, from the start
    assert checkpoints(tmp_path / "run") == []
    check_output_dir(anew).begin(overwrite=True)
    assert not list((tmp_path / "run").glob("*model*"))


def test_an_overwriting_killed_before_its_record_leaves_the_finished_model(finished, tmp_path, monkeypatch):
    output, results, _, arguments = finished
    shutil.copytree(output, tmp_path / "run")
    arguments = [*arguments, "--output-dir", str(tmp_path / "run")]

    def stop(*args):
        raise KeyboardInterrupt

    record = check_output_dir(parse_options([*arguments, "--overwrite"]))
    monkeypatch.setattr(record, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        record.begin(overwrite=True)
    assert check_output_dir(parse_options(arguments)).results == results
    assert_equal(*(load_file(folder / "model.safetensors") for folder in (output, tmp_path / "run")))


def test_fsdp_that_would_save_no_model_is_refused_at_the_start(digits_like, tmp_path, monkeypatch, capsys):
    original, plugin = kron_hf.train.run._build_trainer, SimpleNamespace(state_dict_type=None)

    def build(*args):
        trainer = original(*args)
        trainer.is_fsdp_enabled = True
        trainer.accelerator.state = SimpleNamespace(fsdp_plugin=plugin)
        return trainer

    monkeypatch.setattr("kron_hf.train.run._build_trainer", build)
    monkeypatch.setattr(CommandTrainer, "train", lambda *args, **kwargs: pytest.fail("it trains"))
    for plugin.state_dict_type in (StateDictType.SHARDED_STATE_DICT, StateDictType.LOCAL_STATE_DICT):
        error = errors_of(command(digits_like, tmp_path / "run", steps=20), capsys)
        assert f"with fsdp_state_dict_type {plugin.state_dict_type.name} no model file would be saved" in error
        assert "FULL_STATE_DICT" in error
    assert not list((tmp_path / "run").iterdir())
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    with pytest.raises(pytest.fail.Exception, match="it trains"):
        run_train(command(digits_like, tmp_path / "run", steps=20)[1:], write=str)


def test_a_kronecker_checkpoint_goes_on_and_dense_ones_are_converted(finished, photos, tmp_path, capsys):
    output = finished[0]
    common = ["--dataset", photos, "--max-steps", 2, "--use-cpu", "--save-strategy", "no", "--disable-tqdm", "True"]
    common = [*map(str, common), "--output-dir"]
    run_train(["--model", str(output), *common, str(tmp_path / "on")], write=str)
    on, before = (AutoModelForImageClassification.from_pretrained(path) for path in (tmp_path / "on", output))
    assert [line.block_size for line in kron_summary(on).layers] == [(4, 4)] * 6
    assert kron_summary(on).sparsity == kron_summary(before).sparsity  # the loaded masks hold
    assert not torch.equal(on.classifier.weight, before.classifier.weight)
    assert errors_of(["train", "--model", output, *common, tmp_path / "x", "--rank", 1], capsys).endswith(
        "has Kronecker layers already, and goes on with those: leave out --rank"
    )
    assert "needs the config of a dense model" in errors_of(
        ["train", "--model", output, "--from-scratch", *common, tmp_path / "x"], capsys
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    ViTForImageClassification(ViTConfig(**TINY_VIT, **labels)).save_pretrained(folder / "classifier")
    ViTForImageClassification(ViTConfig(**TINY_VIT, num_labels=7)).save_pretrained(folder / "seven")
    shuffled = {"id2label": dict(enumerate(NAMES[::-1])), "label2id": {n: i for i, n in enumerate(NAMES[::-1])}}
    ViTForImageClassification(ViTConfig(**TINY_VIT, **shuffled)).save_pretrained(folder / "shuffled")
    ViTModel(ViTConfig(**TINY_VIT)).save_pretrained(folder / "backbone")
    ViTForImageClassification(ViTConfig(**TINY_VIT | {"num_channels": 5}, **labels)).save_pretrained(folder / "five")
    return folder


@pytest.mark.parametrize("model", ["classifier", "backbone"])
def test_a_dense_checkpoint_needs_init_weights(dense, photos, tmp_path, model, capsys):
    arguments = ["train", "--model", dense / model, "--dataset", photos, "--output-dir", tmp_path / "run"]
    arguments += ["--block-size", 4, "--rank", 16, "--max-steps", 1, "--use-cpu", "--disable-tqdm", True]
    error = errors_of(arguments, capsys)
    for choice in ("--init-weights nearest", "--init-weights random", "--from-scratch"):
        assert choice in error
    with pytest.warns(UserWarning, match="FLOPs"):  # full rank: nearest is exact, and costs more than dense
        assert main([*map(str, arguments), "--init-weights", "nearest", "--learning-rate", "0"]) == 0
    trained = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    weight = trained.vit.layers[0].mlp.fc1.dense_weight()
    expected = AutoModelForImageClassification.from_pretrained(dense / "classifier").vit.layers[0].mlp.fc1.weight
    assert (weight - expected).abs().max() < 1e-5 or model == "backbone"
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").size["height"] == 8


MODEL_ERRORS = {
    "head": ("seven", "has a head for 7 classes, the data set has 4; pass --ignore-mismatched-sizes"),
    "order": ("shuffled", "the same classes in another order"),
    "channels": ("five", "the model takes images of 5 channels"),
    "missing": ("missing", "there is no such directory"),
}


@pytest.mark.parametrize("kind", MODEL_ERRORS)
def test_models_that_do_not_fit(dense, photos, tmp_path, kind, capsys):
    name, message = MODEL_ERRORS[kind]
    arguments = ["train", "--model", dense / name, "--init-weights", "random", "--dataset", photos, "--use-cpu"]
    assert message in errors_of([*arguments, "--block-size", 4, "--rank", 2, "--output-dir", tmp_path / "run"], capsys)


DATA_ERRORS = {
    "folder": (["--dataset", "./missing"], "--dataset ./missing: there is no such folder"),
    "id": (
        ["--dataset", "no-owner/no-data"],
        "--dataset no-owner/no-data is no folder here, nor could the Hub give it",
    ),
    "image column": (["--image-column", "img"], "--image-column 'img' is no column of images; those are ['image']"),
    "label column": (["--label-column", "kind"], "has no --label-column 'kind'; its columns are ['image', 'label']"),
    "train split": (["--train-split", "all"], "has no split 'all'; its splits are ['test', 'train']"),
    "validation split": (["--validation-split", "dev"], "has no split 'dev'"),
    "fraction": (["--validation-fraction", "1.5"], "the validation fraction must be between 0 and 1, got 1.5"),
    "block": (["--block-size", "5", "--target-modules", "fc1"], "fc1"),
    "overrides": (["--config-overrides", "width=3"], "--config-overrides 'width=3' must be key=value,..."),
    "overrides form": (["--config-overrides", "width"], "--config-overrides 'width' must be key=value,..."),
    "l1 and target": (["--l1", "0.1"], "--target-sparsity and --l1 exclude each other"),
    "metric": (["--metric", "./no-metric"], "--metric ./no-metric could not be loaded"),
    "model type": (["--model-type", "vitt"], "--model-type 'vitt' is no architecture of transformers"),
    "short": (["--max-steps", "8"], "training is shorter than the sparsity schedule needs"),
}


@pytest.mark.parametrize("kind", DATA_ERRORS)
def test_options_that_do_not_fit(photos, tmp_path, kind, capsys):
    more, message = DATA_ERRORS[kind]
    assert message in errors_of([*command(photos, tmp_path / "run", steps=20), *more], capsys)


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(SimpleNamespace(world_size=2))
    with pytest.raises(ValueError, match=r"2 processes were started, but .* ACCELERATE_USE_CPU=true"):
        check_processes(SimpleNamespace(world_size=1))


@pytest.mark.parametrize("inside", ["", "checkpoint-8"], ids=["the-directory", "a-checkpoint-in-it"])
def test_overwrite_never_deletes_the_model_to_start_from(photos, tmp_path, capsys, inside):
    model = tmp_path / "run" / inside
    ViTForImageClassification(ViTConfig(**TINY_VIT)).save_pretrained(model)
    words = [
        "train",
        "--model",
        model,
        "--init-weights",
        "random",
        "--dataset",
        photos,
        "--output-dir",
        tmp_path / "run",
    ]
    error = errors_of([*words, "--overwrite"], capsys)
    assert "--overwrite would delete the model that --model names" in error
    assert (model / "model.safetensors").is_file()


def test_folders_without_what_training_needs(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no images that can be read" in errors_of(command(tmp_path / "empty", tmp_path / "run"), capsys)
    one = write_images(tmp_path / "one" / "train", 8, names=["cat"]).parent
    error = errors_of(command(one, tmp_path / "run1"), capsys)
    assert "label" in error or "classes" in error
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        error = errors_of([*command(one, foreign), *more], capsys)
        assert error.endswith("is not empty and was not written by kron-hf train; name another one")
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_an_unreadable_image_is_named(tmp_path, capsys):
    folder = write_images(tmp_path / "data" / "train", 32)
    broken = folder / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    error = errors_of(command(folder.parent, tmp_path / "run", steps=20), capsys)
    assert re.search(r"image '.*dog/1\.png' cannot be read", error)


def test_only_measuring_a_saved_model(finished, photos, tmp_path):
    output, results, _, _ = finished
    arguments = ["--model", output, "--dataset", photos, "--do-train", False, "--use-cpu", "--disable-tqdm", True]
    measured = run_train([*map(str, arguments), "--output-dir", str(tmp_path / "none")], write=str)
    assert measured == results


def test_options_from_a_file_and_the_command_line_wins(tmp_path, photos):
    values = {"dataset": str(photos), "model-type": "vit", "block_size": [4, 8], "learning_rate": 0.5, "seed": 3}
    values |= {"config_overrides": OVERRIDES, "use_cpu": True, "lr_scheduler_kwargs": {"num_cycles": 2}, "l1": None}
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "run.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items()))
    parsed = [parse_options([str(tmp_path / name), "--seed", "7"]) for name in ("run.json", "run.yaml")]
    assert parsed[0][:4] == parsed[1][:4]
    (tmp_path / "map.json").write_text(json.dumps(values | {"config_overrides": TINY_VIT}))
    assert parse_options([str(tmp_path / "map.json"), "--seed", "7"])[:4] == parsed[0][:4]
    for options in parsed:
        assert options.kron.conversion() == {"block_size": (4, 8)}
        assert (options.training.learning_rate, options.training.seed) == (0.5, 7)
        assert options.training.lr_scheduler_kwargs == {"num_cycles": 2}
        assert options.model.from_scratch


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "is no valid JSON", id="broken"),
        pytest.param("[]", "must hold a mapping", id="list"),
        pytest.param('{"learning_speed": 1}', "does not know: ['learning_speed']", id="unknown"),
    ],
)
def test_argument_files_that_are_wrong(tmp_path, content, message, capsys):
    (tmp_path / "run.json").write_text(content)
    assert message in errors_of(["train", tmp_path / "run.json"], capsys)


def test_help_shows_our_options_first_and_each_once():
    text = build_parser().format_help()
    assert "%%" not in text
    ours = [text.index(f"\n{group}:\n") for group in ("model", "data", "Kronecker layers", "run")]
    assert ours == sorted(ours)
    assert ours[-1] < text.index("\ntraining: every option of transformers.TrainingArguments")
    for option in (
        "--block-size",
        "--target-sparsity",
        "--overwrite",
        "--gradient-accumulation-steps",
        "--hub-model-id",
    ):
        assert len(re.findall(rf"^  {option}\b", text, flags=re.MULTILINE)) == 1
    assert max(map(len, text.splitlines()[:60])) <= 120


def test_unknown_options_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", *SIZES, "--dataset", "digits", "--lerning-rate", "1"])
    assert exit_info.value.code == 2
    assert "unrecognized arguments: --lerning-rate 1" in capsys.readouterr().err


def test_strategies_that_belong_together():
    base = [*SIZES, "--dataset", "digits", "--use-cpu"]
    for given, expected in [
        ([], ("epoch", None, True)),
        (["--save-strategy", "steps", "--save-steps", "7"], ("steps", 7, True)),
        (["--save-strategy", "no"], ("no", None, False)),
        (["--save-strategy", "best"], ("epoch", None, True)),
        (["--eval-strategy", "no"], ("no", None, False)),
    ]:
        training = parse_options([*base, *given]).training
        assert (training.eval_strategy.value, training.eval_steps, training.load_best_model_at_end) == expected


def test_every_option_of_the_sparsifier_is_passed_on():
    given = {"scope": "layer", "start": 0.1, "end": 0.6, "interval": 5}
    given |= {"regrowth": "straight_through", "group_penalty": 0.5, "groups": "rows"}
    options = KronOptions(target_sparsity=0.5, **{f"sparsity_{name}": value for name, value in given.items()})
    assert options.sparsity() == given
    assert {"target_sparsity", "l1", *given} == {field.name for field in fields(SparsityOptions)}
