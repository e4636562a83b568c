import copy

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_distillation import BACKBONES, batch, images, student, teacher, vit_parts
from tiny_peft import PEFT_NOISE
from tiny_training import TinyKron, arguments, assert_same_weights, assert_target, dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from kron_hf import DistillationConfig, DistillationLoss, KronConfig
from kron_hf.trainer.kron_trainer import KronTrainer

# Renamed in transformers 5.23.
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))
WEIGHTS = {"logits": 0.5, "tokens": 2.0, "cls": 3.0, "hidden": 0.25, "task": 0.75}


def run(path, model=None, other=None, rows=None, options=None, **overrides):
    model, other = student() if model is None else model, teacher() if other is None else other
    args = arguments(path, **{"max_steps": 4, "logging_steps": 2, "learning_rate": 1e-3, **overrides})
    rows = images() if rows is None else rows
    return KronTrainer(model, args, train_dataset=rows, eval_dataset=rows[:12], teacher=other, **(options or {}))


def dinov2(seed):
    torch.manual_seed(seed)
    return BACKBONES["dinov2"]().double()


def pixels(size=32):
    config = dinov2(0).config
    shape = (size, config.num_channels, config.image_size, config.image_size)
    return [{"pixel_values": each} for each in torch.randn(shape, dtype=torch.float64)]


def assert_close_weights(one, other):
    expected = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_and_its_parts_are_logged_as_means(tmp_path):
    """With a learning rate of 0 every epoch of 4 steps has the same mean."""
    own, other, rows = student(), teacher(), images()
    trainer = run(tmp_path, own, other, rows, {"distillation": WEIGHTS}, learning_rate=0.0, logging_steps=4)
    trainer.train()
    expected = {**vit_parts(own, other, rows), "task": own(**batch(rows)).loss}
    logs = trainer.state.log_history[0]
    for part, value in expected.items():
        assert logs[f"distill_{part}"] == pytest.approx(value.item()), part
    assert logs["loss"] == pytest.approx(sum(WEIGHTS[part] * value.item() for part, value in expected.items()))
    assert not any(key.startswith("distill") for key in trainer.state.log_history[-1])
    assert not any(module.training for module in other.modules())


