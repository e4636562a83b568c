"""What all baselines share: target, zeros that hold, hooks, state, refusals."""

import copy
import json

import pytest
import torch
from tiny_dense import ALGORITHMS, STEPS, TinyDense, adamw, assert_target, sgd, tiny_layers, zeros
from tiny_training import assert_same_weights, train
from torch import nn

from kron_hf.baselines import BlockRigL, GradualPruning, GroupLasso, IterativePruning
from kron_hf.layers import KronLinear


def made(name, model, target=0.5, total_steps=STEPS, **options):
    algorithm, defaults = ALGORITHMS[name]
    return algorithm(tiny_layers(model), target_sparsity=target, total_steps=total_steps, **{**defaults, **options})


every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@every_algorithm
@pytest.mark.parametrize("target", [0.0, 0.37, 0.8])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw], ids=["sgd", "adamw"])
def test_ends_within_one_block_of_the_target_and_zeros_hold(name, target, make_optimizer):
    model = TinyDense()
    layers, optimizer = tiny_layers(model), make_optimizer(model)
    pruner = made(name, model, target)
    pruner.attach(optimizer)
    frozen = []

    def watch():
        if pruner.frozen:
            frozen.append(zeros(layers))

    train(model, optimizer, range(STEPS), after_step=watch)
    pruner.close()
    assert_target(layers, target)
    assert len(frozen) == 21
    assert all(torch.equal(masks[key], frozen[0][key]) for masks in frozen for key in layers)
    assert pruner.sparsity == pruner.frozen_sparsity == pytest.approx(target, abs=25 / 1110)


@pytest.mark.parametrize("name", ["lasso", "iterative", "gradual"])
def test_layer_scope_takes_the_same_share_from_each_layer(name):
    model = TinyDense()
    with torch.no_grad():
        model.fc1.weight.mul_(0.01)  # under global scope it would lose nearly all
    optimizer = sgd(model)
    made(name, model, scope="layer").attach(optimizer)
    train(model, optimizer, range(STEPS))
    assert [int(mask.sum()) for mask in zeros(tiny_layers(model)).values()] == [30, 9, 15]


@every_algorithm
def test_optimizer_state_and_gradients_of_dead_blocks_are_zero(name):
    model = TinyDense()
    optimizer = adamw(model)
    pruner = made(name, model)
    pruner.attach(optimizer)
    train(model, optimizer, range(25))
    linear, _ = tiny_layers(model)["fc1"]
    dead = zeros(tiny_layers(model))["fc1"]
    assert torch.equal(pruner.dead_blocks["fc1"].flatten(), dead)
    assert dead.any()
    for value in (linear.weight.grad, *(optimizer.state[linear.weight][key] for key in ("exp_avg", "exp_avg_sq"))):
        blocks = value.reshape(15, 2, 4, 4).transpose(1, 2).reshape(60, 8)
        assert torch.all(blocks[dead] == 0)
        assert torch.any(blocks[~dead] != 0)


@every_algorithm
def test_explicit_steps_equal_hooks(name):
    trained = []
    for by_hand in (False, True):
        model = TinyDense()
        optimizer = adamw(model)
        pruner = made(name, model)
        if not by_hand:
            pruner.attach(optimizer)
        train(model, optimizer, range(STEPS), after_step=(lambda p=pruner, o=optimizer: p.step(o)) if by_hand else None)
        trained.append(model)
    assert_same_weights(*trained)


@every_algorithm
@pytest.mark.parametrize("at", [10, 12, 30], ids=["at-an-update", "between-updates", "after-the-freeze"])
def test_resume_is_bit_equal(name, at):
    whole = TinyDense()
    optimizer = adamw(whole)
    made(name, whole).attach(optimizer)
    train(whole, optimizer, range(STEPS))
    first = TinyDense()
    optimizer = adamw(first)
    pruner = made(name, first)
    pruner.attach(optimizer)
    train(first, optimizer, range(at))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    text = json.dumps(pruner.state_dict())
    second = TinyDense(seed=1)
    second.load_state_dict(saved[0])
    optimizer = adamw(second)
    pruner = made(name, second)
    optimizer.load_state_dict(saved[1])
    pruner.load_state_dict(json.loads(text))
    pruner.attach(optimizer)
    train(second, optimizer, range(at, STEPS))
    assert_same_weights(second, whole)
    assert pruner.step_count == STEPS


@every_algorithm
def test_closing_before_the_end_warns(name):
    model = TinyDense()
    optimizer = sgd(model)
    pruner = made(name, model)
    pruner.attach(optimizer)
    train(model, optimizer, range(7))
    with pytest.warns(UserWarning, match=r"ended after 7 optimizer steps.*at step 20: target_sparsity=0\.5 was not"):
        pruner.close()
    train(model, optimizer, range(STEPS))
    assert pruner.step_count == 7


