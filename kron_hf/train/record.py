"""What of a training's options makes it the same training."""

from dataclasses import asdict
from pathlib import Path

from kron_hf.command.record import RunRecord, open_record, plain_settings
from kron_hf.train.parser import Options

__all__ = ["check_output_dir"]

# What changes the trained model; anything else may differ when a run goes on.
TRAINING = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
    *("bf16", "fp16", "seed", "data_seed", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)


def check_output_dir(options: Options) -> RunRecord:
    """Checks that the output directory is empty, or holds this very run, or is to be overwritten; changes nothing.

    Raises:
        FileExistsError: The directory is a file, or holds something else.
        ValueError: It holds a run with other settings.
    """
    training = {name: getattr(options.training, name) for name in TRAINING}
    groups = (options.model, options.checkpoint, options.data, options.kron)
    every = {name: value for group in groups for name, value in asdict(group).items()} | training
    output_dir = Path(options.training.output_dir or ".")
    return open_record("train", output_dir, plain_settings(every), overwrite=options.run.overwrite)
