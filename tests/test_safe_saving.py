"""Checkpoints and models of `KronTrainer` appear whole or not at all."""

import json
import os
import shutil
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_training_checkpoints import Images, arguments, build
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kron_hf import KronTrainer, last_checkpoint
from kron_hf.trainer import safe_saving
from kron_hf.trainer.safe_saving import SafeSaving
from kron_hf.trainer.whole_files import (
    discard,
    publish_directory,
    publish_model,
    remove_leftovers,
    saving_errors,
    unfinished,
)

OVERRIDDEN = (
    "_save_checkpoint",
    "_get_output_dir",
    "_push_from_checkpoint",
    "_run_epoch",
    "_finalize_training",
    "_save",
)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def trainer_in(folder, cls=KronTrainer, seed=0, metric=None, **options):
    evaluated = {"eval_dataset": Images(8), "compute_metrics": metric} if "eval_strategy" in options else {}
    return cls(build(seed), arguments(folder, **options), train_dataset=Images(), **evaluated)


@pytest.fixture
def stop_before(monkeypatch):
    """Raises in place of the n-th call of a function of os, as a kill would end the process there."""

    def stop(name, call):
        original, calls = getattr(os, name), []

        def counted(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)

    return stop


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_private_methods_exist_in_this_transformers(name):
    assert callable(getattr(Trainer, name, None)), (
        f"transformers {transformers.__version__} has no Trainer.{name}: kron_hf/trainer/safe_saving.py must be adapted"
    )
    assert name in vars(SafeSaving)


def test_checkpoints_are_those_of_the_stock_trainer(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "max_steps": 12}
    trainers = []
    for cls in (Trainer, SafeSaving):
        trainers.append(trainer_in(tmp_path / cls.__name__, cls, **options))
        trainers[-1].train()
    stock, safe = (Path(trainer.args.output_dir) for trainer in trainers)
    assert names(stock) == names(safe) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    for checkpoint in ("checkpoint-4", "checkpoint-8", "checkpoint-12"):
        assert names(stock / checkpoint) == names(safe / checkpoint)
        weights, expected = (load_file(folder / checkpoint / "model.safetensors") for folder in (safe, stock))
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
        states = [json.loads((folder / checkpoint / "trainer_state.json").read_text()) for folder in (safe, stock)]
        assert states[0]["best_global_step"] == states[1]["best_global_step"]
        bests = [Path(state["best_model_checkpoint"]) for state in states]
        assert bests == [safe / bests[0].name, stock / bests[0].name]
    assert trainers[0].state.best_metric == trainers[1].state.best_metric


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit):
    scores = iter([1, 4, 3, 2])
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "score", "save_total_limit": limit}
    trainer = trainer_in(tmp_path, metric=lambda prediction: {"score": next(scores)}, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert names(tmp_path) == (["checkpoint-4"] if limit == 1 else ["checkpoint-4", "checkpoint-8"])
    torch.testing.assert_close(trainer.model.state_dict(), trainer_weights(tmp_path / "checkpoint-4"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("working_directory", "spelled"),
    [
        pytest.param(".", "{}/run", id="absolute"),
        pytest.param("elsewhere", "../run", id="another-directory"),
    ],
)
def test_resumed_under_another_spelling_the_best_is_kept_and_loaded(tmp_path, monkeypatch, working_directory, spelled):
    """Killed after the last save, with the best and the last checkpoint on the disk."""
    options = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "save_total_limit": 1}
    scores = iter([2, 1])
    options |= {"metric_for_best_model": "score", "metric": lambda prediction: {"score": next(scores)}}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    killed = trainer_in("run", **options)
    monkeypatch.setattr(killed, "_finalize_training", interrupt)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert names(tmp_path / "run") == ["checkpoint-4", "checkpoint-8"]
    monkeypatch.chdir(working_directory)
    resumed = trainer_in(spelled.format(tmp_path), seed=1, **options)
    resumed.train(resume_from_checkpoint=True)
    assert names(tmp_path / "run") == ["checkpoint-4"]
    best = trainer_weights(tmp_path / "run" / "checkpoint-4")
    torch.testing.assert_close(resumed.model.state_dict(), best, rtol=0, atol=0)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_rotation_knows_the_best_under_another_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = trainer_in(tmp_path, save_total_limit=2)
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    trainer.state.best_model_checkpoint = "checkpoint-2"
    trainer._rotate(tmp_path, tmp_path / "checkpoint-6")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]


def test_a_missing_best_checkpoint_discards_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_finalize_training", lambda *args: None)
    trainer = trainer_in(tmp_path, save_total_limit=1)
    (tmp_path / "checkpoint-4").mkdir()
    trainer.state.best_model_checkpoint = str(tmp_path / "gone" / "checkpoint-2")
    trainer._finalize_training(None, 0, 0)
    assert names(tmp_path) == ["checkpoint-4"]


