"""The trainer of the commands."""

from typing import Any

from transformers import (
    AutoModelForImageClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kron_hf.callbacks import sparsity_arguments
from kron_hf.data.examples import Examples
from kron_hf.model_card import write_model_card
from kron_hf.model_card.training import public_settings
from kron_hf.trainer.kron_trainer import KronTrainer

__all__ = ["CommandTrainer", "EpochCallback"]


class CommandTrainer(KronTrainer):
    """`KronTrainer` that writes our card."""

    card_dataset: str | None = None
    card_split: str | None = None
    card_metrics: dict[str, float] | None = None
    card_report: str | None = None
    card_options: dict[str, Any] | None = None

    def check_final_save(self) -> None:
        """Refuses, before the training, what would end it without a model that `from_pretrained` loads.

        Raises:
            ValueError: FSDP saves shards, of which Trainer makes no model file.
        """
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.state_dict_type.name != "FULL_STATE_DICT":
            raise ValueError(
                f"with fsdp_state_dict_type {plugin.state_dict_type.name} no model file would be saved at the end; set "
                "FULL_STATE_DICT in the config of Accelerate, as examples/accelerate/fsdp2.yaml does"
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the card of `kron_hf` with the final figures, where Trainer would write its own."""
        if self.is_world_process_zero():
            output_dir, model = self.args.output_dir or ".", self.accelerator.unwrap_model(self.model)
            if self.is_fsdp_enabled:  # counting sharded tensors takes all processes, and only this one is here
                model = AutoModelForImageClassification.from_pretrained(output_dir)
            write_model_card(
                model,
                output_dir,
                name=self.args.hub_model_id,
                dataset=self.card_dataset,
                split=self.card_split,
                metrics=self.card_metrics,
                report=self.card_report,
                overwrite=True,
                **{"training": self._settings(), "history": self.state.log_history, **(self.card_options or {})},
            )

    def _settings(self) -> dict[str, Any]:
        own = {"factor_lr": self.factor_lr, "mask_lr": self.mask_lr}
        return {**sparsity_arguments(self.state), **own, **public_settings(self.args), "steps": self.state.global_step}


class EpochCallback(TrainerCallback):
    """Tells the examples which pass over them begins, also when a training is resumed within it."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the epoch."""
        self.examples.set_epoch(int(state.epoch or 0))