@pytest.mark.parametrize("kind", ["labelled", "backbone", "plain"])
def test_accumulation_is_one_large_batch(tmp_path, kind):
    """A ViT takes the number of labels and leaves the division to itself; a backbone has none; TinyKron takes none."""
    runs = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        make = {"labelled": student, "backbone": dinov2, "plain": lambda seed: TinyKron(seed).double()}[kind]
        rows = {"labelled": images, "backbone": pixels, "plain": dataset}[kind]()
        if kind == "plain":
            rows = [{**row, "x": row["x"].double()} for row in rows]
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        runs.append(run(tmp_path, make(1), make(0), rows, learning_rate=0.1, **options))
        runs[-1].train()
    assert_close_weights(runs[0].model, runs[1].model)
    moved = [not torch.equal(p, q) for p, q in zip(runs[0].model.parameters(), make(1).parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    logs = [run.state.log_history[1] for run in runs]
    for key in (key for key in logs[0] if key == "loss" or key.startswith("distill")):
        assert logs[0][key] == pytest.approx(logs[1][key]), key
    assert ("distill_task" in logs[0]) == (kind != "backbone")


@pytest.mark.parametrize("steps", [1, 2])
def test_the_stock_trainer_with_the_loss_attached_does_the_same(tmp_path, steps):
    options = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
    ours = run(tmp_path, options={"distillation": WEIGHTS, "factor_lr": 1.0}, optim="sgd", **options)
    ours.train()
    own, loss = student(), DistillationLoss(teacher(), WEIGHTS)
    args = arguments(tmp_path, max_steps=4, learning_rate=1e-3, optim="sgd", logging_steps=2, **options)
    rows = images()
    with loss.attach(own):
        stock = Trainer(own, args, train_dataset=rows, eval_dataset=rows[:12], compute_loss_func=loss)
        stock.train()
        metrics, predicted = stock.evaluate(), stock.predict(rows[:12])
    assert_close_weights(own, ours.model)
    assert predicted.predictions.shape == (12, 4)
    assert metrics["eval_loss"] == pytest.approx(ours.evaluate()["eval_loss"])
    losses = [[e["loss"] for e in trainer.state.log_history if "loss" in e] for trainer in (stock, ours)]
    assert losses[0] == pytest.approx(losses[1])


def test_evaluation_measures_the_same_loss_and_predicts_logits_only(tmp_path):
    own, other, rows = student(), teacher(), images()
    options = {"distillation": WEIGHTS, "compute_metrics": lambda p: {"shape": p.predictions.shape}}
    trainer = run(tmp_path, own, other, rows, options, per_device_eval_batch_size=5)
    metrics = trainer.evaluate()
    expected = {**vit_parts(own, other, rows[:12]), "task": own(**batch(rows[:12])).loss}
    for part, value in expected.items():
        assert metrics[f"eval_distill_{part}"] == pytest.approx(value.item()), part
    assert metrics["eval_loss"] == pytest.approx(sum(WEIGHTS[part] * value.item() for part, value in expected.items()))
    assert metrics["eval_shape"] == (12, 4)
    assert "test_distill_tokens" in trainer.predict(rows[:7]).metrics


def test_a_backbone_without_labels_is_evaluated(tmp_path):
    trainer = run(tmp_path, dinov2(1), dinov2(0), pixels(), eval_strategy="steps", eval_steps=2)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    parts = {key for key in trainer.state.log_history[0] if key.startswith("distill")}
    assert parts == {"distill_tokens", "distill_cls", "distill_hidden"}
    predictions = trainer.predict(pixels(4)).predictions
    assert [each.shape[0] for each in predictions] == [4, 4]  # last_hidden_state and pooler_output


def test_images_without_labels_for_a_model_with_a_head(tmp_path):
    trainer = run(tmp_path, rows=images(labels=False), label_names=[])
    trainer.train()
    assert "distill_task" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["distill_logits"] > 0
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"task=1 was asked for, but the batch has no labels"):
        run(tmp_path, rows=images(labels=False), options={"distillation": {"task": 1}}).train()


def test_resume_is_bit_equal_and_the_teacher_is_saved_with_nothing(tmp_path):
    other = teacher()
    before = copy.deepcopy(other)
    whole = run(tmp_path, other=other, save_strategy="steps", save_steps=2)
    whole.train()
    assert_same_weights(other, before)
    resumed = run(tmp_path / "resumed", model=student(7), other=before)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.model, whole.model)
    assert resumed.state.log_history[-2] == whole.state.log_history[-2]
    assert not torch.equal(whole.model.classifier.weight, student().classifier.weight)
    optimized = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(parameter) for parameter in whole.model.parameters()}
    names = set(load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    assert len(names) == len(student().state_dict())


def test_a_teacher_by_name(tmp_path):
    other = teacher()
    other.save_pretrained(tmp_path / "teacher")
    runs = [run(tmp_path, other=each) for each in (other, str(tmp_path / "teacher"), tmp_path / "teacher")]
    for each in runs:
        each.train()
    assert_same_weights(runs[0].model, runs[1].model)
    assert_same_weights(runs[0].model, runs[2].model)
    with pytest.raises(ValueError, match=r"teacher='somewhere': TinyKron is no PreTrainedModel; pass the loaded model"):
        run(tmp_path, model=TinyKron(), other="somewhere")


@pytest.mark.filterwarnings(PEFT_NOISE)
def test_a_peft_model_is_distilled(tmp_path):
    own = get_peft_model(teacher(1), KronConfig(block_size=4, rank=1, target_modules="all-linear"))
    trainer = run(tmp_path, model=own)
    trainer.train()
    parts = {key for key in trainer.state.log_history[0] if key.startswith("distill")}
    assert parts >= {"distill_tokens", "distill_cls", "distill_hidden", "distill_logits"}


def test_model_init_attaches_to_the_new_model(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    trainer = KronTrainer(model_init=lambda: student(), args=args, train_dataset=images(), teacher=teacher())
    models = []
    for _ in range(2):
        trainer.train()
        models.append(trainer.model)
    assert models[0] is not models[1]
    assert_same_weights(*models)
    assert not torch.equal(models[0].vit.layernorm.weight, student().vit.layernorm.weight)


def test_label_smoothing_and_gradient_checkpointing(tmp_path):
    trainer = run(tmp_path, learning_rate=0.0, logging_steps=4, label_smoothing_factor=0.3)
    trainer.train()
    inputs = batch(images())
    smooth = nn.functional.cross_entropy(
        student()(pixel_values=inputs["pixel_values"]).logits, inputs["labels"], label_smoothing=0.3
    )
    assert trainer.state.log_history[0]["distill_task"] == pytest.approx(smooth.item())
    runs = [run(tmp_path, **{CHECKPOINTING: on}, optim="sgd", learning_rate=0.1) for on in (False, True)]
    for each in runs:
        each.train()
    assert_close_weights(runs[1].model, runs[0].model)
    reentrant = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r"hidden states have no gradient if .* is use_reentrant=True"):
        run(tmp_path, **reentrant)


def test_with_a_target_sparsity(tmp_path):
    torch.manual_seed(0)
    other = TinyKron(3)
    options = {"target_sparsity": 0.5}
    trainer = run(tmp_path, TinyKron(), other, dataset(), options, max_steps=40, learning_rate=1e-2, logging_steps=10)
    trainer.train()
    assert_target(trainer.model, 0.5)
    logs = [entry["distill_logits"] for entry in trainer.state.log_history if "distill_logits" in entry]
    assert len(logs) == 4


def test_without_a_teacher(tmp_path):
    with pytest.raises(ValueError, match=r"distillation=\{'tokens': 2\} needs a teacher"):
        KronTrainer(TinyKron(), arguments(tmp_path), distillation={"tokens": 2})
    with pytest.raises(ValueError, match=r"distillation=DistillationConfig\(.*\) needs a teacher"):
        KronTrainer(TinyKron(), arguments(tmp_path), distillation=DistillationConfig())


def test_the_student_as_its_teacher(tmp_path):
    own = student()
    with pytest.raises(ValueError, match=r"it is the student itself; .* teacher = copy.deepcopy\(model\)"):
        run(tmp_path, own, own)
