"""Convolutions under Trainer: the target is met exactly, zeros stay in the file and in later training, runs resume."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_convs import MODELS, UnevenConv
from tiny_training import arguments, assert_same_weights
from transformers import AutoModelForImageClassification, Trainer

from kron_hf import KronConv2d, KronTrainer, SparsityCallback
from kron_hf.sparsity.pruning import block_entries, kron_layers, model_sparsity

TARGET, STEPS = 0.5, 16  # pruned in every second step, frozen after 8


def stock(*given, **more):
    callback = SparsityCallback(target_sparsity=TARGET, interval=2)
    return Trainer(*given, **more, callbacks=[callback])


def kron(*given, **more):
    return KronTrainer(*given, **more, target_sparsity=TARGET, sparsity_options={"interval": 2})


def images(model, count=16):
    pixels = torch.randn(count, *model.size, generator=torch.Generator().manual_seed(5))
    return [{"pixel_values": p, "labels": int(p[0, 0, :4].argmax())} for p in pixels]


def dense_in_zeros(name, seed):
    """Without the frozen zeros of `converted`."""
    torch.manual_seed(seed)
    model = MODELS[name].converted().train()
    for layer in kron_layers(model):
        layer.unfreeze_mask()
        torch.nn.init.ones_(layer.s)
    return model


def run(name, folder, kind, seed=0, model=None, **options):
    model = dense_in_zeros(name, seed) if model is None else model
    made = arguments(folder, **{"max_steps": STEPS, "logging_steps": 4, **options})
    return kind(model, made, train_dataset=images(MODELS[name]))


@pytest.fixture(scope="module", params=[("lenet5", stock), ("resnet", kron)], ids=["lenet5", "resnet"])
def trained(request, tmp_path_factory):
    name, kind = request.param
    folder = tmp_path_factory.mktemp(name)
    whole = run(name, folder, kind, save_strategy="steps", save_steps=6)
    whole.train()
    return name, kind, folder, whole


def test_the_target_is_met_within_a_block_over_kernels_and_matrices(trained):
    whole = trained[3]
    layers = kron_layers(whole.model)
    assert any(isinstance(layer, KronConv2d) for layer in layers)
    entries = sum(layer.dense_weight().numel() for layer in layers)
    dead = sum(int((layer.dense_weight() == 0).sum()) for layer in layers)
    assert TARGET * entries <= dead < TARGET * entries + max(map(block_entries, layers))
    assert whole.state.log_history[-1]["sparsity"] == model_sparsity(whole.model) == pytest.approx(dead / entries)
    assert all(bool(layer.block_mask.any()) for layer in layers)


@pytest.mark.parametrize("at", [6, 12], ids=["in-the-ramp", "after-the-freeze"])
def test_resume_is_bit_equal(trained, tmp_path, at):
    name, kind, folder, whole = trained
    resumed = run(name, tmp_path, kind, seed=1)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{at}"))
    assert_same_weights(resumed.model, whole.model)


def test_zeros_are_in_the_file_and_stay_in_ordinary_training(trained, tmp_path):
    name, _, _, whole = trained
    whole.save_model(str(tmp_path / "saved"))
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").train()
    before = [layer.s.detach().clone() for layer in kron_layers(loaded)]
    Trainer(loaded, arguments(tmp_path, max_steps=4, weight_decay=0.1), train_dataset=images(MODELS[name])).train()
    for key, layer in whole.model.named_modules():
        if layer in kron_layers(whole.model):
            assert torch.equal(stored[f"{key}.s"] == 0, ~layer.block_mask)
            assert torch.equal(loaded.get_submodule(key).state_dict()["s"] == 0, ~layer.block_mask)
    assert not all(torch.equal(old, layer.s) for old, layer in zip(before, kron_layers(loaded), strict=True))


def test_the_model_of_the_distributed_checks_has_shards_of_different_sizes():
    shapes = [tuple(layer.s.shape) for layer in kron_layers(UnevenConv())]
    assert shapes == [(5, 4), (1, 5)]
