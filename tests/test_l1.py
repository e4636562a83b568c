"""The l1 mode of `Sparsifier`: kron_hf.sparsity.proximal and kron_hf.sparsity.optimizer_state."""

import copy
import json

import pytest
import torch
from tiny_training import TinyKron, arguments, assert_same_weights, batch, dataset, masks, train
from transformers import Trainer

from kron_hf.callbacks import SparsityCallback
from kron_hf.layers import KronLinear
from kron_hf.sparsity import Sparsifier
from kron_hf.sparsity.optimizer_state import clear_state, rescale_state, step_size
from kron_hf.sparsity.proximal import soft_threshold
from kron_hf.sparsity.pruning import kron_layers, model_sparsity
from kron_hf.trainer.kron_trainer import KronTrainer

STEPS = 40  # the penalty acts from step 3 on, at 20 the masks freeze
S_ENTRIES = 32 + 16


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.05, **options)


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), **{"lr": 1e-2, **options})


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, **options})


def attached(model, optimizer, l1=1.0, **options):
    sparsifier = Sparsifier(model, l1=l1, **{"total_steps": STEPS, **options})
    sparsifier.attach(optimizer)
    return sparsifier


def test_soft_threshold():
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    assert soft_threshold(x, 1.0).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0]
    threshold = torch.tensor([0.0, 2.0, 0.25, 1.0, 0.0, 0.5, 3.0])
    assert soft_threshold(x, threshold).tolist() == [-3.0, 0.0, -0.25, 0.0, 0.5, 0.5, 0.0]


def by_hand_sgd(gradients, lr):
    return torch.full_like(gradients[0], lr)


def by_hand_adam(gradients, lr, beta2=0.999, eps=1e-8, amsgrad=False):
    v = torch.zeros_like(gradients[0])
    largest = v
    for gradient in gradients:
        v = beta2 * v + (1 - beta2) * gradient**2
        largest = torch.maximum(largest, v)
    v_hat = (largest if amsgrad else v) / (1 - beta2 ** len(gradients))
    return lr / (v_hat.sqrt() + eps)


OPTIMIZERS = [
    pytest.param(sgd, lambda g: by_hand_sgd(g, 0.05), id="sgd"),
    pytest.param(lambda m: sgd(m, momentum=0.9), lambda g: by_hand_sgd(g, 0.05), id="sgd-momentum"),
    pytest.param(adam, lambda g: by_hand_adam(g, 1e-2), id="adam"),
    pytest.param(adamw, lambda g: by_hand_adam(g, 1e-2), id="adamw"),
    pytest.param(lambda m: adamw(m, fused=True), lambda g: by_hand_adam(g, 1e-2), id="adamw-fused"),
    pytest.param(lambda m: adamw(m, amsgrad=True), lambda g: by_hand_adam(g, 1e-2, amsgrad=True), id="adamw-amsgrad"),
    pytest.param(
        lambda m: adamw(m, lr=torch.tensor(3e-3), betas=(0.8, 0.7), eps=1e-3),
        lambda g: by_hand_adam(g, 3e-3, beta2=0.7, eps=1e-3),
        id="adamw-options",
    ),
]


@pytest.mark.parametrize(("make_optimizer", "by_hand"), OPTIMIZERS)
def test_a_proximal_step_is_the_formula(make_optimizer, by_hand):
    """`S <- soft_threshold(S, step_size * l1 / n)` after each step, but for each layer's largest block."""
    model = TinyKron().double()
    optimizer = make_optimizer(model)
    sparsifier = Sparsifier(model, l1=2.0, total_steps=STEPS, start=0.0, interval=15)
    gradients = {name: [] for name in ("fc1", "fc2")}
    for number in range(4):
        train(model, optimizer, [number])
        if number == 0:
            sparsifier.step(optimizer)  # rescales; what follows, up to step 15, is the proximal step alone
            gradients = {name: [] for name in gradients}
            for layer in kron_layers(model):
                optimizer.state[layer.s].clear()
            continue
        before = {name: model.get_submodule(name).s.detach().clone() for name in gradients}
        for name, seen in gradients.items():
            seen.append(model.get_submodule(name).s.grad.clone())
        sparsifier.step(optimizer)
        for name, seen in gradients.items():
            expected = soft_threshold(before[name], by_hand(seen) * 2.0 / S_ENTRIES)
            s = model.get_submodule(name).s.detach()
            kept = s == before[name]
            assert kept.sum() == 1
            torch.testing.assert_close(s[~kept], expected[~kept])
            assert not torch.equal(expected[~kept], before[name][~kept])


