"""What kron_hf takes for granted of transformers' Trainer."""

from pathlib import Path

import torch
from private_names import relies_on
from tiny_training import arguments
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import ExportableState, TrainerState

DATA = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 4


class Exported(TrainerCallback, ExportableState):
    def __init__(self):
        self.seen = None

    def state(self):
        return {"args": {}, "attributes": {"kept": 3}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen = state.stateful_callbacks


@relies_on("transformers", "ExportableState", "stateful_callbacks")
def test_exportable_state(tmp_path):
    """What an ExportableState callback's state() gives is saved, and is in state.stateful_callbacks on resuming."""
    for resume in (False, True):
        model, callback = Fit(), Exported()
        options = {"max_steps": 2 + resume, "save_strategy": "steps", "save_steps": 2}
        trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=DATA, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        assert callback.seen["Exported"] in ({"args": {}, "attributes": {"kept": 3}}, callback)
    assert isinstance(callback.seen["Exported"], dict)
    state = TrainerState(stateful_callbacks=[Exported(), TrainerControl()])
    assert state.stateful_callbacks["Exported"]["attributes"] == {"kept": 3}


class Fit(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


@relies_on("transformers", "optimizer_cls_and_kwargs")
def test_optimizer_cls_and_kwargs(tmp_path):
    """Trainer builds its optimizer from optimizer_cls_and_kwargs, with the groups that "params" holds."""
    model = Fit()
    groups = [{"params": [model.linear.weight], "lr": 0.5}, {"params": [model.linear.bias], "lr": 0.25}]
    chosen = (torch.optim.SGD, {"params": groups})
    trainer = Trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=chosen)
    assert trainer.optimizer_cls_and_kwargs is chosen
    optimizer = trainer.create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert optimizer.param_groups[1]["params"] == [model.linear.bias]


class Recorder(Trainer):
    """A Trainer that notes which of the overridden methods were called, in which order and with what."""

    elsewhere = None

    def _save_checkpoint(self, model, trial):
        self.calls.append(("_save_checkpoint", model is self.model_wrapped, trial))
        super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial):
        return self.elsewhere or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        self.calls.append(("_push_from_checkpoint", Path(checkpoint_folder).name))

    def _finalize_training(self, trial, num_train_samples, start_time):
        self.calls.append(("_finalize_training", trial))
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _save(self, output_dir=None, state_dict=None):
        self.calls.append(("_save", Path(output_dir).name))
        super()._save(output_dir, state_dict)

    def _determine_best_metric(self, metrics, trial):
        self.calls.append(("_determine_best_metric", "eval_loss" in metrics, trial))
        return super()._determine_best_metric(metrics, trial)


def recorded(folder, **overrides):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"save_total_limit": 1, "load_best_model_at_end": True}
    trainer = Recorder(Fit(), arguments(folder, **options | overrides), train_dataset=DATA, eval_dataset=DATA[:1])
    trainer.calls = []
    return trainer


@relies_on("transformers", "_save_checkpoint", "_save", "_determine_best_metric", "_finalize_training")
def test_order_of_saving(tmp_path):
    """To save, Trainer calls _determine_best_metric, then _save_checkpoint, therein _save; last _finalize_training."""
    trainer = recorded(tmp_path)
    trainer.train()
    steps = [
        [("_determine_best_metric", True, None), ("_save_checkpoint", True, None), ("_save", f"checkpoint-{step}")]
        for step in (1, 2)
    ]
    assert trainer.calls == [*steps[0], *steps[1], ("_finalize_training", None)]
    trainer.save_model(tmp_path / "model")
    assert trainer.calls[-1] == ("_save", "model")


@relies_on("transformers", "_get_output_dir")
def test_get_output_dir(tmp_path):
    """All of checkpoint-N is written into the directory that _get_output_dir names."""
    trainer = recorded(tmp_path / "run", load_best_model_at_end=False)
    trainer.elsewhere = str(tmp_path / "elsewhere")
    trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    checkpoint = tmp_path / "elsewhere" / "checkpoint-2"
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= {
        path.name for path in checkpoint.iterdir()
    }


@relies_on("transformers", "_push_from_checkpoint")
def test_push_from_checkpoint(tmp_path):
    """With push_to_hub, _save_checkpoint ends by _push_from_checkpoint of the directory it has written."""
    trainer = recorded(tmp_path, max_steps=1)
    trainer.args.push_to_hub = True  # in the arguments it would ask for a repository
    trainer.train()
    saving = [call[:2] for call in trainer.calls if call[0] in ("_save", "_push_from_checkpoint")]
    assert saving == [("_save", "checkpoint-1"), ("_push_from_checkpoint", "checkpoint-1")]


class Epochs(Trainer):
    def _run_epoch(self, *args, **kwargs):
        self.epochs.append((args, kwargs))
        return super()._run_epoch(*args, **kwargs)


@relies_on("transformers", "_run_epoch")
def test_run_epoch(tmp_path):
    """Trainer trains each epoch within one call of _run_epoch."""
    trainer = Epochs(Fit(), arguments(tmp_path, max_steps=-1, num_train_epochs=2), train_dataset=DATA)
    trainer.epochs = []
    trainer.train()
    assert len(trainer.epochs) == 2


class Watched(Trainer):
    seen = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.seen = (*self.seen, self.current_gradient_accumulation_steps)
        return super().compute_loss(model, inputs, *args, **kwargs)


@relies_on("transformers", "current_gradient_accumulation_steps")
def test_current_gradient_accumulation_steps(tmp_path):
    """By this Trainer divides the loss: the number of batches in a step, which is smaller at the end of an epoch."""
    options = {"num_train_epochs": 1, "max_steps": -1, "gradient_accumulation_steps": 3}
    trainer = Watched(Fit(), arguments(tmp_path, per_device_train_batch_size=1, **options), train_dataset=DATA)
    trainer.train()
    assert trainer.seen == (3, 3, 3, 1)


@relies_on("transformers", "can_return_loss")
def test_can_return_loss(tmp_path):
    """Without names of labels Trainer evaluates a loss if can_return_loss is set."""

    class Unlabelled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return outputs["loss"], outputs

    for can in (False, True):
        trainer = Unlabelled(Fit(), arguments(tmp_path, label_names=[]), eval_dataset=DATA)
        trainer.can_return_loss = can
        assert ("eval_loss" in trainer.evaluate()) == can
