"""Block-size selection under the stock Trainer: a tiny ViT on digits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_equal
from tiny_selection import (
    SAVE_STEPS,
    TwoLayers,
    callback_in,
    callback_of,
    digits,
    stored_state,
    stored_tensors,
    trainer,
    vit,
)
from tiny_training import arguments, dataset
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback

from kron_hf import BlockSizeCallback, KronConfig, KronLinear, KronTrainer
from kron_hf.held_out_loss import HeldOutLoss
from kron_hf.selection import KronCandidates

pytestmark = pytest.mark.filterwarnings("ignore:the penalty had left:UserWarning")  # few steps, on purpose

MODES = ("validation", "penalty")
TIMES = ("runtime", "per_second", "flos")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One finished run of each mode, with a checkpoint every two steps."""
    runs = {}
    for mode in MODES:
        folder = tmp_path_factory.mktemp(mode)
        runs[mode] = trainer(folder, callback=callback_of(mode), save_strategy="steps", save_steps=SAVE_STEPS)
        runs[mode].train()
    return runs


def folder_of(run, step):
    return f"{run.args.output_dir}/checkpoint-{step}"


def kinds(model):
    return {type(module) for module in model.modules() if isinstance(module, KronLinear | KronCandidates)}


@pytest.mark.parametrize("mode", MODES)
def test_ends_with_plain_layers_a_config_and_a_result(whole, mode):
    run = whole[mode]
    callback = callback_in(run)
    assert kinds(run.model) == {KronLinear}
    sizes = {(layer.block_size, layer.rank) for layer in run.model.modules() if isinstance(layer, KronLinear)}
    assert sizes == {(callback.config.block_size, callback.config.rank)}
    config = KronConfig.from_peft_type(**json.loads(json.dumps(callback.config.to_dict(), default=list)))
    for given in (callback.config, config):
        assert str(vit(config=given)) == str(run.model)
    written = json.loads((whole_path(run) / "block_size_selection.json").read_text())
    assert written == json.loads(json.dumps(callback.result.to_dict()))
    assert written["modules"] == callback.config.modules
    assert not list(whole_path(run).glob(".*")), "nothing half-written is left"


def whole_path(run):
    return Path(run.args.output_dir)


def test_logs_candidates_and_norms(whole):
    logs = [entry for entry in whole["validation"].state.log_history if "loss" in entry]
    assert [entry["candidates_left"] for entry in logs] == [3, 3, 2, 2, 1, 1, 1, 1, 1, 1]
    assert [sum(name.startswith("norm_") for name in entry) for entry in logs] == [3, 3, 2, 2] + [0] * 6
    rates = [entry["learning_rate"] for entry in logs]
    assert rates[4] < rates[3] < rates[2], "the first run of the schedule"
    assert rates[5] == pytest.approx(0.01), "the second has warmed up"
    assert rates[-1] < rates[5]


@pytest.mark.parametrize("step", [4, 6, 8, 10, 14])
def test_checkpoints_hold_what_is_left(whole, step):
    folder = folder_of(whole["validation"], step)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    stored = stored_tensors(folder)
    assert loaded.state_dict().keys() == stored.keys()
    left = {4: 3, 6: 2, 8: 2, 10: 1, 14: 1}[step]
    assert kinds(loaded) - {KronLinear} == (set() if left == 1 else {KronCandidates})
    for layer in loaded.modules():
        if isinstance(layer, KronCandidates):
            assert len(layer.keys) == len(layer.alive) == left
    entry = json.loads((whole_path(whole["validation"]) / f"checkpoint-{step}" / "config.json").read_text())
    (names,) = {len(each.get("candidates", [1])) for each in entry["quantization_config"]["modules"].values()}
    assert names == left


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", ["fresh", "loaded"])
@pytest.mark.parametrize("at", [4, 6, 10, 14], ids=["before", "at-the-drop", "at-the-end", "after"])
def test_resume_is_bit_equal(whole, tmp_path, mode, start, at):
    expected = whole[mode]
    folder = folder_of(expected, at)
    model = vit(seed=1) if start == "fresh" else AutoModelForImageClassification.from_pretrained(folder)
    resumed = trainer(tmp_path, model, callback_of(mode), save_strategy="steps", save_steps=10)
    resumed.train(resume_from_checkpoint=folder)
    assert_equal(dict(resumed.model.state_dict()), dict(expected.model.state_dict()))
    assert callback_in(resumed).result == callback_in(expected).result
    assert callback_in(resumed).config == callback_in(expected).config
    history = [stored_state(f"{run.args.output_dir}/checkpoint-20")["log_history"] for run in (resumed, expected)]
    for entries in history:
        for entry in entries:
            for name in [name for name in entry if name.endswith(TIMES)]:
                del entry[name]
    assert history[0] == history[1]
    for name in ("optimizer.pt", "scheduler.pt"):
        saved = [torch.load(f"{run.args.output_dir}/checkpoint-20/{name}") for run in (resumed, expected)]
        assert_equal(*saved)


