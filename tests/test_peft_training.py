"""Training a PEFT adapter: Trainer's own checkpoints, sparsity, frozen masks that survive."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_training_checkpoints import Images, arguments, assert_equal
from tiny_peft import PEFT_NOISE, adapted, add_adapter, config, dead_blocks, load_base, logits, save_base
from transformers import Trainer, TrainingArguments

from kron_hf import KronTrainer, SparsityCallback, kron_param_groups
from kron_hf.sparsity.pruning import kron_layers, model_sparsity

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def base_model(base):
    return load_base(base, num_labels=4, hidden_dropout_prob=0.1, ignore_mismatched_sizes=True)


def build(base, seed: int = 0, **options):
    torch.manual_seed(seed)
    return get_peft_model(base_model(base), config(modules_to_save=["classifier"], **options))


def from_checkpoint(base, checkpoint):
    torch.manual_seed(1)
    return PeftModel.from_pretrained(base_model(base), checkpoint, is_trainable=True)


def sparsity_callback():
    return SparsityCallback(target_sparsity=0.5, start=0.0, end=0.5, interval=2)


def adapter_state(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("callbacks", [list, lambda: [sparsity_callback()]], ids=["dense", "sparse"])
@pytest.mark.parametrize("start", ["fresh model", "loaded checkpoint"])
def test_resume_equals_the_uninterrupted_run(base, tmp_path, start, callbacks):
    whole = build(base)
    options = {"max_steps": 16, "save_steps": 6}
    Trainer(whole, arguments(tmp_path, **options), train_dataset=Images(), callbacks=callbacks()).train()
    checkpoint = str(tmp_path / "checkpoint-6")
    model = build(base, seed=1) if start == "fresh model" else from_checkpoint(base, checkpoint)
    trainer = Trainer(model, arguments(tmp_path / "resumed", **options), train_dataset=Images(), callbacks=callbacks())
    trainer.train(resume_from_checkpoint=checkpoint)
    assert len(adapter_state(whole)) == 12 * 4 + 2
    assert_equal(adapter_state(model), adapter_state(whole))
    assert model_sparsity(model) == (0.5 if callbacks() else 0.0)


def test_training_moves_the_adapter_and_the_head_alone(base, tmp_path):
    model = build(base)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    Trainer(model, arguments(tmp_path, max_steps=2, save_strategy="no"), train_dataset=Images()).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(adapter_state(model))


def test_load_best_model_at_end_restores_every_tensor(base, tmp_path):
    model = build(base)
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "learning_rate": 1.0}
    trainer = Trainer(
        model,
        arguments(tmp_path, metric_for_best_model="loss", **options),
        train_dataset=Images(),
        eval_dataset=Images(8),
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert best is not None
    assert best.endswith(f"checkpoint-{min(losses, key=losses.__getitem__)}")
    assert_equal(adapter_state(from_checkpoint(base, best)), adapter_state(model))


@pytest.mark.parametrize("trainer_class", [Trainer, KronTrainer])
def test_sparsity_is_reached_and_survives(base, tmp_path, trainer_class):
    model = build(base)
    if trainer_class is KronTrainer:
        sparsity = {"target_sparsity": 0.5, "sparsity_options": {"start": 0.0, "end": 0.5, "interval": 2}}
    else:
        sparsity = {"callbacks": [sparsity_callback()]}
    trainer = trainer_class(model, arguments(tmp_path, max_steps=12), train_dataset=Images(), **sparsity)
    trainer.train()
    assert model_sparsity(model) == 0.5
    assert trainer.state.log_history[-2]["sparsity"] == 0.5
    assert all(layer.block_mask.any() for layer in kron_layers(model))
    masks = [layer.block_mask for layer in kron_layers(model)]
    model.save_pretrained(tmp_path / "adapter")
    loaded = from_checkpoint(base, tmp_path / "adapter")
    injected = base_model(base)
    injected.load_adapter(str(tmp_path / "adapter"), is_trainable=True)
    for again in (loaded, injected):
        assert torch.equal(logits(again), logits(model))
        optimizer = torch.optim.AdamW(kron_param_groups(again, lr=0.1, weight_decay=0.1))
        for _ in range(2):
            again.train()(**batch()).loss.backward()
            optimizer.step()
        assert [layer.block_mask.tolist() for layer in kron_layers(again)] == [mask.tolist() for mask in masks]
        assert all(torch.all(layer.masked_s()[~layer.block_mask] == 0) for layer in kron_layers(again))
        assert not torch.equal(logits(again), logits(model))
    merged = from_checkpoint(base, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(from_checkpoint(base, tmp_path / "adapter")))


def batch():
    images = Images(8)
    return {"pixel_values": images.pixels, "labels": images.labels}


def test_a_frozen_mask_holds_in_further_training(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load_base(base), tmp_path / "adapter", is_trainable=True)
    before = [dead.clone() for dead in dead_blocks(model)]
    data = [{**item, "labels": item["labels"] % 2} for item in (Images()[index] for index in range(32))]
    Trainer(model, arguments(tmp_path, max_steps=3), train_dataset=data).train()
    assert all(torch.equal(*pair) for pair in zip(before, dead_blocks(model), strict=True))
    stored = PeftModel.from_pretrained(load_base(base), tmp_path / "checkpoint-3")
    assert all(torch.all(layer.s[dead] == 0) for layer, dead in zip(kron_layers(stored), before, strict=True))


def test_gradient_checkpointing_gives_the_same_run(base, tmp_path):
    states = []
    for enabled in (False, True):
        model = build(base)
        renamed = hasattr(TrainingArguments, "activation_checkpointing")  # in transformers 5.23
        name = "activation_checkpointing" if renamed else "gradient_checkpointing"
        options = {"max_steps": 3, "save_strategy": "no", name: enabled}
        Trainer(model, arguments(tmp_path, **options), train_dataset=Images()).train()
        states.append(adapter_state(model))
    torch.testing.assert_close(states[0], states[1])


@pytest.mark.parametrize("how", ["autocast", "bf16 model"])
def test_bf16(base, tmp_path, how):
    torch.manual_seed(0)
    model = build(base)
    if how == "bf16 model":
        model = model.to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    options = {"max_steps": 2, "save_strategy": "no", "bf16": True, "learning_rate": 0.1}
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=Images())
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))
    after = adapter_state(model)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16 if how == "bf16 model" else torch.float32}
    assert not [name for name, tensor in after.items() if torch.equal(tensor, before[name])]


def test_a_transformers_model_with_an_adapter_trains_and_its_checkpoint_loads(base, tmp_path):
    torch.manual_seed(0)
    model = add_adapter(base_model(base), modules_to_save=["classifier"])
    trainer = Trainer(model, arguments(tmp_path, max_steps=8), train_dataset=Images(), callbacks=[sparsity_callback()])
    trainer.train()
    assert model_sparsity(model) == 0.5
    loaded = base_model(base)
    loaded.load_adapter(str(tmp_path / "checkpoint-8"))
    assert torch.equal(logits(loaded), logits(model))
