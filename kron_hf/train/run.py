"""`kron-hf train` from its options to the saved model."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from kron_hf.command.figures import named_figures, shown_figures
from kron_hf.command.images import load_images
from kron_hf.command.metric import load_metric
from kron_hf.command.processor import model_channels
from kron_hf.command.record import check_overwritten
from kron_hf.command.trainer import CommandTrainer, EpochCallback
from kron_hf.data.examples import Examples
from kron_hf.data.splits import ImageSplits
from kron_hf.sparsity.pruning import model_sparsity
from kron_hf.summary import kron_summary
from kron_hf.train.arguments import METRIC, CommandArguments
from kron_hf.train.model import build_image_processor, build_model
from kron_hf.train.parser import Options, parse_options
from kron_hf.train.record import check_output_dir
from kron_hf.trainer.last_checkpoint import last_checkpoint

__all__ = ["check_processes", "run_train"]


def run_train(arguments: Sequence[str], *, write: Callable[[str], Any] = print) -> dict[str, float]:
    """Trains what the command line says, or goes on with it, and saves the model with its image processor and card.

    Args:
        arguments: The command line after `kron-hf train`.
        write: Takes each piece of the report, on the first process alone.

    Returns:
        The final figures: `validation_*` of the model that is kept and, if there are test images, `test_*`.

    Raises:
        OSError: Something cannot be found, read or written.
        ValueError: Options do not fit each other, the model or the data.
    """
    options = parse_options(arguments)
    training = options.training
    check_processes(training)
    if options.run.overwrite:
        check_overwritten(str(options.model.model), training.output_dir or ".")
    is_main = training.process_index == 0
    tell: Callable[[str], Any] = write if is_main else lambda text: None
    if not training.do_train:
        trainer, splits = _set_up(options, tell)
        results = _measure(trainer, splits, training)
        tell(shown_figures(results))
        return results
    record = check_output_dir(options)
    if record.results is not None:
        figures = shown_figures(record.results)
        tell(f"{training.output_dir} holds this run, finished: {figures}. --overwrite starts it anew.")
        return record.results
    checkpoint = None if options.run.overwrite else _checkpoint(training)
    trainer, splits = _set_up(options, tell)
    trainer.check_final_save()
    # Only now: a command that failed before leaves nothing behind.
    if is_main:
        record.begin(overwrite=options.run.overwrite)
    trainer.accelerator.wait_for_everyone()
    if checkpoint is not None:
        tell(f"Going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    results = _measure(trainer, splits, training)
    _save(trainer, splits, results)
    if is_main:
        record.finish(results)
    tell(f"\n{kron_summary(trainer.accelerator.unwrap_model(trainer.model))}\n\n{shown_figures(results)}")
    tell(f"The model, its image processor and its card are in {training.output_dir}")
    return results


def check_processes(training: CommandArguments) -> None:
    """Refuses processes that a launcher started, but that train each for itself.

    Raises:
        ValueError: The world is not of the size that was asked for.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and training.world_size != started:
        raise ValueError(
            f"{started} processes were started, but they do not find each other: each would train alone, into the same "
            "directory. On CPU set ACCELERATE_USE_CPU=true in the environment"
        )


def _set_up(options: Options, tell: Callable[[str], Any]) -> tuple[CommandTrainer, ImageSplits]:
    with options.training.main_process_first(local=False, desc="data set"):
        splits = load_images(options.data, options.training.hub_token)
    for note in splits.notes:
        tell(f"{splits.name}: {note}")
    trainer = _build_trainer(options, splits)
    tell(_introduction(splits, trainer))
    return trainer, splits


def _checkpoint(training: CommandArguments) -> str | None:
    if training.resume_from_checkpoint is not None:
        return training.resume_from_checkpoint
    output_dir = Path(training.output_dir or ".")
    found = last_checkpoint(output_dir)
    if found is None and training.save_only_model and any(output_dir.glob("checkpoint-*")):
        raise ValueError(
            f"{output_dir} holds checkpoints without the optimizer (--save-only-model), from which no training goes "
            "on; pass --overwrite to start anew"
        )
    return found


def _build_trainer(options: Options, splits: ImageSplits) -> CommandTrainer:
    training, kron = options.training, options.kron
    metric_name, compute_metrics = load_metric(options.data.metric, options.data.metric_options)
    if training.metric_for_best_model == METRIC:
        training.metric_for_best_model = metric_name
    set_seed(training.seed)
    start, token = (options.model, options.checkpoint), training.hub_token
    model = build_model(*start, kron, splits.label_names, token=token)
    processor = build_image_processor(*start, model.config, token=token)
    channels = model_channels(model.config)
    train = Examples(splits.train, processor, channels, flip=options.data.horizontal_flip, seed=training.seed)
    return CommandTrainer(
        model,
        training,
        train_dataset=train,
        eval_dataset=Examples(splits.validation, processor, channels),
        processing_class=processor,
        compute_metrics=compute_metrics,
        callbacks=[EpochCallback(train)],
        factor_lr=kron.factor_lr,
        mask_lr=kron.mask_lr,
        target_sparsity=kron.target_sparsity,
        l1=kron.l1,
        sparsity_options=kron.sparsity() or None,
    )


def _introduction(splits: ImageSplits, trainer: CommandTrainer) -> str:
    model = trainer.accelerator.unwrap_model(trainer.model)
    summary = kron_summary(model)
    test = "" if splits.test is None else f", {len(splits.test)} to test"
    return (
        f"{splits.name}: {len(splits.train)} images of {len(splits.label_names)} classes to train, "
        f"{len(splits.validation)} to validate{test}.\n"
        f"{type(model).__name__}: {summary.trained_params:,} parameters to train, dense {summary.dense_params:,}"
    )


def _measure(trainer: CommandTrainer, splits: ImageSplits, training: CommandArguments) -> dict[str, float]:
    """The figures of the model that is kept; the test images are read here and nowhere else."""
    validation = trainer.evaluate()
    results = named_figures(validation, "eval", "validation")
    if splits.test is not None and training.do_predict:
        like: Any = trainer.eval_dataset
        examples = Examples(splits.test, like.processor, like.channels)
        results |= named_figures(trainer.evaluate(examples, metric_key_prefix="test"), "test", "test")
    return results | {"sparsity": model_sparsity(trainer.accelerator.unwrap_model(trainer.model))}


def _save(trainer: CommandTrainer, splits: ImageSplits, results: dict[str, float]) -> None:
    shown = "test" if "test_loss" in results else "validation"
    trainer.card_dataset, trainer.card_split = splits.name, shown
    trainer.card_metrics = {
        name.removeprefix(f"{shown}_"): value
        for name, value in results.items()
        if name.startswith(f"{shown}_") or name == "sparsity"
    }
    trainer.save_metrics("all", results, combined=False)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()  # saves and writes the card first
    else:
        trainer.save_model()
        trainer.create_model_card()
