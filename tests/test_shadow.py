"""Straight-through regrowth: kron_hf.sparsity.shadow, alone and under Sparsifier and Trainer."""

import io
import json

import pytest
import torch
from tiny_training import TinyKron, arguments, assert_same_weights, assert_target, batch, dataset, masks, train
from torch.nn import functional
from transformers import Trainer

from kron_hf.callbacks import SparsityCallback
from kron_hf.factors import kron_weight
from kron_hf.layers import KronLinear
from kron_hf.sparsity import Sparsifier
from kron_hf.sparsity.pruning import choose_dead, cubic_sparsity, kron_layers, model_sparsity
from kron_hf.sparsity.shadow import KEY

STEPS = 40
RAMP = {"start": 0.0, "end": 0.75, "interval": 4}  # pruned every 4 steps, frozen at 30


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 2e-2, "weight_decay": 0.0, **options})


def attached(model, optimizer, **options):
    given = {"target_sparsity": 0.5, "total_steps": STEPS, "regrowth": "straight_through", **RAMP, **options}
    sparsifier = Sparsifier(model, **given)
    sparsifier.attach(optimizer)
    return sparsifier


class Naive(KronLinear):
    """A dense S, the forward under a mask, the gradient straight through it."""

    hidden = None

    def forward(self, x):
        s = self.s if self.hidden is None else self.s - (self.s * self.hidden).detach()
        return functional.linear(x, kron_weight(s, self.a, self.b), self.bias)


def naive_step(model, step):
    """What `Sparsifier` shall do after a step, by the definition."""
    layers = kron_layers(model)
    if step < 30 and step % 4 == 0:
        wanted = cubic_sparsity(step, start_step=0, end_step=30, final=0.5)
        for layer, mask in zip(layers, choose_dead(layers, [None, None], wanted, "global"), strict=True):
            layer.hidden = mask
    if step == 30:
        for layer, mask in zip(layers, choose_dead(layers, [None, None], 0.5, "global"), strict=True):
            layer.s.data[mask] = 0.0
            layer.hidden = mask  # Naive knows no frozen mask: gradients of dead entries must not move them again
            layer.s.register_hook(lambda gradient, mask=mask: gradient.masked_fill(mask, 0.0))


@pytest.mark.parametrize("make_optimizer", [sgd, momentum, adamw])
def test_equals_the_naive_formula_in_values_and_gradients(make_optimizer):
    model, naive = TinyKron().double(), TinyKron().double()
    for layer in kron_layers(naive):
        layer.__class__ = Naive
    optimizer, other = make_optimizer(model), make_optimizer(naive)
    attached(model, optimizer)
    returned = 0
    for step in range(1, 31):
        before = [layer.hidden for layer in kron_layers(naive)]
        train(model, optimizer, [step])
        train(naive, other, [step])
        for layer, reference in zip(kron_layers(model), kron_layers(naive), strict=True):
            torch.testing.assert_close(layer.s.grad, reference.s.grad)
            torch.testing.assert_close(layer.a.grad, reference.a.grad)
        naive_step(naive, step)
        for layer, reference, earlier in zip(kron_layers(model), kron_layers(naive), before, strict=True):
            hidden = torch.zeros_like(layer.s, dtype=torch.bool) if reference.hidden is None else reference.hidden
            assert torch.equal(layer.s == 0, hidden)
            torch.testing.assert_close(layer.s, reference.s.masked_fill(hidden, 0.0))
            returned += 0 if earlier is None else int((earlier & ~hidden).sum())
    assert returned > 0, "no block ever came back: nothing is tested"
    assert_target(model, 0.5)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("make_optimizer", [momentum, adamw])
def test_ends_at_the_target_with_exact_zeros_and_no_shadow(make_optimizer, scope):
    model = TinyKron()
    optimizer = make_optimizer(model)
    sparsifier = attached(model, optimizer, target_sparsity=0.7, scope=scope)
    seen = []
    train(model, optimizer, range(STEPS), after_step=lambda: seen.append(masks(model)))
    sparsifier.close()
    assert_target(model, 0.7)
    assert all(torch.equal(layer.dead_blocks, layer.s == 0) for layer in kron_layers(model))
    assert all(torch.equal(*pair) for later in seen[30:] for pair in zip(seen[29], later, strict=True))
    assert not any(KEY in state for state in optimizer.state.values())


def test_between_prunings_the_forward_sees_the_mask_and_the_shadow_moves():
    model = TinyKron()
    optimizer = adamw(model)
    attached(model, optimizer, target_sparsity=0.8)
    train(model, optimizer, range(8))
    before, shadows = masks(model), [optimizer.state[layer.s][KEY].clone() for layer in kron_layers(model)]
    train(model, optimizer, range(8, 11))
    for layer, mask, shadow in zip(kron_layers(model), before, shadows, strict=True):
        assert torch.equal(layer.block_mask, mask)
        moved = optimizer.state[layer.s][KEY] != shadow
        assert torch.equal(moved, ~mask)
        assert torch.all(shadow[~mask] != 0)


def test_what_is_saved_in_the_ramp_is_what_the_forward_computes():
    model = TinyKron()
    optimizer = adamw(model)
    sparsifier = attached(model, optimizer, target_sparsity=0.8)
    train(model, optimizer, range(10))
    loaded = TinyKron(seed=1)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(**batch(3))["logits"], model(**batch(3))["logits"])
    assert model_sparsity(loaded) == sparsifier.sparsity > 0.4


def saved(model, optimizer, sparsifier):
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    return file.getvalue(), json.dumps(sparsifier.state_dict())


