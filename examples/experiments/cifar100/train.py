"""Trains ViT-tiny, ViT-base or Swin-tiny on CIFAR-100 with the paper's recipe, dense or block-sparse by any method.

accelerate launch --config_file examples/accelerate/gpus.yaml --num_processes 8 \
    examples/experiments/cifar100/train.py --model vit-tiny --method kron_target --rank 4 --target-sparsity 0.5

Recipes are declared in recipes.yaml. A tenth of the training images, the same number of each class and always the same
ones, is held out for every choice; the model of the last step is kept, and the test images are read once, at the end.
Each run appends one JSON line to the results. The same command goes on where a killed run's last checkpoint ends, and
does nothing where the results hold the run already. On the CPU and with the same number of processes a resumed run ends
with the same bits; on a GPU it draws the same random numbers, but kernels may sum in another order.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: small models on few cores spin in OpenMP otherwise

import numpy as np
import torch
from augmentation import Augmentation
from augmented_trainer import AugmentedTrainer, Clock
from dry_run import describe
from measuring import model_figures, peak_memory_bytes, versions
from mixing import soft_cross_entropy
from raw_images import RawImages, image_processor
from run_plan import Plan, make_plan, parse_arguments
from sparsity_methods import build_dense, convert, trainer_settings
from stochastic_depth import add_drop_path
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from kron_hf import kron_summary, last_checkpoint
from kron_hf.data.examples import Examples
from kron_hf.data.sources import load_splits
from kron_hf.data.splits import ImageSplits

EPOCHS_BETWEEN_CHECKPOINTS = 5


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Runs what the command line says and returns the row of results; None after a dry run."""
    options = parse_arguments(__doc__, arguments)
    plan = make_plan(options)
    is_main = int(os.environ.get("RANK", "0")) == 0
    tell: Callable[[str], Any] = print if is_main else lambda text: None
    if options.dry_run:
        tell(describe(plan))
        return None
    results = options.results or options.output_dir / "results.jsonl"
    found = _finished(results, plan)
    if found is not None:
        tell(f"{results} holds this run already: {json.dumps(found)}")
        return found
    output_dir = options.output_dir / plan.name()
    training = _training_arguments(plan, options, output_dir)
    _check_settings(output_dir, plan, options.dataset, training)
    with training.main_process_first(local=False, desc="data set"):
        splits = load_splits(options.dataset)
    checkpoint = last_checkpoint(output_dir)
    trainer, clock = _build_trainer(plan, training, splits, options.save_steps, checkpoint)
    tell(f"{plan.name()}: {trainer.args.max_steps} steps of {plan.global_batch} images, from {checkpoint or 'scratch'}")
    trainer.train(resume_from_checkpoint=checkpoint)
    row = _measure(plan, trainer, splits, clock, test=not options.validation_only)
    trainer.save_model(str(output_dir))
    if is_main:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    trainer.accelerator.wait_for_everyone()
    tell(json.dumps(row))
    return row


def _training_arguments(plan: Plan, options: Any, output_dir: Path) -> TrainingArguments:
    training = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=plan.per_device_batch,
        per_device_eval_batch_size=2 * plan.per_device_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=plan.training.weight_decay,
        max_grad_norm=plan.training.max_grad_norm,
        bf16=options.bf16,
        use_cpu=options.use_cpu,
        seed=plan.seed,
        logging_steps=50,
        save_strategy="steps",
        save_total_limit=1,
        eval_strategy="steps",
        remove_unused_columns=False,
        dataloader_num_workers=options.num_workers,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=None if os.isatty(2) else True,
    )
    if training.world_size != plan.processes or training.n_gpu > 1:
        raise ValueError(
            f"{plan.processes} processes were started, but this one sees {training.world_size} and trains on "
            f"{training.n_gpu} GPUs; use accelerate launch with one process a GPU (on CPU set ACCELERATE_USE_CPU=true)"
        )
    return training