@pytest.mark.parametrize("kind", [torch.tensor, float, int], ids=["tensor", "float", "int"])
def test_step_size_reads_any_kind_of_step_count_and_is_zero_before_the_first(kind):
    layer = KronLinear(8, 8, 4, 1)
    layer.s.grad = torch.ones_like(layer.s)
    optimizer = torch.optim.AdamW([layer.s], lr=0.5)
    assert step_size(optimizer, layer.s) == 0.0
    optimizer.step()
    optimizer.state[layer.s]["step"] = kind(1)
    torch.testing.assert_close(step_size(optimizer, layer.s), torch.full_like(layer.s, 0.5))  # v_hat is 1


def test_optimizers_without_known_step_sizes_raise():
    model = TinyKron()
    optimizer = torch.optim.RMSprop(model.parameters())
    attached(model, optimizer, start=0.0)
    with pytest.raises(TypeError, match=r"SGD or one with the state of Adam .*, got RMSprop"):
        train(model, optimizer, range(1))
    optimizer = sgd(model.head)
    attached(model, optimizer, start=0.0)
    with pytest.raises(ValueError, match=r"S of shape \[8, 4\] is not among the parameters of SGD"):
        train(model, optimizer, range(1))


@torch.no_grad()
def test_state_follows_masks_and_rescaling():
    layer = KronLinear(8, 8, 4, 1)
    optimizer = adamw(layer, amsgrad=True)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[layer.s])
    rescale_state(optimizer, layer.s, torch.full((2, 2), 4.0))
    after = optimizer.state[layer.s]
    for name, power in {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}.items():
        assert torch.equal(after[name], before[name] * 4.0**power)
    assert torch.equal(after["step"], before["step"])
    clear_state(optimizer, layer.s, torch.tensor([[True, False], [False, False]]))
    assert [float(after[name][0, 0]) for name in ("exp_avg", "exp_avg_sq")] == [0.0, 0.0]
    assert after["exp_avg"][0, 1] != 0.0


def trained(l1, make_optimizer=lambda m: adamw(m, lr=5e-3), steps=200):
    model = TinyKron()
    optimizer = make_optimizer(model)
    attached(model, optimizer, l1=l1, total_steps=steps)
    train(model, optimizer, range(steps))
    return model


def test_sparsity_rises_with_l1_without_a_cliff():
    weights = [0, 0.1, 0.3, 0.6, 1, 1.7, 3, 10]
    reached = [model_sparsity(trained(l1)) for l1 in weights]
    assert reached == sorted(reached)
    assert reached[0] == 0.0
    assert reached[-1] > 0.9
    assert sum(0.1 < sparsity < 0.9 for sparsity in reached) >= 4


@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
def test_an_overwhelming_penalty_leaves_one_block_in_each_layer_at_any_time(make_optimizer):
    model = TinyKron()
    optimizer = make_optimizer(model)
    attached(model, optimizer, l1=1e4)
    alive = []
    train(model, optimizer, range(STEPS), after_step=lambda: alive.append([int(m.sum()) for m in masks(model)]))
    assert alive[:2] == [[32, 16]] * 2
    assert alive[2:] == [[1, 1]] * (STEPS - 2)


def test_zeros_are_exact_during_the_penalty_and_frozen_after():
    model = TinyKron()
    optimizer = adamw(model)
    sparsifier = attached(model, optimizer)
    seen, frozen = [], []

    def watch():
        seen.append(sparsifier.sparsity)
        if sparsifier.frozen:
            frozen.append(masks(model))

    train(model, optimizer, range(STEPS), after_step=watch)
    sparsifier.close()
    assert seen[1] == 0.0
    assert 0.0 < seen[18] <= seen[19]
    assert sparsifier.frozen_sparsity == seen[19] == seen[-1]
    assert len(frozen) == 21
    assert all(torch.equal(a, b) for later in frozen for a, b in zip(frozen[0], later, strict=True))
    for layer in kron_layers(model):
        assert torch.equal(layer.dead_blocks, layer.s == 0)
        for parameter in (layer.s, layer.a):
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.all(optimizer.state[parameter][key][..., layer.dead_blocks] == 0)


