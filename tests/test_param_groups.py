import pytest
import torch
from tiny_training import TinyKron, arguments, dataset
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, ViTConfig, ViTForImageClassification

from kron_hf.param_groups import kron_param_groups

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_learning_rates_and_weight_decay_by_role():
    model = TinyKron()
    groups = kron_param_groups(model, 0.1, weight_decay=0.05, factor_lr=3.0, mask_lr=2.0)
    other, no_decay = (0.1, 0.05), (0.1, 0.0)
    layer = {"s": (0.2, 0.0), "a": (pytest.approx(0.3), 0.05), "b": (pytest.approx(0.3), 0.05), "bias": no_decay}
    expected = {f"{name}.{key}": value for name in ("fc1", "fc2") for key, value in layer.items()}
    expected |= {"norm.weight": no_decay, "norm.bias": no_decay, "head.weight": other, "head.bias": no_decay}
    assert by_name(model, groups) == expected


def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none():
    model = TinyKron()
    model.tied = model.fc1
    model.head.requires_grad_(False)
    grouped = [id(p) for group in kron_param_groups(model, 0.1) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_no_group_is_empty():
    model = TinyKron()
    model.requires_grad_(False)
    model.fc1.s.requires_grad_(True)
    groups = kron_param_groups(model, 0.1, weight_decay=0.1)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.0)]


def test_default_decay_of_the_optimizer_does_not_reach_s():
    model = TinyKron()
    optimizer = torch.optim.AdamW(kron_param_groups(model, 0.1))  # AdamW's own default is 0.01
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.fc1.s, torch.ones_like(model.fc1.s))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4)),
        lambda: BertForSequenceClassification(BertConfig(**SIZES, vocab_size=20)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
    ],
    ids=["vit", "bert", "plain"],
)
def test_other_parameters_decay_as_under_trainer(make, tmp_path):
    model = make()
    decayed = Trainer(model, arguments(tmp_path), train_dataset=dataset()).get_decay_parameter_names(model)
    groups = by_name(model, kron_param_groups(model, 0.1, weight_decay=0.05))
    assert {name for name, (_, decay) in groups.items() if decay} == set(decayed)
    assert len(groups) == len(list(model.parameters())) > len(decayed)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "factor_lr", "mask_lr"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_numbers_raise(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite and not negative, got {value}"):
        kron_param_groups(TinyKron(), **{"lr": 0.1, name: value})


def test_nothing_to_train_raises():
    with pytest.raises(ValueError, match="TinyKron has no parameter that requires a gradient"):
        kron_param_groups(TinyKron().requires_grad_(False), 0.1)