class NodeArguments(TrainingArguments):
    """The only process of a node of two."""

    node = 0
    should_save = property(lambda self: self.node == 0)
    local_process_index = property(lambda self: 0)
    process_index = property(lambda self: self.node)
    world_size = property(lambda self: 2)


def node_trainer(folder, index, barrier):
    args = NodeArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=4)
    args.node = index
    trainer = SafeSaving(build(), args)
    trainer.create_optimizer_and_scheduler(4)
    trainer.state.global_step = 2
    trainer.accelerator.wait_for_everyone = lambda: barrier.wait(timeout=60)
    return trainer


@pytest.mark.parametrize("earlier", [True, False], ids=["over-an-earlier-checkpoint", "first"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_nodes_with_one_file_system_and_with_their_own(tmp_path, monkeypatch, shared, earlier):
    folders = [tmp_path / "run"] * 2 if shared else [tmp_path / "run", tmp_path / "other"]
    if earlier:
        write_files(folders[1] / "checkpoint-2", {"trainer_state.json": "{}"})
    barrier, errors, published = threading.Barrier(2), [], []

    def publish(staging, final):
        published.append(final)
        while not barrier.n_waiting and len(published) < 2:  # the other node goes on as far as it can
            time.sleep(0.01)
        publish_directory(staging, final)

    monkeypatch.setattr(safe_saving, "publish_directory", publish)
    trainers = [node_trainer(folder, index, barrier) for index, folder in enumerate(folders)]

    def save(trainer):
        try:
            trainer._save_checkpoint(trainer.model, None)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=save, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    states = {f"rng_state_{index}.pth" for index in range(2)}
    found = [set(names(folder / "checkpoint-2")) for folder in folders]
    assert [names(folder) for folder in folders] == [["checkpoint-2"]] * 2
    assert found[0] >= {"model.safetensors", "trainer_state.json", *(states if shared else ["rng_state_0.pth"])}
    assert last_checkpoint(folders[0]) == str(folders[0] / "checkpoint-2")
    assert shared or found[1] == {"rng_state_1.pth"}
    assert len(published) == len(set(folders))


def test_a_checkpoint_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    seen = []
    original = Path.rename

    def rename(path, target):
        if path.name == "checkpoint-4":
            seen.append((names(tmp_path), names(path), get_last_checkpoint(tmp_path), last_checkpoint(tmp_path)))
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    trainer_in(tmp_path).train()
    assert [entry[0] for entry in seen] == [["_unfinished-checkpoint-4"]]
    assert seen[0][1] == names(tmp_path / "checkpoint-4")
    assert seen[0][2:] == (None, None)


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    for name in ("_unfinished-checkpoint-4", "_discarded-checkpoint-2"):
        (tmp_path / name / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "_notes").mkdir()
    trainer_in(tmp_path).train()
    assert names(tmp_path) == ["_notes", "checkpoint-4", "checkpoint-8"]


def test_resume_true_passes_over_a_broken_checkpoint_of_the_stock_trainer(tmp_path):
    whole = trainer_in(tmp_path, cls=Trainer)
    whole.train()
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    resumed = trainer_in(tmp_path, cls=SafeSaving, seed=1)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(resumed.model.state_dict(), trainer_weights(tmp_path / "checkpoint-8"), rtol=0, atol=0)


def test_resume_true_refuses_when_every_checkpoint_is_broken(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"is complete \(checkpoint-4, checkpoint-8\): pass the path of one"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    weights_only = trainer_in(tmp_path, seed=1, save_only_model=True)
    weights_only.train(resume_from_checkpoint=True)
    torch.testing.assert_close(
        weights_only.model.state_dict(), trainer_weights(tmp_path / "checkpoint-8"), rtol=0, atol=0
    )


def test_resume_true_without_any_checkpoint_is_an_error_of_trainer(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)


def trainer_weights(checkpoint):
    return AutoModelForImageClassification.from_pretrained(checkpoint).state_dict()


def test_resuming_at_the_last_step_takes_no_further_one(tmp_path):
    trainer_in(tmp_path, max_steps=7, save_steps=7).train()
    resumed = trainer_in(tmp_path, seed=1, max_steps=7, save_steps=7)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    assert names(tmp_path) == ["checkpoint-7"]
    torch.testing.assert_close(resumed.model.state_dict(), trainer_weights(tmp_path / "checkpoint-7"), rtol=0, atol=0)


def break_file(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: break_file(path / "model.safetensors"), id="truncated-weights"),
        pytest.param(lambda path: (path / "model.safetensors").unlink(), id="no-weights"),
        pytest.param(lambda path: break_file(path / "optimizer.pt"), id="truncated-optimizer"),
        pytest.param(lambda path: (path / "optimizer.pt").unlink(), id="no-optimizer"),
        pytest.param(lambda path: break_file(path / "trainer_state.json"), id="truncated-state"),
        pytest.param(lambda path: (path / "trainer_state.json").write_text("[]"), id="foreign-state"),
        pytest.param(lambda path: break_file(path / "config.json"), id="truncated-config"),
        pytest.param(lambda path: shutil.rmtree(path), id="missing"),
    ],
)
def test_last_checkpoint_looks_into_the_files(trained, tmp_path, damage):
    shutil.copytree(trained, tmp_path / "run")
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-8")
    damage(tmp_path / "run" / "checkpoint-8")
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer_in(folder).train()
    return folder


def test_last_checkpoint_without_any(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "missing") is None


MODELS = {
    "same": {"config.json": "a", "model.safetensors": "old", "preprocessor_config.json": "p"},
    "config": {"config.json": "b", "model.safetensors": "new", "preprocessor_config.json": "p"},
    "weights": {"config.json": "a", "model.safetensors": "new", "preprocessor_config.json": "p"},
    "shards": {"config.json": "a", "model-1-of-2.safetensors": "n", "model-2-of-2.safetensors": "w"},
}


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)