def test_attaching_and_stepping_by_hand_exclude_each_other():
    model = TinyDense()
    optimizer = sgd(model)
    pruner = made("gradual", model)
    pruner.attach(optimizer)
    with pytest.raises(RuntimeError, match="an optimizer is attached"):
        pruner.step(optimizer)
    with pytest.raises(RuntimeError, match="never both"):
        pruner.attach(optimizer)
    pruner = made("gradual", model)
    pruner.step(optimizer)
    with pytest.raises(RuntimeError, match="never both"):
        pruner.attach(optimizer)
    with pytest.raises(TypeError, match="Optimizer is required to attach to, got a TinyDense"):
        pruner.step(model)


def test_overflows_that_a_fused_optimizer_skips_are_not_counted():
    model = TinyDense()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    pruner = made("rigl", model)
    pruner.attach(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    train(model, optimizer, range(2))
    optimizer.found_inf = torch.tensor(0.0)
    train(model, optimizer, range(3))
    assert pruner.step_count == 3


def test_pairs_with_an_int_as_block_size_will_do():
    linear = nn.Linear(8, 8)
    pruner = GradualPruning({"only": (linear, 4)}, target_sparsity=0.5, total_steps=40)
    assert pruner.layers["only"].block_size == (4, 4)


def nan_layer():
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[0, 0] = torch.nan
    return linear


def twice():
    linear = nn.Linear(4, 4)
    return {"a": (linear, 2), "b": (linear, 2)}


@pytest.mark.parametrize(
    ("make_layers", "error", "message"),
    [
        (dict, ValueError, "there are no layers"),
        (lambda: {"a": nn.Linear(4, 4)}, TypeError, "a: .* with a block size, got a Linear"),
        (lambda: {"a": (KronLinear(4, 4, 2, 1), 2)}, TypeError, "got a KronLinear; make Kronecker layers sparse with"),
        (lambda: {"a": (nn.Linear(6, 4), 4)}, ValueError, r"a: block_size \(4, 4\) does not divide .* \(4, 6\)"),
        (lambda: {"a": (nn.Linear(4, 4), 8)}, ValueError, r"a: block_size \(8, 8\) does not divide"),
        (lambda: {"a": (nn.Linear(4, 4), (2, 0))}, ValueError, "a: block_size must be"),
        (twice, ValueError, "b: its weight is also that of a"),
        (lambda: {"a": (nan_layer(), 2)}, ValueError, "a: its weight holds NaN"),
        (lambda: {"a": (nn.Linear(4, 4, device="meta"), 2)}, ValueError, "a: its weight is on the meta device"),
        (lambda: {"a": (nn.Linear(4, 4), 4)}, ValueError, r"needs 8 of 16 .* at most 0 can be"),
    ],
    ids=["none", "no-size", "converted", "undivided", "too-large", "no-block", "twice", "nan", "meta", "impossible"],
)
def test_layers_that_do_not_fit_raise(make_layers, error, message):
    with pytest.raises(error, match=message):
        GradualPruning(make_layers(), target_sparsity=0.5, total_steps=40)


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        (GradualPruning, {"target_sparsity": None}, "target_sparsity must be a number"),
        (GradualPruning, {"target_sparsity": 1.0}, "target_sparsity must be a number"),
        (GradualPruning, {"scope": "all"}, "scope must be one of"),
        (GradualPruning, {"start": 0.5}, "start must be before end"),
        (GradualPruning, {"interval": 0}, "interval must be a positive int"),
        (GradualPruning, {"total_steps": 10}, "training is shorter than the sparsity schedule"),
        (IterativePruning, {"rounds": 2.0}, r"rounds must be a positive int, got 2\.0"),
        (IterativePruning, {"rounds": 19}, "too short for rounds=19: .* between step 2 .* and step 20"),
        (GroupLasso, {"strength": -1}, "strength must be a finite number that is not negative, got -1"),
        (GroupLasso, {"strength": "2"}, "strength must be a finite number that is not negative, got '2'"),
        (BlockRigL, {"drop_fraction": 1.5}, r"drop_fraction must be a number in \[0, 1\], got 1\.5"),
        (BlockRigL, {"distribution": "er"}, "distribution must be one of"),
    ],
)
def test_options_out_of_range_raise(algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        algorithm(tiny_layers(TinyDense()), **{"target_sparsity": 0.5, "total_steps": STEPS, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_count": -1}, "step_count must be a count"),
        ({"frozen": 1}, "frozen a bool"),
        ({"algorithm": "GroupLasso"}, "is of 'GroupLasso', not of GradualPruning"),
        ({"layers": {"fc1": [15, 4, 2, 4]}}, r"other layers .* \['fc2', 'fc3'\]"),
        ({"layers": None}, "other layers"),
        ({"dead": ["AA=="]}, "dead must be a list"),
        ({"dead": ["???", "", ""]}, "not base64"),
        ({"dead": None}, "dead must be a list"),
        ({"method": 1}, "method must be an object"),
    ],
)
def test_states_that_do_not_fit_raise(change, message):
    model = TinyDense()
    optimizer = sgd(model)
    pruner = made("gradual", model)
    pruner.attach(optimizer)
    train(model, optimizer, range(25))
    state = {**pruner.state_dict(), **change}
    with pytest.raises(ValueError, match=message):
        made("gradual", TinyDense()).load_state_dict(state)