CONTINUE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import kron_hf
from tiny_selection import callback_of, trainer
from transformers import AutoModelForImageClassification
folder, out = sys.argv[2:]
run = trainer(out, AutoModelForImageClassification.from_pretrained(folder), callback_of())
run.train(resume_from_checkpoint=folder)
run.save_model(out)
"""


@pytest.mark.slow
def test_a_fresh_process_continues_in_the_middle(whole, tmp_path):
    run = whole["validation"]
    command = [sys.executable, "-c", CONTINUE, str(Path(__file__).parent), folder_of(run, 8), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_equal(stored_tensors(tmp_path), stored_tensors(folder_of(run, 20)))


def test_under_kron_trainer_with_dropped_candidates_out_of_every_group(tmp_path):
    run = trainer(tmp_path, trainer_class=KronTrainer, save_strategy="steps", save_steps=8)
    run.train()
    assert kinds(run.model) == {KronLinear}
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in run.model.parameters()}
    assert {id(p) for p in run.optimizer.optimizer.state} == held
    assert all(("sparsity" in log) == (log["candidates_left"] == 1) for log in run.state.log_history)
    resumed = trainer(tmp_path / "resumed", vit(1), trainer_class=KronTrainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_equal(dict(resumed.model.state_dict()), dict(run.model.state_dict()))


def test_the_best_checkpoint_is_of_the_chosen_model(tmp_path):
    """Evaluations get worse all the time, so without a reset the first would stay the best."""
    seen = {}

    class Record(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen[state.global_step] = state.best_global_step

    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rank", "greater_is_better": False}
    run = trainer(tmp_path, eval_dataset=digits()[48:], **steps, **best)
    run.add_callback(Record())
    ranks = iter(range(20))
    run.compute_metrics = lambda _: {"rank": next(ranks)}
    run.train()
    assert seen == {2: 2, 4: 2, 6: 6, 8: 6, **dict.fromkeys(range(10, 21, 2), 10)}
    assert kinds(run.model) == {KronLinear}
    assert_equal(dict(run.model.state_dict()), stored_tensors(tmp_path / "checkpoint-10"))


def test_layer_scope_restart_and_schedule_are_passed_on(tmp_path):
    callback = callback_of(scope="layer", start=0.0, end=0.2, restart=False, cost="flops", cost_weight=0.5, seed=3)
    trainer(tmp_path, callback=callback).train()
    assert callback.selector.end_step == 4
    assert callback.result.options == {
        **callback_of().options.__dict__,
        **{
            "scope": "layer",
            "start": 0.0,
            "end": 0.2,
            "restart": False,
            "cost": "flops",
            "cost_weight": 0.5,
            "seed": 3,
        },
    }
    assert len(callback.result.events) == 12
    assert kinds(vit(config=callback.config)) == {KronLinear}


def test_begins_in_a_checkpoint_of_a_run_without_it(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    run = trainer(tmp_path, callback=TrainerCallback(), **options)
    run.args.max_steps = 3
    run.train()
    resumed = trainer(tmp_path / "resumed", vit(1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [event["step"] for event in callback_in(resumed).result.events] == [6, 10]


def test_a_plain_module_and_a_second_training(tmp_path):
    data = dataset()
    callback = BlockSizeCallback(eval_dataset=data[:16])
    run = Trainer(TwoLayers(), arguments(tmp_path, max_steps=20), train_dataset=data, callbacks=[callback])
    run.train()
    chosen = callback.config
    assert kinds(run.model) == {KronLinear}
    run.train()
    assert callback.config is chosen


def test_a_training_that_ends_early_warns(tmp_path):
    class StopAt7(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 7

    run = trainer(tmp_path)
    run.add_callback(StopAt7())
    with pytest.warns(UserWarning, match="ended after 7 optimizer steps.*2 candidates are left"):
        run.train()
    assert callback_in(run).config is None


def test_a_budget_too_short_raises_before_the_training(tmp_path):
    run = trainer(tmp_path, callback=callback_of(start=0.4), max_steps=3)
    with pytest.raises(ValueError, match="2 candidates have to be dropped, one a step, and with total_steps=3 there"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass eval_dataset=, a part of the data that is neither trained nor tested on, or mode='penalty'"),
        ({"eval_dataset": iter([1])}, "must have len and integer indices, got a list_iterator"),
        ({"eval_dataset": {"a": [1], "b": [2]}}, "one eval_dataset, got a dict of 2: pass one of them"),
        ({"eval_dataset": [1], "eval_batches": 0}, "eval_batches must be a positive int, got 0"),
        ({"mode": "penalty", "end": 2}, "end must be a share"),
        ({"mode": "penalty", "penalty_weights": 2}, "penalty_weights must be one of"),
    ],
    ids=["no evaluation set", "a stream", "several", "eval_batches", "options", "penalty_weights"],
)
def test_bad_options_raise_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        BlockSizeCallback(**options)


def test_two_of_them_are_refused(tmp_path):
    run = trainer(tmp_path, callback=callback_of("penalty"))
    run.add_callback(callback_of("validation"))
    with pytest.raises(ValueError, match=r"this training has 2 BlockSizeCallbacks, .* use one"):
        run.train()


def test_an_evaluation_set_without_labels_is_refused(tmp_path):
    callback = BlockSizeCallback(eval_dataset=[{"pixel_values": row["pixel_values"]} for row in digits()[48:]])
    with pytest.raises(ValueError, match=r"gives no loss .* \['pixel_values'\]; it needs labels"):
        trainer(tmp_path, callback=callback).train()


class Squares(torch.nn.Module):
    def forward(self, x):
        return {"loss": x.square().mean()}


def values(processes, rows=11, **options):
    data = [{"x": torch.tensor([float(number)]), "extra": "text"} for number in range(rows)]
    collate = lambda rows: {"x": torch.stack([row["x"] for row in rows])}  # noqa: E731
    given = {"batches": 3, "batch_size": 3, "collate": collate, "columns": {"x"}, **options}
    parts = [HeldOutLoss(data, **given, processes=processes, process=number) for number in range(processes)]
    return [part.value(Squares(), torch.device("cpu")) for part in parts]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_the_mean_over_processes_is_the_mean_over_the_rows(processes):
    rows = [number * 11 // 9 for number in range(9)]
    expected = sum(row**2 for row in rows) / 9
    found = values(processes)
    assert sum(found) / processes == pytest.approx(expected, rel=1e-6)
    small = values(processes, rows=4)  # a last batch that is smaller
    assert sum(small) / processes == pytest.approx((0 + 1 + 4 + 9) / 4, rel=1e-6)


def test_an_empty_evaluation_set_is_refused():
    with pytest.raises(ValueError, match="evaluation set of the block-size selection is empty"):
        values(1, rows=0)
