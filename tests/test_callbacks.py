import warnings

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TinyKron, arguments, assert_same_weights, assert_target, dataset, masks
from transformers import Trainer, TrainerCallback, ViTConfig, ViTForImageClassification

from kron_hf.callbacks import SparsityCallback
from kron_hf.config import KronConfig
from kron_hf.model import get_kron_model
from kron_hf.sparsity.pruning import kron_layers, model_sparsity
from kron_hf.trainer.kron_trainer import KronTrainer

# 40 steps: pruned after step 10, frozen after step 20.


def trainer(path, model=None, target=0.5, callbacks=(), eval_dataset=None, **overrides):
    return Trainer(
        TinyKron() if model is None else model,
        arguments(path, **overrides),
        train_dataset=dataset(),
        eval_dataset=eval_dataset,
        callbacks=[SparsityCallback(target_sparsity=target), *callbacks],
    )


class Recorder(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_reaches_the_target_and_logs_sparsity(tmp_path, accumulation):
    recorder = Recorder()
    run = trainer(tmp_path, callbacks=[recorder], gradient_accumulation_steps=accumulation)
    run.train()
    assert_target(run.model, 0.5)
    logged = [entry["sparsity"] for entry in run.state.log_history]
    assert logged == [logs["sparsity"] for logs in recorder.seen]
    assert 0 < logged[0] < logged[1] == logged[2] == logged[3] == logged[4] == model_sparsity(run.model)
    assert run.evaluate(dataset(8))["sparsity"] == logged[-1]


def test_scope_and_schedule_are_passed_on(tmp_path):
    callback = SparsityCallback(target_sparsity=0.25, scope="layer", start=0.0, end=0.25, interval=5)
    model = TinyKron()
    Trainer(model, arguments(tmp_path, max_steps=20), train_dataset=dataset(), callbacks=[callback]).train()
    assert callback.sparsifier.end_step == 5
    assert [layer.sparsity for layer in kron_layers(model)] == [0.25, 0.25]


@pytest.mark.parametrize("restore", [False, True], ids=["default", "restore-callbacks"])
@pytest.mark.parametrize("at", [10, 15, 30], ids=["at-a-pruning", "between-prunings", "after-the-freeze"])
def test_resume_is_bit_equal(tmp_path, at, restore):
    pruned = at == 10  # also with blocks frozen before the training

    def model(seed):
        made = TinyKron(seed)
        if pruned and seed == 0:
            with torch.no_grad():
                made.fc2.s[0, :4] = 0.0
            made.fc2.freeze_mask()
        return made

    whole = trainer(tmp_path, model(0), save_strategy="steps", save_steps=at)
    whole.train()
    resumed = trainer(tmp_path / "resumed", model(1), restore_callback_states_from_checkpoint=restore)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert_same_weights(resumed.model, whole.model)
    assert_target(resumed.model, 0.5)
    (callback,) = [c for c in resumed.callback_handler.callbacks if isinstance(c, SparsityCallback)]
    assert callback.sparsifier.step_count == 40


def test_resumes_a_checkpoint_of_a_run_without_the_callback(tmp_path):
    before = Trainer(TinyKron(), arguments(tmp_path, save_strategy="steps", save_steps=5), train_dataset=dataset())
    before.train()
    resumed = trainer(tmp_path / "resumed", save_strategy="steps", save_steps=20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_target(resumed.model, 0.5)
    assert not load_file(tmp_path / "resumed" / "checkpoint-40" / "model.safetensors")["fc1.s"].all()


def test_a_second_training_keeps_the_zeros(tmp_path):
    run = trainer(tmp_path)
    run.train()
    before = masks(run.model)
    with pytest.warns(UserWarning, match="nothing is pruned"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(masks(run.model), before, strict=True))


def test_a_training_after_an_interrupted_one_starts_afresh(tmp_path):
    class InterruptAt12(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 12:
                raise KeyboardInterrupt

    interrupt = InterruptAt12()
    run = trainer(tmp_path, callbacks=[interrupt])
    (callback,) = [c for c in run.callback_handler.callbacks if isinstance(c, SparsityCallback)]
    with pytest.raises(KeyboardInterrupt):
        run.train()
    first = callback.sparsifier
    run.remove_callback(interrupt)
    run.train()
    assert (first.step_count, callback.sparsifier.step_count) == (12, 40)
    assert_target(run.model, 0.5)


def test_stopping_before_the_end_of_the_ramp_warns(tmp_path):
    class StopAt12(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 12

    with pytest.warns(UserWarning, match="ended after 12 optimizer steps.*was not reached"):
        trainer(tmp_path, callbacks=[StopAt12()]).train()


@pytest.mark.parametrize("delay", [0, 21], ids=["from-the-start", "after-the-freeze"])
def test_loading_a_best_model_from_before_the_freeze_warns(tmp_path, delay):
    steps = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 10,
        "save_steps": 10,
        "eval_delay": delay,
        "load_best_model_at_end": True,
        "metric_for_best_model": "rank",
        "greater_is_better": False,
    }
    made = trainer(tmp_path, eval_dataset=dataset(16), **steps)
    evaluations = iter(range(10))
    made.compute_metrics = lambda _: {"rank": next(evaluations)}  # the first evaluation is the best
    if delay:
        made.train()
        assert made.state.best_global_step == 30
        assert_target(made.model, 0.5)
    else:
        early, late = r"freeze, at step 20 of 40: pass eval_delay=20 \(steps\)", r"not target_sparsity=0\.5: the best"
        with pytest.warns(UserWarning, match=early), pytest.warns(UserWarning, match=late + ".*checkpoint-10.*eval_d"):
            made.train()
        assert model_sparsity(made.model) < 0.5


def test_kron_trainer_compares_only_models_with_frozen_masks(tmp_path):
    every = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 10, "save_steps": 10}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rank", "greater_is_better": False}
    data = {"train_dataset": dataset(), "eval_dataset": dataset(16)}
    made = KronTrainer(TinyKron(), arguments(tmp_path, **every, **best), target_sparsity=0.5, **data)
    made.compute_metrics = lambda _: {"rank": made.state.global_step}  # the first that counts is the best
    made.train()
    assert made.state.best_global_step == 20
    assert_target(made.model, 0.5)


@pytest.mark.parametrize(("delay", "warned"), [(0, True), (2, True), (3, False)])
def test_the_delay_that_a_best_model_needs_is_told_in_epochs_too(tmp_path, delay, warned):
    every = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    made = trainer(tmp_path, eval_dataset=dataset(16), eval_delay=delay, metric_for_best_model="rank", **every)
    made.compute_metrics = lambda _: {"rank": made.state.global_step}  # the last is the best
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.train()
    assert ["pass eval_delay=3 (epochs)" in str(warning.message) for warning in caught] == [True] * warned
    assert_target(made.model, 0.5)


def vit(seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=4,
    )
    return get_kron_model(ViTForImageClassification(config), KronConfig(block_size=4, rank=1))


def images(size=32):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(size, 1, 8, 8, generator=generator)
    return [{"pixel_values": p, "labels": int(p[0, 0, :4].argmax())} for p in pixels]


def test_vit_zeros_are_exact_in_the_file_and_after_ordinary_training_of_the_loaded_model(tmp_path):
    model = vit()
    callback = SparsityCallback(target_sparsity=0.6)
    Trainer(model, arguments(tmp_path), train_dataset=images(), callbacks=[callback]).train()
    model.save_pretrained(tmp_path / "saved")
    stored = [value for name, value in load_file(tmp_path / "saved" / "model.safetensors").items() if name[-2:] == ".s"]
    zeros = sum(int((s == 0).sum()) for s in stored)
    assert zeros == -(-6 * sum(s.numel() for s in stored) // 10)
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "saved")
    Trainer(loaded, arguments(tmp_path, max_steps=20, weight_decay=0.1), train_dataset=images()).train()
    for layer, trained in zip(kron_layers(model), kron_layers(loaded), strict=True):
        assert torch.equal(trained.block_mask, layer.block_mask)
        assert torch.equal(trained.state_dict()["s"] == 0, ~layer.block_mask)
        assert not torch.equal(trained.s, layer.s)


@pytest.mark.parametrize("at", [10, 30], ids=["in-the-ramp", "after-the-freeze"])
def test_vit_resume_is_bit_equal(tmp_path, at):
    def run(path, seed, **overrides):
        callback = SparsityCallback(target_sparsity=0.6)
        return Trainer(vit(seed), arguments(path, **overrides), train_dataset=images(), callbacks=[callback])

    whole = run(tmp_path, 0, save_strategy="steps", save_steps=at)
    whole.train()
    resumed = run(tmp_path / "resumed", 1)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("way", [pytest.param("compiled-model", marks=pytest.mark.slow), "training-argument"])
def test_works_with_torch_compile(tmp_path, way):
    model = vit()
    callback = SparsityCallback(target_sparsity=0.6)
    if way == "compiled-model":
        given, options = torch.compile(model, backend="eager"), {"remove_unused_columns": False}
    else:
        given, options = model, {"torch_compile": True, "torch_compile_backend": "eager"}
    Trainer(given, arguments(tmp_path, **options), train_dataset=images(), callbacks=[callback]).train()
    assert callback.sparsifier.frozen
    assert 0.6 <= model_sparsity(model) < 0.61


def test_bad_options_raise_at_once():
    with pytest.raises(ValueError, match=r"target_sparsity must be .* got 1\.0"):
        SparsityCallback(target_sparsity=1.0)


def test_a_training_shorter_than_the_schedule_raises_before_it_begins(tmp_path):
    run = trainer(tmp_path, max_steps=10)
    with pytest.raises(ValueError, match="training is shorter than the sparsity schedule needs: with total_steps=10"):
        run.train()
    assert run.state.global_step == 0


def test_two_callbacks_in_one_checkpoint_raise(tmp_path):
    run = trainer(tmp_path)
    state = run.state
    state.global_step = 1
    state.max_steps = 40
    state.stateful_callbacks["SparsityCallback"] = [{}, {}]
    callback = SparsityCallback(target_sparsity=0.5)
    with pytest.raises(ValueError, match="states of 2 SparsityCallbacks; use one"):
        callback.on_train_begin(run.args, state, run.control, model=run.model, optimizer=None)


def test_two_of_them_are_refused(tmp_path):
    run = trainer(tmp_path, callbacks=[SparsityCallback(target_sparsity=0.25)])
    with pytest.raises(ValueError, match=r"this training has 2 SparsityCallbacks, .* use one"):
        run.train()
