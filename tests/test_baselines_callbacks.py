import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_dense import TinyDense, tiny_layers
from tiny_training import arguments, assert_same_weights, dataset
from transformers import Trainer, TrainerCallback, ViTConfig, ViTForImageClassification

from kron_hf.baselines import (
    BlockRigLCallback,
    ElasticGroupLassoCallback,
    GradualPruningCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    block_sparsity,
)
from kron_hf.config import KronConfig
from kron_hf.model import get_kron_model

# 40 steps: updates at 5, 10, 15, frozen at 20.
CALLBACKS = {
    "lasso": (GroupLassoCallback, {"interval": 5}),
    "elastic": (ElasticGroupLassoCallback, {"interval": 5, "l2": 1.0}),
    "rigl": (BlockRigLCallback, {"interval": 5, "end": 0.5}),
    "iterative": (IterativePruningCallback, {"rounds": 3}),
    "gradual": (GradualPruningCallback, {"interval": 5}),
}
CONFIG = KronConfig(block_size=(2, 4), rank=1, block_size_pattern={"fc2": (5, 5), "fc3": (2, 3)})
QUICK = ("elastic", "rigl")
every_callback = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CALLBACKS]
)


def callback(name, target=0.5, **options):
    kind, defaults = CALLBACKS[name]
    return kind(config=CONFIG, target_sparsity=target, **{**defaults, **options})


def trainer(path, used, model=None, callbacks=(), eval_dataset=None, **overrides):
    return Trainer(
        TinyDense() if model is None else model,
        arguments(path, **overrides),
        train_dataset=dataset(),
        eval_dataset=eval_dataset,
        callbacks=[used, *callbacks],
    )


@every_callback
def test_resume_is_bit_equal_and_sparsity_is_logged(tmp_path, name):
    used = callback(name)
    whole = trainer(tmp_path, used, save_strategy="steps", save_steps=5)
    whole.train()
    sparsity = block_sparsity(whole.model, CONFIG)
    assert 0.5 <= sparsity < 0.5 + 25 / 1110
    assert [entry["sparsity"] for entry in whole.state.log_history][-3:] == [sparsity] * 3
    stored = json.loads((tmp_path / "checkpoint-15" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert stored[type(used).__name__]["args"]["modules"]["fc2"] == {"block_size": [5, 5], "rank": 1}
    for at, restore in ((10, False), (15, True), (30, False)):
        again = callback(name)
        options = {"restore_callback_states_from_checkpoint": restore}
        resumed = trainer(tmp_path / f"resumed{at}", again, TinyDense(seed=1), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert_same_weights(resumed.model, whole.model)


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    used = callback("rigl")
    run = trainer(tmp_path, used, gradient_accumulation_steps=2)
    run.train()
    assert used.pruner.step_count == 40
    assert block_sparsity(run.model, CONFIG) == used.pruner.frozen_sparsity


def vit(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=4))


def images(size=32):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(size, 1, 8, 8, generator=generator)
    return [{"pixel_values": p, "labels": int(p[0, 0, :4].argmax())} for p in pixels]


@pytest.mark.parametrize("name", ["rigl", "gradual"])
def test_vit_by_block_size_saves_exact_zeros(tmp_path, name):
    kind, options = CALLBACKS[name]
    model, used = vit(), kind((2, 4), ["fc1", "fc2"], target_sparsity=0.6, **options)
    Trainer(model, arguments(tmp_path), train_dataset=images(), callbacks=[used]).train()
    model.save_pretrained(tmp_path / "saved")
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "saved")
    assert 0.6 <= block_sparsity(loaded, (2, 4), ["fc1", "fc2"]) < 0.6 + 8 / 1024
    assert block_sparsity(loaded, (2, 4), ["q_proj"]) == 0.0
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert sum(value.numel() for value in stored.values()) == model.num_parameters()


def test_a_vit_whose_tensors_transformers_renames_resumes_bit_equal(tmp_path):
    """The stock Trainer loads by the names of the model, but writes older ones."""

    def run(name, **resume):
        used = GradualPruningCallback((2, 4), ["fc1"], target_sparsity=0.6, interval=5)
        options = arguments(tmp_path / name, save_strategy="steps", save_steps=15)
        torch.manual_seed(0 if name == "whole" else 1)
        training = Trainer(vit(), options, train_dataset=images(), callbacks=[used])
        training.train(**resume)
        return training.model

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-15"))
    assert_same_weights(resumed, whole)
    whole.save_pretrained(tmp_path / "saved")  # afterwards it is an ordinary model of transformers again
    vit().save_pretrained(tmp_path / "ordinary")
    names = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("saved", "ordinary")]
    assert names[0] == names[1] != whole.state_dict().keys()


@pytest.mark.slow
def test_works_on_a_compiled_model(tmp_path):
    model, used = vit(), GradualPruningCallback(4, r".*\.fc1", target_sparsity=0.6)
    options = {"remove_unused_columns": False}
    compiled = torch.compile(model, backend="eager")
    Trainer(compiled, arguments(tmp_path, **options), train_dataset=images(), callbacks=[used]).train()
    assert list(used.pruner.layers) == ["vit.layers.0.mlp.fc1"]
    assert 0.6 <= block_sparsity(model, 4, ["fc1"]) < 0.6 + 16 / 512