def _build_trainer(
    plan: Plan, training: TrainingArguments, splits: ImageSplits, save_steps: int | None, checkpoint: str | None
) -> tuple[AugmentedTrainer, Clock]:
    images = len(splits.train)
    training.max_steps, training.warmup_steps = plan.steps(images), plan.warmup_steps(images)
    every = save_steps or EPOCHS_BETWEEN_CHECKPOINTS * plan.steps_per_epoch(images)
    training.save_steps = training.eval_steps = every
    set_seed(plan.seed)
    model = _build_model(plan, splits.label_names, checkpoint)
    processor, clock = image_processor(plan.augmentation), Clock()
    validation = Examples(splits.validation, processor, channels=3)
    sparsity, callbacks = trainer_settings(plan.method, plan.training, plan.target_sparsity, validation)
    trainer = AugmentedTrainer(
        model,
        training,
        augmentation=Augmentation(plan.augmentation, len(splits.label_names), plan.seed),
        train_dataset=RawImages(splits.train),
        eval_dataset=validation,
        processing_class=processor,
        compute_loss_func=soft_cross_entropy,
        compute_metrics=_accuracy,
        preprocess_logits_for_metrics=_predicted,
        callbacks=[*callbacks, clock],
        **sparsity,
    )
    return trainer, clock


def _build_model(plan: Plan, label_names: list[str], checkpoint: str | None) -> PreTrainedModel:
    if plan.method.kind == "selection" and checkpoint is not None:
        # Which candidates are left, the checkpoint alone knows.
        model = AutoModelForImageClassification.from_pretrained(checkpoint)
        add_drop_path(model, plan.training.drop_path)
        return model
    size, rate = plan.augmentation.image_size, plan.training.drop_path
    return convert(build_dense(plan.model, label_names, size, plan.overrides, rate), plan.method)


def _measure(plan: Plan, trainer: AugmentedTrainer, splits: ImageSplits, clock: Clock, *, test: bool) -> dict[str, Any]:
    """The row of results; the test images are read here and nowhere else."""
    seconds, memory = clock.seconds, peak_memory_bytes()
    validation = trainer.evaluate()["eval_accuracy"]
    tested = None
    if test and splits.test is not None:
        examples = Examples(splits.test, trainer.processing_class, channels=3)
        tested = trainer.evaluate(examples, metric_key_prefix="test")["test_accuracy"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    identity = plan.identity()
    if plan.method.kind == "selection":
        sizes = {layer.block_size for layer in kron_summary(model).layers}
        identity["block_size"] = [list(size) for size in sorted(filter(None, sizes))]
    return {
        **identity,
        "validation_accuracy": validation,
        "test_accuracy": tested,
        **model_figures(model, plan.method.block_size),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": memory,
        "steps": trainer.state.global_step,
        "versions": versions(),
    }


def _finished(results: Path, plan: Plan) -> dict[str, Any] | None:
    """The row of this run, if there is one; the block size of a selection is its result."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    identity = plan.identity()
    if plan.method.kind == "selection":
        del identity["block_size"]
    rows = (json.loads(line) for line in lines)
    return next((row for row in rows if all(row.get(key) == value for key, value in identity.items())), None)


def _check_settings(output_dir: Path, plan: Plan, dataset: str, training: TrainingArguments) -> None:
    """Writes down what the run is, or refuses a folder in which another one was begun."""
    settings = json.dumps({**plan.settings(), "dataset": dataset}, indent=2)
    file = output_dir / "settings.json"
    if training.process_index == 0 and not file.is_file():
        output_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(settings, encoding="utf-8")
    with training.main_process_first(local=False, desc="settings"):
        if file.read_text(encoding="utf-8") != settings:
            raise ValueError(
                f"{output_dir} holds a run with other settings, see {file.name} there; remove it to start anew"
            )


def _predicted(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


if __name__ == "__main__":
    main()