def test_the_end_zeroes_what_one_more_interval_of_the_penalty_would():
    model = TinyKron()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, l1=0.96, total_steps=STEPS, start=0.0, end=0.5, interval=10)
    for number in range(20):
        train(model, optimizer, [number])
        if number == 19:
            threshold = 0.05 * 0.96 / S_ENTRIES  # 0.001
            with torch.no_grad():
                model.fc1.s[0, :3] = torch.tensor([0.5 * threshold, 10 * threshold, 12 * threshold])
        sparsifier.step(optimizer)
    assert model.fc1.block_mask[0, :3].tolist() == [False, False, True]


@pytest.mark.parametrize("at", [10, 15, 35], ids=["at-a-rescaling", "between", "after-the-freeze"])
def test_resume_is_bit_equal(at):
    model = TinyKron()
    optimizer = adamw(model)
    sparsifier = attached(model, optimizer, end=0.75)
    train(model, optimizer, range(at))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())), json.dumps(sparsifier.state_dict())
    train(model, optimizer, range(at, STEPS))
    resumed = TinyKron(seed=1)
    optimizer = adamw(resumed)
    resumed.load_state_dict(saved[0][0])
    optimizer.load_state_dict(saved[0][1])
    sparsifier = attached(resumed, optimizer, end=0.75)
    sparsifier.load_state_dict(json.loads(saved[1]))
    train(resumed, optimizer, range(at, STEPS))
    assert_same_weights(resumed, model)
    assert 0.2 < model_sparsity(model) < 0.95


def test_counts_optimizer_steps_not_batches():
    model, other = TinyKron().double(), TinyKron().double()
    for each, parts in ((model, 1), (other, 4)):
        optimizer = adamw(each)
        assert attached(each, optimizer).options.l1 == 1.0
        train(each, optimizer, range(STEPS), accumulate=parts)
    assert all(torch.equal(a, b) for a, b in zip(masks(model), masks(other), strict=True))
    assert 0.1 < model_sparsity(model) < 0.95


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_step_skipped_for_overflow_does_not_shrink(fused):
    model = TinyKron()
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    sparsifier = attached(model, optimizer, start=0.0)
    for number, overflow in enumerate([False, True]):
        optimizer.zero_grad()
        scaler.scale(model(**batch(number))["loss"]).backward()
        before = copy.deepcopy(model)
        if overflow:
            model.fc1.s.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert_same_weights(model, before)
    assert sparsifier.step_count == 1