@pytest.mark.parametrize("delay", [0, 21], ids=["from-the-start", "after-the-freeze"])
def test_loading_a_best_model_from_before_the_freeze_warns(tmp_path, delay):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 10, "save_steps": 10}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rank", "greater_is_better": False}
    run = trainer(tmp_path, callback("gradual"), eval_dataset=dataset(16), eval_delay=delay, **steps, **best)
    evaluations = iter(range(10))
    run.compute_metrics = lambda _: {"rank": next(evaluations)}  # the first evaluation is the best
    if delay:
        run.train()
        assert block_sparsity(run.model, CONFIG) >= 0.5
    else:
        with pytest.warns(UserWarning, match=r"not target_sparsity=0\.5: the best checkpoint, .*checkpoint-10.*delay"):
            run.train()


class StopAt12(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 12


def test_stopping_early_warns_and_a_second_training_starts_afresh(tmp_path):
    stop, used = StopAt12(), callback("iterative")
    run = trainer(tmp_path, used, callbacks=[stop])
    with pytest.warns(UserWarning, match="ended after 12 optimizer steps"):
        run.train()
    run.remove_callback(stop)
    run.train()
    assert used.pruner.step_count == 40
    assert block_sparsity(run.model, CONFIG) == used.pruner.frozen_sparsity


def test_resuming_needs_a_checkpoint_of_the_same_callback_and_layers(tmp_path):
    trainer(tmp_path, callback("gradual"), save_strategy="steps", save_steps=20).train()
    at = str(tmp_path / "checkpoint-20")
    with pytest.raises(ValueError, match="of a training without BlockRigLCallback"):
        trainer(tmp_path, callback("rigl")).train(resume_from_checkpoint=at)
    other = GradualPruningCallback(1, ["fc1"], target_sparsity=0.5)
    with pytest.raises(ValueError, match="of other layers than this model's"):
        trainer(tmp_path, other).train(resume_from_checkpoint=at)
    path = tmp_path / "checkpoint-20" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["GradualPruningCallback"]["attributes"] = []
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="the state of GradualPruningCallback is malformed"):
        trainer(tmp_path, callback("gradual")).train(resume_from_checkpoint=at)
    state["stateful_callbacks"]["GradualPruningCallback"] = [{}, {}]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="states of 2 GradualPruningCallbacks; use one"):
        trainer(tmp_path, callback("gradual")).train(resume_from_checkpoint=at)


def test_refuses_converted_models_and_short_trainings_before_they_begin(tmp_path):
    run = Trainer(
        get_kron_model(vit(), KronConfig(block_size=4, rank=1)),
        arguments(tmp_path),
        train_dataset=images(),
        callbacks=[GradualPruningCallback(4, target_sparsity=0.5)],
    )
    with pytest.raises(ValueError, match="already has 6 Kronecker layers"):
        run.train()
    run = trainer(tmp_path, callback("gradual"), max_steps=8)
    with pytest.raises(ValueError, match="training is shorter than the sparsity schedule needs: with total_steps=8"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize(
    ("arguments_", "error", "message"),
    [
        ({"target_sparsity": 0.5}, ValueError, "give a block_size, .* or a config"),
        ({"block_size": 4, "config": CONFIG, "target_sparsity": 0.5}, ValueError, "give a block_size"),
        ({"config": CONFIG, "target_modules": ["fc1"], "target_sparsity": 0.5}, ValueError, "give a block_size"),
        ({"block_size": 0, "target_sparsity": 0.5}, ValueError, "block_size must be"),
        ({"block_size": 4, "target_sparsity": 1.0}, ValueError, r"target_sparsity must be .* got 1\.0"),
        ({"block_size": 4}, TypeError, "target_sparsity"),
        ({"block_size": 4, "target_sparsity": 0.5, "l1": 1.0}, TypeError, "unexpected keyword argument 'l1'"),
        ({"block_size": 4, "target_sparsity": 0.5, "drop_fraction": 2}, ValueError, "drop_fraction must be"),
        ({"block_size": 4, "target_sparsity": 0.5, "total_steps": 9}, TypeError, "number of steps from the Trainer"),
    ],
)
def test_bad_options_raise_at_once(arguments_, error, message):
    with pytest.raises(error, match=message):
        BlockRigLCallback(**arguments_)


def test_tiny_config_is_tiny_layers():
    from kron_hf.baselines import block_layers

    model = TinyDense()
    assert block_layers(model, CONFIG) == tiny_layers(model)


@pytest.mark.parametrize("other", ["rigl", "gradual"])
def test_two_in_one_training_are_refused(tmp_path, other):
    run = trainer(tmp_path, callback("gradual"), callbacks=[callback(other)])
    message = r"this training has (2 GradualPruningCallbacks|GradualPruningCallback and BlockRigLCallback)"
    with pytest.raises(ValueError, match=message):
        run.train()
