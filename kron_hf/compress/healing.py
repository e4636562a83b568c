"""The training after a calibration: first to do what the dense model does, then to get the labels right.

Distillation compares final tokens, class token, hidden layers and logits, without labels: it repairs the features that
the calibration has not. Fine-tuning then takes the labels, and of the dense model at most its logits: tokens that are
tied to the old ones could not adapt to the task. Where the head was fitted here, the dense model has never seen the
task but for that head, and its logits would hold the training back.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PrinterCallback

from kron_hf.command.trainer import CommandTrainer, EpochCallback
from kron_hf.compress.task import Task
from kron_hf.distillation import DistillationConfig
from kron_hf.trainer.last_checkpoint import last_checkpoint

__all__ = ["distill", "finetune"]

DISTILLATION = DistillationConfig(task=0)
WEIGHT_DECAY = 0.05


def distill(model: PreTrainedModel, dense: nn.Module, task: Task, folder: Path) -> PreTrainedModel:
    """Trains a calibrated model to do what the dense one does.

    Args:
        model: The calibrated model; it is trained in place.
        dense: The dense one.
        task: The images and options.
        folder: Where checkpoints go; from those that are there it goes on.
    """
    options = task.options
    teaching = {"teacher": dense, "distillation": DISTILLATION}
    return _train(model, task, folder, options.distill_steps, options.learning_rate, teaching)


def finetune(model: PreTrainedModel, dense: nn.Module, task: Task, folder: Path, *, logits: float) -> PreTrainedModel:
    """Trains a model on the labels.

    Args:
        model: The model; it is trained in place.
        dense: The dense one.
        task: The images and options.
        folder: Where checkpoints go; from those that are there it goes on.
        logits: Weight of the dense model's logits beside the labels.
    """
    options = task.options
    teaching: dict[str, Any] = {}
    if logits > 0:
        config = DistillationConfig(task=1.0, logits=logits, tokens=0, cls=0, hidden=0)
        teaching = {"teacher": dense, "distillation": config}
    return _train(model, task, folder, options.finetune_steps, options.finetune_learning_rate, teaching)


def _train(
    model: PreTrainedModel, task: Task, folder: Path, steps: int, learning_rate: float, teaching: dict[str, Any]
) -> PreTrainedModel:
    examples = task.training_examples()
    arguments = task.arguments(
        folder,
        max_steps=steps,
        learning_rate=learning_rate,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # a share of all steps
        bf16=task.options.bf16,
        fp16=task.options.fp16,
        save_strategy="steps",  # the last step among them: a run that goes on takes up its end
        save_steps=task.options.save_steps,
        save_total_limit=1,
    )
    trainer = CommandTrainer(
        model,
        arguments,
        train_dataset=examples,
        processing_class=task.processor,
        callbacks=[EpochCallback(examples)],
        factor_lr=1.0,  # factors that were fitted are no farther from where they belong than all else
        **teaching,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if trainer.distillation_loss is not None:
        trainer.distillation_loss.recorder(model).remove()
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