def model_in(folder):
    """What a loader would take: nothing without a config."""
    files = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
    return files if "config.json" in files else None


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_replaced_whole_wherever_it_is_interrupted(tmp_path, kind, stop_before, monkeypatch):
    old, new = MODELS["same"], MODELS[kind]
    for function in ("fsync", "replace", "unlink"):
        for call in range(1, 30):
            folder = tmp_path / function / str(call)
            write_files(folder, {**old, "notes.txt": "mine"})
            write_files(folder / "_unfinished-model", new)
            stop_before(function, call)
            try:
                publish_model(folder / "_unfinished-model", folder)
                break
            except KeyboardInterrupt:
                found = model_in(folder)
            finally:
                monkeypatch.undo()
            weights = {name: text for name, text in (found or {}).items() if name.startswith("model")}
            configs = found and (found["config.json"], weights)
            assert configs in (None, *((m["config.json"], weights_of(m)) for m in (old, new)))
        assert weights_of(model_in(folder)) == weights_of(new)
        assert model_in(folder)["config.json"] == new["config.json"]
        assert (folder / "notes.txt").read_text() == "mine"
        assert not (folder / "_unfinished-model").exists()
        assert function == "unlink" or call > 2


def weights_of(files):
    return {name: text for name, text in files.items() if name.startswith("model")}


def test_save_model_replaces_a_larger_model(tmp_path, trained):
    trainer = trainer_in(tmp_path)
    trainer.save_model(tmp_path / "out")
    write_files(tmp_path / "out", {"model-00001-of-00002.safetensors": "stale", "model.safetensors.index.json": "{}"})
    trainer.save_model(tmp_path / "out")
    assert names(tmp_path / "out") == ["config.json", "model.safetensors", "training_args.bin"]
    torch.testing.assert_close(trainer_weights(tmp_path / "out"), trainer.model.state_dict(), rtol=0, atol=0)


def test_publish_directory_replaces_and_discard_removes(tmp_path):
    final = tmp_path / "checkpoint-1"
    for content in ("first", "second"):
        write_files(unfinished(final), {"file": content})
        publish_directory(unfinished(final), final)
        assert (final / "file").read_text() == content
        assert names(tmp_path) == ["checkpoint-1"]
    discard(final)
    assert names(tmp_path) == []
    remove_leftovers(tmp_path / "missing")


@pytest.mark.parametrize("call", [1, 2, 3], ids=["before", "between", "after"])
def test_a_directory_is_replaced_whole_wherever_it_is_interrupted(tmp_path, call, monkeypatch):
    final, renames, original = tmp_path / "checkpoint-1", [], Path.rename
    write_files(final, {"file": "old"})
    write_files(unfinished(final), {"file": "new"})

    def rename(path, target):
        renames.append(path)
        if len(renames) == call:
            raise KeyboardInterrupt
        return original(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(shutil, "rmtree", lambda path, **kwargs: path.exists() and interrupt())
        with pytest.raises(KeyboardInterrupt):
            publish_directory(unfinished(final), final)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]
    assert (final / "file").read_text() == ("new" if call == 3 else "old")


def test_what_was_deleted_on_purpose_does_not_come_back(tmp_path, monkeypatch):
    write_files(tmp_path / "checkpoint-1", {"file": "old"})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        discard(tmp_path / "checkpoint-1")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_models_are_compared_without_reading_them_whole(tmp_path):
    size = 8 * 2**20
    for folder in (tmp_path, tmp_path / "_unfinished-model"):
        write_files(folder, {"config.json": "a", "model.safetensors": "x" * size})
    tracemalloc.start()
    try:
        publish_model(tmp_path / "_unfinished-model", tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 8


def test_an_unrelated_error_while_saving_keeps_its_type(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), saving_errors(tmp_path / "a", tmp_path / "b"):
        raise RuntimeError("CUDA out of memory")
