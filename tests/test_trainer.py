import json

import pytest
import torch
from tiny_training import TinyKron, arguments, assert_same_weights, assert_target, batch, dataset
from torch import nn
from transformers import Trainer, TrainerCallback

from kron_hf.param_groups import kron_param_groups
from kron_hf.trainer.kron_trainer import KronTrainer


def run(path, cls=KronTrainer, model=None, options=None, **overrides):
    model = TinyKron() if model is None else model
    return cls(model, arguments(path, **overrides), train_dataset=dataset(), **(options or {}))


def group_of(trainer, parameter):
    (group,) = [g for g in trainer.optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_groups_under_any_optimizer_of_trainer(tmp_path, optim):
    trainer = run(tmp_path, optim=optim, weight_decay=0.1, options={"factor_lr": 3.0, "mask_lr": 2.0})
    trainer.create_optimizer()
    layer = trainer.model.fc1
    expected = [(layer.s, 2e-2, 0.0), (layer.a, 3e-2, 0.1), (layer.b, 3e-2, 0.1), (layer.bias, 1e-2, 0.0)]
    for parameter, lr, decay in [*expected, (trainer.model.head.weight, 1e-2, 0.1)]:
        group = group_of(trainer, parameter)
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(lr), decay)
    stock = Trainer(TinyKron(), trainer.args, train_dataset=dataset())
    assert type(trainer.optimizer) is type(stock.create_optimizer())


def test_settings_of_adam_come_from_the_arguments(tmp_path):
    trainer = run(tmp_path, adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=1e-3)
    trainer.create_optimizer()
    assert all(group["betas"] == (0.5, 0.75) and group["eps"] == 1e-3 for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_schedules_keep_the_ratios_and_the_base_rate_is_logged(tmp_path, schedule):
    class Ratios(TrainerCallback):
        seen = ()

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            rates = [group_of(trainer, p)["lr"] for p in (model.fc1.s, model.fc1.a, model.head.weight)]
            self.seen = (*self.seen, rates)

    ratios = Ratios()
    trainer = run(tmp_path, max_steps=10, warmup_steps=3, lr_scheduler_type=schedule, logging_steps=1)
    trainer.add_callback(ratios)
    trainer.train()
    assert len({base for _, _, base in ratios.seen}) > 1
    for mask, factor, base in ratios.seen:
        assert (mask, factor) == (pytest.approx(base), pytest.approx(4 * base))
    logged = [entry["learning_rate"] for entry in trainer.state.log_history[:-1]]
    assert logged == [base for _, _, base in ratios.seen]


def test_target_sparsity_attaches_the_callback(tmp_path):
    options = {"target_sparsity": 0.5, "sparsity_options": {"scope": "layer", "end": 0.75}}
    trainer = run(tmp_path, options=options)
    trainer.train()
    assert_target(trainer.model, 0.5)
    assert trainer.model.fc1.sparsity == trainer.model.fc2.sparsity == 0.5
    assert [entry["sparsity"] for entry in trainer.state.log_history[-3:]] == [0.5] * 3


def test_integrations_see_sparsity(tmp_path):
    class Integration(TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs, **kwargs):
            self.seen = (*self.seen, logs["sparsity"])

    trainer = run(tmp_path, options={"target_sparsity": 0.5})
    integration = Integration()
    trainer.callback_handler.callbacks.insert(0, integration)  # where report_to puts them
    trainer.train()
    assert integration.seen[-1] == 0.5
    assert len(integration.seen) == len(trainer.state.log_history) == 5


@pytest.mark.parametrize("at", [10, 30], ids=["in-the-ramp", "after-the-freeze"])
def test_resume_is_bit_equal(tmp_path, at):
    options = {"target_sparsity": 0.5}
    whole = run(tmp_path, options=options, save_strategy="steps", save_steps=at)
    whole.train()
    resumed = run(tmp_path / "resumed", model=TinyKron(1), options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert_same_weights(resumed.model, whole.model)
    state = json.loads((tmp_path / f"checkpoint-{at}" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SparsityCallback"]["args"]["target_sparsity"] == 0.5


def test_model_init_gets_new_groups_for_each_training(tmp_path):
    trainer = KronTrainer(model_init=lambda: TinyKron(), args=arguments(tmp_path, max_steps=2), train_dataset=dataset())
    for _ in range(2):
        trainer.train()
        assert group_of(trainer, trainer.model.fc1.a)["initial_lr"] == pytest.approx(4e-2)
        assert trainer.optimizer_cls_and_kwargs is None


def test_a_dense_model_trains_as_under_trainer(tmp_path):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(16, 4)

        def forward(self, x, labels=None):
            logits = self.linear(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    kron, stock = (run(tmp_path, cls, Dense(), max_steps=5, weight_decay=0.1) for cls in (KronTrainer, Trainer))
    kron.train()
    stock.train()
    assert_same_weights(kron.model, stock.model)
    assert not torch.equal(kron.model.linear.weight, Dense().linear.weight)
    assert "sparsity" not in kron.state.log_history[-1]


def recipe_optimizers(model):
    return {"optimizers": (torch.optim.AdamW(kron_param_groups(model, lr=1e-2, weight_decay=0.05)), None)}


def recipe_optimizer_cls(model):
    groups = kron_param_groups(model, lr=1e-2, weight_decay=0.05)
    return {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups})}


@pytest.mark.parametrize("recipe", [recipe_optimizers, recipe_optimizer_cls])
@pytest.mark.parametrize("cls", [Trainer, KronTrainer])
def test_recipe_with_the_stock_trainer_equals_kron_trainer(tmp_path, recipe, cls):
    model = TinyKron()
    stock = run(tmp_path, cls, model, options=recipe(model), max_steps=10, logging_steps=1)
    stock.train()
    ours = run(tmp_path, options=None, max_steps=10, weight_decay=0.05, optim="adamw_torch", logging_steps=1)
    ours.train()
    assert_same_weights(stock.model, ours.model)
    rates = [[e["learning_rate"] for e in t.state.log_history[:-1]] for t in (stock, ours)]
    assert rates[0] == rates[1]
    assert rates[0][0] > rates[0][-1]


def test_stock_trainer_decays_s(tmp_path):
    """Why the groups are needed: the bias and norm filter of Trainer does not know S."""
    trainer = run(tmp_path, Trainer, weight_decay=0.1)
    trainer.create_optimizer()
    assert group_of(trainer, trainer.model.fc1.s)["weight_decay"] == 0.1


def test_an_optimizer_with_groups_of_its_own_raises(tmp_path):
    class Factory:
        def __call__(self, model, **options):
            return torch.optim.SGD(model.parameters(), **options)

    trainer = run(tmp_path, options={"optimizer_cls_and_kwargs": (Factory, {"lr": 0.1})})
    with pytest.raises(ValueError, match="makes its own groups; use another optimizer"):
        trainer.train()


def test_sparsity_options_without_a_target_raise(tmp_path):
    with pytest.raises(ValueError, match=r"sparsity_options=\{'end': 0\.75\} need a target_sparsity or an l1"):
        run(tmp_path, options={"sparsity_options": {"end": 0.75}})


def test_learns(tmp_path):
    trainer = run(tmp_path, max_steps=60, options={"target_sparsity": 0.5})
    before = trainer.model(**batch(1000, 64))["loss"]
    trainer.train()
    assert trainer.model(**batch(1000, 64))["loss"] < 0.5 * before
