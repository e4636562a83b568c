"""`kron-hf compress` from its options to the saved model."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from kron_hf.calibration_config import CalibrationConfig
from kron_hf.command.figures import shown_figures
from kron_hf.command.images import load_images
from kron_hf.command.metric import load_metric
from kron_hf.command.processor import model_channels
from kron_hf.command.record import RunRecord, check_overwritten, open_record, plain_settings
from kron_hf.compress.comparison import Comparison, compare
from kron_hf.compress.dense import check_dense, load_dense, load_processor, needs_head
from kron_hf.compress.head import fit_head, head_of
from kron_hf.compress.healing import distill, finetune
from kron_hf.compress.parser import Options, parse_options
from kron_hf.compress.publishing import publish, publisher
from kron_hf.compress.stages import STAGES, Stages
from kron_hf.compress.task import Task
from kron_hf.config import KronConfig
from kron_hf.conversion import calibrate, check_conversion
from kron_hf.data.sources import load_any_images

__all__ = ["run_compress"]

# What changes nothing in the model: it may differ when a run goes on.
NO_SETTINGS = (
    *("output_dir", "save_steps", "logging_steps", "dataloader_num_workers", "use_cpu", "disable_tqdm"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"),
)


def run_compress(arguments: Sequence[str], *, write: Callable[[str], Any] = print) -> Comparison:
    """Compresses what the command line says, or goes on with it, and saves the model with a report.

    Args:
        arguments: The command line after `kron-hf compress`.
        write: Takes each piece of the report.

    Returns:
        The compressed model beside the dense one.

    Raises:
        OSError: Something cannot be found, read or written.
        ValueError: Options do not fit each other, the model or the data, or the budget cannot be met.
    """
    options = parse_options(arguments)
    output_dir = Path(options.healing.output_dir)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("kron-hf compress calibrates in one process; start it without a launcher")
    if options.run.overwrite:
        check_overwritten(options.dense.model, options.healing.output_dir)
    record = open_record("compress", output_dir, _settings(options), overwrite=options.run.overwrite, stages=STAGES)
    if record.results is not None:
        found = Comparison.from_dict(record.results)
        Stages(output_dir).remove()  # a kill after the end may have left them
        write(f"{output_dir} holds this run, finished; --overwrite starts it anew.\n\n{found}")
        return found
    return _Compression(options, record, write).run()


def _settings(options: Options) -> dict[str, Any]:
    groups = options[:-1]  # the last says what becomes of an earlier run
    every = {name: value for group in groups for name, value in asdict(group).items()} | options.conversion()
    return plain_settings({name: value for name, value in every.items() if name not in NO_SETTINGS})


class _Compression:
    """One run; every stage begins with what the last one has left on the disk, as a run that goes on does."""

    def __init__(self, options: Options, record: RunRecord, write: Callable[[str], Any]) -> None:
        self.options, self.record, self.write = options, record, write
        self.stages, self.token = Stages(record.output_dir), options.healing.hub_token
        splits = load_images(options.data, self.token)
        model, checkpoint, token = options.dense.model, options.checkpoint, self.token
        config = check_dense(model, checkpoint, splits.label_names, token=token)
        self.new_head = needs_head(checkpoint, config)
        others = options.comparison.ood_dataset
        self.others = None if others is None else load_any_images(others, token=token, option="--ood-dataset")
        self.task = Task(
            splits=splits,
            processor=load_processor(model, checkpoint, config, image_size=options.dense.image_size, token=token),
            channels=model_channels(config),
            metric=load_metric(options.data.metric, options.data.metric_options)[1],
            options=options.healing,
            flip=options.data.horizontal_flip,
        )
        self.device = self.task.arguments(record.output_dir).device

    def run(self) -> Comparison:
        self._introduce()
        anew = self.options.run.overwrite
        if self.stages.are_calibrated and not anew:
            self.write(f"Going on with the calibrated model in {self.stages.calibrated}")
            dense = self._placed(self.stages.load_dense() if self.new_head else self._load())
            figures = self._measure(dense, "dense")
        else:
            dense = self._dense(goes_on=self.new_head and self.stages.have_dense and not anew)
            figures = self._measure(dense, "dense")
            self._calibrate(dense)
        stages, model = {"dense": figures}, self._placed(self.stages.load_calibrated())
        stages["calibrated"] = self._measure(model, "calibrated")
        model = self._heal(model, dense, stages)
        comparison = compare(
            dense,
            model,
            self.task,
            stages,
            about_dense="the backbone as it is, with a head fitted to its features" if self.new_head else "",
            others=self.others,
            other_images=self.options.comparison.ood_images,
        )
        settings = self.options.conversion()
        publish(model, self.task, comparison, base=self.options.dense.model, settings=settings)
        self.record.finish(comparison.to_dict())
        self.stages.remove()
        self.write(f"\n{comparison}")
        self.write(f"The model, its image processor, its card and the report are in {self.record.output_dir}")
        return comparison

    def _introduce(self) -> None:
        splits = self.task.splits
        for note in splits.notes:
            self.write(f"{splits.name}: {note}")
        test = "" if splits.test is None else f", {len(splits.test)} to test"
        self.write(
            f"{splits.name}: {len(splits.train)} images of {len(splits.label_names)} classes to train, "
            f"{len(splits.validation)} to validate{test}."
        )

    def _placed(self, model: Any) -> PreTrainedModel:
        return model.to(self.device)

    def _load(self) -> PreTrainedModel:
        set_seed(self.task.options.seed)  # of a head that is not in the checkpoint
        options = self.options
        return load_dense(options.dense.model, options.checkpoint, self.task.splits.label_names, token=self.token)

    def _dense(self, *, goes_on: bool) -> PreTrainedModel:
        """The model to calibrate; a head that is fitted to it is kept in the output directory."""
        if goes_on:
            self.write(f"Going on with the dense model and its fitted head in {self.stages.dense}")
            return self._placed(self.stages.load_dense())
        dense = self._placed(self._load())
        if self.new_head:
            head_of(dense)
        check_conversion(dense, self._config())  # before features are computed, and before the Hub is asked
        if self.options.healing.push_to_hub:  # what the Hub refuses is better known now
            publisher(dense, self.task)
        if self.new_head:
            images = self.task.sample(self.options.dense.head_images)
            held_out = self.task.examples(self.task.splits.validation)
            fit_head(dense, images, held_out, batch_size=self.task.options.batch_size)
            self.write(f"A head was fitted to the dense model's features of {len(images)} images")
            self._begin()
            self.stages.save_dense(dense)
        return dense

    def _calibrate(self, dense: PreTrainedModel) -> None:
        images = self.task.sample(self.options.compression.calibration_images)
        self.write(f"Calibrating on {len(images)} images; killed in this, the command begins this anew")
        calibration = calibrate(dense, self._config(), images)
        self.write(f"\n{calibration.result}\n")
        if not self.new_head:
            self._begin()
        self.stages.save_calibrated(calibration.convert(copy.deepcopy(dense)), calibration.result)

    def _begin(self) -> None:
        """Called with the first result: a command that failed before leaves nothing behind."""
        self.record.begin(overwrite=self.options.run.overwrite)

    def _heal(
        self, model: PreTrainedModel, dense: PreTrainedModel, stages: dict[str, dict[str, float]]
    ) -> PreTrainedModel:
        options = self.options.healing
        if options.distill_steps:
            model = distill(model, dense, self.task, self.stages.distillation)
            stages["distilled"] = self._measure(model, "distilled")
        if options.finetune_steps:
            logits = options.finetune_logits
            weight = float(not self.new_head) if logits is None else logits
            model = finetune(model, dense, self.task, self.stages.finetuning, logits=weight)
            stages["fine-tuned"] = self._measure(model, "fine-tuned")
        return model

    def _config(self) -> KronConfig:
        readout, healing = self.options.compression.readout, self.options.healing
        how = CalibrationConfig(readout=readout, batch_size=healing.batch_size, seed=healing.seed)
        return KronConfig(calibration_config=how, **self.options.conversion())

    def _measure(self, model: PreTrainedModel, stage: str) -> dict[str, float]:
        figures = self.task.measure(model, self.task.splits.validation, "validation")
        self.write(f"{stage}: {shown_figures(figures)}")
        return figures
