"""`ModelCardCallback`: a card at the end of a training under Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kron_hf.callbacks import sparsity_arguments
from kron_hf.claims.record import is_finite_number
from kron_hf.model_card.card import write_model_card
from kron_hf.model_card.training import public_settings
from kron_hf.sharding import is_sharded
from kron_hf.sparsity.pruning import kron_layers

if TYPE_CHECKING:
    from transformers import Trainer  # it imports datasets

__all__ = ["ModelCardCallback"]

NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "sparsity")


class ModelCardCallback(TrainerCallback):
    """Saves the trained model with its card, pictures and claims into `output_dir`, at the end of the training.

    The card gets the settings on the list of `kron_hf.model_card.training`, those of `SparsityCallback` too, the
    curves, and what was measured on the validation data last (of the best model, if that is loaded at the end).

    Trainer's `push_to_hub` and `create_model_card` write a card of their own over it. `KronTrainer` puts this one back;
    with the stock Trainer call `attach(trainer)` once. With sharded models (FSDP2) nothing is written here: call
    `write_model_card` on the model that `from_pretrained` loads.

    Args:
        dataset: Name of the data set; without it the card has no metrics.
        split: Which part of it Trainer's `eval_dataset` is.
        **card: Further arguments of `write_model_card`: name, report, base_model, license, base_license, latency,
            commit.

    Example:
        >>> callback = ModelCardCallback(dataset="digits", license="apache-2.0")
        >>> callback.split
        'validation'
    """

    def __init__(self, *, dataset: str | None = None, split: str = "validation", **card: Any) -> None:
        unknown = card.keys() - {"name", "report", "base_model", "license", "base_license", "latency", "commit"}
        if unknown:
            raise TypeError(f"ModelCardCallback has no arguments {sorted(unknown)}")
        self.dataset, self.split, self.card = dataset, split, card

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves the model, then writes the card of what was saved."""
        model = kwargs["model"]
        if not state.is_world_process_zero or any(is_sharded(layer.s) for layer in kron_layers(model)):
            return
        output_dir = Path(args.output_dir or ".")
        model.save_pretrained(output_dir)
        if kwargs.get("processing_class") is not None:
            kwargs["processing_class"].save_pretrained(output_dir)
        self.write(model, args, state)

    def write(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> Path:
        """Writes the card of the model that lies in `args.output_dir`, over any other."""
        card = {"name": args.hub_model_id, **self.card}
        return write_model_card(
            model,
            args.output_dir or ".",
            dataset=self.dataset,
            split=self.split,
            metrics=_metrics(args, state) if self.dataset else None,
            training=_settings(args, state),
            history=state.log_history,
            overwrite=True,
            **card,
        )

    def attach(self, trainer: "Trainer") -> None:
        """Lets the card of a stock Trainer be this one, also in what it pushes to the Hub."""
        theirs: Callable[..., None] = trainer.create_model_card

        def create_model_card(*args: Any, **kwargs: Any) -> None:
            theirs(*args, **kwargs)
            model: Any = trainer.accelerator.unwrap_model(trainer.model)
            if trainer.is_world_process_zero() and not any(is_sharded(layer.s) for layer in kron_layers(model)):
                self.write(model, trainer.args, trainer.state)

        trainer.create_model_card = create_model_card


def _metrics(args: TrainingArguments, state: TrainerState) -> dict[str, float]:
    """What was measured last, or of the best model, without times."""
    measured = [entry for entry in state.log_history if any(key.startswith("eval_") for key in entry)]
    if args.load_best_model_at_end and state.best_global_step:
        measured = [entry for entry in measured if entry.get("step") == state.best_global_step]
    last = measured[-1] if measured else {}
    figures = {key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_")}
    return {key: value for key, value in figures.items() if key not in NO_METRICS and is_finite_number(value)}


def _settings(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """The arguments that are told, the steps that were made, and the options of the sparsity."""
    return {**sparsity_arguments(state), **public_settings(args), "steps": state.global_step}