@pytest.mark.parametrize("per_block", [False, True], ids=["layer", "block"])
def test_moving_scale_from_s_to_a_does_not_escape_the_penalty(per_block):
    """S / c and A * c: the same W with a smaller penalty. The next rescaling takes it back, W bit-equal."""
    model = TinyKron()
    optimizer = adamw(model)
    sparsifier = attached(model, optimizer, l1=0.0, interval=5)
    train(model, optimizer, range(9))
    layers = kron_layers(model)
    honest = [layer.s.detach().clone() for layer in layers]
    weights = [layer.dense_weight().detach() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            exponent = torch.randint(3, 8, layer.s.shape) if per_block else torch.tensor(6)
            layer.s.mul_(0.5**exponent)
            layer.a.mul_(2.0**exponent)
    assert all(torch.equal(layer.dense_weight(), w) for layer, w in zip(layers, weights, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, [9])
    assert sparsifier.step_count == 10
    for layer, s, weight in zip(layers, honest, weights, strict=True):
        assert torch.equal(layer.dense_weight(), weight)
        ratio = layer.s / s
        assert ratio.min() > 0.24
        assert ratio.max() <= 1.0


def test_rescaling_keeps_s_within_a_factor_of_two_of_the_blocks_norm():
    model = trained(0.3)
    optimizer = adamw(model)
    attached(model, optimizer, l1=0.0, start=0.0, interval=1)
    train(model, optimizer, range(1))
    for layer in kron_layers(model):
        scale = torch.einsum("rji,rkm->jikm", layer.a, layer.b).square().mean((2, 3)).sqrt()
        scale = scale[layer.block_mask]
        assert scale.max() / scale.min() < 4.0


def test_blocks_frozen_before_stay_dead():
    model = TinyKron()
    dead = torch.zeros(2, 8, dtype=torch.bool)
    dead[0] = True
    model.fc2.freeze_mask(dead)
    model.fc1.freeze_mask(torch.ones(8, 4, dtype=torch.bool))
    optimizer = adamw(model)
    attached(model, optimizer)
    train(model, optimizer, range(STEPS))
    assert not model.fc2.block_mask[0].any()
    assert model.fc2.block_mask[1].any()
    assert not model.fc1.block_mask.any()


def test_explicit_step_needs_the_optimizer():
    sparsifier = Sparsifier(TinyKron(), l1=1.0, total_steps=STEPS, start=0.0)
    with pytest.raises(TypeError, match=r"call Sparsifier\.step\(optimizer\)"):
        sparsifier.step()


def test_closing_before_the_end_warns():
    model = TinyKron()
    with pytest.warns(UserWarning, match="schedule's end at step 20: no mask was frozen"):
        attached(model, sgd(model)).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_sparsity": 0.5, "l1": 1.0}, r"exactly one of .*, got target_sparsity=0\.5 and l1=1\.0"),
        ({}, "exactly one of target_sparsity and l1, got target_sparsity=None and l1=None"),
        ({"l1": -1.0}, r"l1 must be a finite number that is not negative, got -1\.0"),
        ({"l1": float("inf")}, "l1 must be .* got inf"),
        ({"l1": float("nan")}, "l1 must be .* got nan"),
        ({"l1": True}, "l1 must be .* got True"),
        ({"l1": "1"}, "l1 must be .* got '1'"),
        ({"l1": 1.0, "scope": "layer"}, "scope='layer' needs a target_sparsity"),
        ({"l1": 1.0, "regrowth": "straight_through"}, "regrowth='straight_through' needs a target_sparsity"),
    ],
)
@pytest.mark.parametrize("cls", [Sparsifier, SparsityCallback])
def test_bad_options_raise(cls, options, message):
    given = ((TinyKron(),), {"total_steps": STEPS}) if cls is Sparsifier else ((), {})
    with pytest.raises(ValueError, match=message):
        cls(*given[0], **given[1], **options)


def test_kron_trainer_takes_one_of_both(tmp_path):
    with pytest.raises(ValueError, match=r"got target_sparsity=0\.5 and l1=1\.0"):
        KronTrainer(TinyKron(), arguments(tmp_path), target_sparsity=0.5, l1=1.0)


@pytest.mark.parametrize("cls", [Trainer, KronTrainer])
def test_resumes_under_trainer_bit_equal_and_logs_sparsity(tmp_path, cls):
    def trainer(path, seed, **overrides):
        given = {"l1": 3.0} if cls is KronTrainer else {"callbacks": [SparsityCallback(l1=3.0)]}
        return cls(TinyKron(seed), arguments(path, **overrides), train_dataset=dataset(), **given)

    whole = trainer(tmp_path, 0, save_strategy="steps", save_steps=15)
    whole.train()
    resumed = trainer(tmp_path / "resumed", 1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert_same_weights(resumed.model, whole.model)
    logged = [entry["sparsity"] for entry in whole.state.log_history]
    assert 0.0 < logged[1] == logged[-1] == model_sparsity(whole.model)


def test_a_best_model_from_before_the_freeze_warns(tmp_path):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 10, "save_steps": 10}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rank", "greater_is_better": False}
    callbacks = [SparsityCallback(l1=3.0)]
    options = arguments(tmp_path, **steps, **best)
    made = Trainer(TinyKron(), options, train_dataset=dataset(), eval_dataset=dataset(16), callbacks=callbacks)
    evaluations = iter(range(10))
    made.compute_metrics = lambda _: {"rank": next(evaluations)}
    late = r"not 0\.\d{4} as l1=3\.0 gave: the best checkpoint, .*checkpoint-10"
    with pytest.warns(UserWarning, match="before the masks freeze"), pytest.warns(UserWarning, match=late):
        made.train()