def resumed(state, with_optimizer=True, **options):
    tensors, counters = torch.load(io.BytesIO(state[0]), weights_only=True), json.loads(state[1])
    model = TinyKron(seed=1)
    optimizer = adamw(model)
    model.load_state_dict(tensors[0])
    if with_optimizer:
        optimizer.load_state_dict(tensors[1])
    sparsifier = attached(model, optimizer, **options)
    sparsifier.load_state_dict(counters)
    return model, optimizer, sparsifier


@pytest.mark.parametrize("at", [2, 12, 14, 35], ids=["before", "at-a-pruning", "between", "after-the-freeze"])
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_resume_is_bit_equal(at, pruned):
    model = TinyKron()
    if pruned:
        model.fc2.freeze_mask(torch.eye(2, 8).bool())
    optimizer = adamw(model)
    sparsifier = attached(model, optimizer)
    train(model, optimizer, range(at))
    state = saved(model, optimizer, sparsifier)
    train(model, optimizer, range(at, STEPS))
    again, optimizer, _ = resumed(state)
    train(again, optimizer, range(at, STEPS))
    assert_same_weights(again, model)
    assert_target(again, 0.5)
    if pruned:
        assert not again.fc2.block_mask[torch.eye(2, 8).bool()].any()


def test_without_the_optimizers_state_it_warns_once_and_goes_on():
    model = TinyKron()
    optimizer = adamw(model)
    sparsifier = attached(model, optimizer)
    train(model, optimizer, range(14))
    again, optimizer, _ = resumed(saved(model, optimizer, sparsifier), with_optimizer=False)
    with pytest.warns(UserWarning, match=r"has no 'kron_shadow': masked blocks go on from zero") as caught:
        train(again, optimizer, range(14, STEPS))
    assert len(caught) == 1
    assert_target(again, 0.5)


def test_a_run_that_turns_to_interval_regrowth_goes_on():
    model = TinyKron()
    optimizer = adamw(model)
    sparsifier = attached(model, optimizer)
    train(model, optimizer, range(14))
    again, optimizer, _ = resumed(saved(model, optimizer, sparsifier), regrowth="interval")
    train(again, optimizer, range(14, STEPS))
    assert_target(again, 0.5)


@pytest.mark.parametrize("make_optimizer", [momentum, adamw])
def test_an_s_without_gradients_until_later(make_optimizer):
    """Adam makes its state at the first gradient, and must find none before."""
    model = TinyKron()
    optimizer = make_optimizer(model)
    attached(model, optimizer)
    model.fc1.s.requires_grad_(False)
    train(model, optimizer, range(10))
    model.fc1.s.requires_grad_(True)
    train(model, optimizer, range(10, STEPS))
    assert_target(model, 0.5)


def test_explicit_step_equals_attach_and_needs_the_optimizer():
    model, other = TinyKron(), TinyKron()
    optimizer, other_optimizer = adamw(model), adamw(other)
    attached(model, optimizer)
    train(model, optimizer, range(STEPS))
    options = {"target_sparsity": 0.5, "total_steps": STEPS, "regrowth": "straight_through", **RAMP}
    sparsifier = Sparsifier(other, **options)
    train(other, other_optimizer, range(STEPS), after_step=lambda: sparsifier.step(other_optimizer))
    assert_same_weights(model, other)
    with pytest.raises(TypeError, match=r"call Sparsifier\.step\(optimizer\)"):
        Sparsifier(TinyKron(), **options).step()


def test_an_s_outside_of_the_optimizer_raises():
    model = TinyKron()
    optimizer = torch.optim.SGD(model.fc2.parameters(), lr=0.1)
    attached(model, optimizer)
    with pytest.raises(ValueError, match=r"S of shape \[8, 4\] is not among the parameters of SGD"):
        train(model, optimizer, range(4))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"hidden": "AQ=="}, "hidden must be a list of base64 texts"),
        ({"hidden": [None, None]}, "hidden must be a list of base64 texts"),
        ({"hidden": ["AQ=="]}, "1 hidden masks for 2 Kronecker layers"),
        ({"hidden": ["A", "AQ=="]}, "a mask in hidden is not base64"),
        ({"hidden": ["AQ==", "AQ=="]}, "mask of 1 bytes for a layer of 32 blocks"),
        ([], "method must be a mapping"),
    ],
    ids=["text", "none", "count", "base64", "size", "no-mapping"],
)
def test_damaged_states_raise(method, message):
    model = TinyKron()
    sparsifier = attached(model, adamw(model))
    with pytest.raises(ValueError, match=message):
        sparsifier.load_state_dict({**sparsifier.state_dict(), "method": method})


def test_bf16_autocast_and_gradient_checkpointing_train_the_shadow():
    model = TinyKron()
    optimizer = adamw(model)
    attached(model, optimizer, target_sparsity=0.8)
    for number in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.utils.checkpoint.checkpoint(lambda n=number: model(**batch(n))["loss"], use_reentrant=False)
        loss.backward()
        optimizer.step()
        if number == 9:
            assert all(torch.all((optimizer.state[m.s][KEY] != 0) == (m.s == 0)) for m in kron_layers(model))
    assert_target(model, 0.8)


@pytest.mark.parametrize("at", [10, 15], ids=["at-a-pruning", "between-prunings"])
def test_resumes_under_trainer_bit_equal(tmp_path, at):
    def trainer(path, seed, **overrides):
        callback = SparsityCallback(target_sparsity=0.5, regrowth="straight_through", end=0.75, interval=5)
        return Trainer(
            TinyKron(seed), arguments(path, **overrides), train_dataset=dataset(), callbacks=[callback]
        ), callback

    whole, _ = trainer(tmp_path, 0, save_strategy="steps", save_steps=at)
    whole.train()
    again, callback = trainer(tmp_path / "resumed", 1)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert_same_weights(again.model, whole.model)
    assert_target(again.model, 0.5)
    assert callback.sparsifier.options.regrowth == "straight_through"
