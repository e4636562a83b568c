import doctest
from importlib import import_module

import pytest
import torch
from transformers import BertConfig
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from kron_hf.distillation.parts import cosine_distance, kl_divergence, relative_mse, task_loss

MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]])


def naive_relative_mse(own, other, mask):
    ratios = []
    for s, t, m in zip(own, other, mask.bool(), strict=True):
        s, t = s[m], t[m]
        about_tokens = sum(float(torch.dist(each, each.mean()) ** 2) for each in t)
        spread = sum(float(torch.dist(each, t.mean(0)) ** 2) for each in t)
        spread = max(spread, 0.01 * about_tokens) if len(t) > 1 else about_tokens
        ratios.append(float(torch.dist(s, t) ** 2) / (spread + 1e-6 * t.numel()))
    return torch.tensor(sum(ratios) / len(ratios), dtype=torch.float64)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("alike", [False, True], ids=["tokens-differ", "tokens-alike"])
def test_relative_mse(mask, alike):
    own, other = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    other = other[:, :1] + 1e-3 * other if alike else other
    expected = naive_relative_mse(own, other, torch.ones(3, 4) if mask is None else mask)
    torch.testing.assert_close(relative_mse(own, other, mask), expected)


def test_relative_mse_of_nothing_is_zero():
    tokens = torch.zeros(2, 3, 4)
    assert relative_mse(tokens, tokens) == 0
    assert relative_mse(tokens + 1, tokens, torch.zeros(2, 3)) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_kl_divergence(temperature, mask):
    own, other = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    p, q = (other / temperature).softmax(-1), (own / temperature).softmax(-1)
    each = (p * (p.log() - q.log())).sum(-1)
    means = [row[torch.ones(4).bool() if mask is None else mask[i].bool()].mean() for i, row in enumerate(each)]
    torch.testing.assert_close(kl_divergence(own, other, temperature, mask), temperature**2 * sum(means) / 3)
    whole = kl_divergence(own[:, 0], other[:, 0], temperature)
    torch.testing.assert_close(whole, temperature**2 * each[:, 0].mean())


def test_cosine_distance():
    own, other = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = [1 - s @ t / (s.norm() * t.norm()) for s, t in zip(own, other, strict=True)]
    torch.testing.assert_close(cosine_distance(own, other), sum(expected) / 3)


@pytest.mark.parametrize(
    "formula",
    [lambda s, t: relative_mse(s, t), lambda s, t: kl_divergence(s, t, 2.0), lambda s, t: cosine_distance(s, t)],
    ids=["relative_mse", "kl_divergence", "cosine_distance"],
)
def test_the_mean_over_micro_batches_is_the_mean_over_the_batch(formula):
    own, other = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    halves = [formula(s, t) for s, t in zip(own.chunk(2), other.chunk(2), strict=True)]
    torch.testing.assert_close(formula(own, other), sum(halves) / 2)


@pytest.mark.parametrize(
    "formula",
    [
        lambda s, t: relative_mse(s, t, MASK),
        lambda s, t: kl_divergence(s, t, 2.0, MASK),
        lambda s, t: cosine_distance(s[:, 0], t[:, 0]),
    ],
    ids=["relative_mse", "kl_divergence", "cosine_distance"],
)
def test_gradients(formula):
    own, other = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: formula(s, other), own.requires_grad_())


def test_half_precision_is_computed_in_float32():
    own, other = torch.randn(2, 3, 4, 64).bfloat16()
    for formula in (relative_mse, lambda s, t: kl_divergence(s, t, 2.0), cosine_distance):
        assert torch.equal(formula(own, other), formula(own.float(), other.float()))
        assert formula(own, other).dtype == torch.float32


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_task_loss_is_that_of_transformers(kind, num_items):
    classes = 1 if kind == "regression" else 5
    logits = torch.randn(6, classes)
    labels = torch.rand(6, classes).squeeze(-1) if kind != "single_label_classification" else torch.arange(6) % 5
    config = BertConfig(num_labels=classes, problem_type=kind)
    expected = ForSequenceClassificationLoss(labels, logits, config)  # which knows num_items for one label only
    scale = 1 if num_items is None else logits.numel() / (classes if "single" in kind else 1) / 7
    torch.testing.assert_close(task_loss(logits, labels, num_items), expected * scale)


@pytest.mark.parametrize("name", ["parts", "loss"])
def test_examples_of_the_docstrings(name):
    results = doctest.testmod(import_module(f"kron_hf.distillation.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
