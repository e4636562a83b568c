"""Whole rows and columns of blocks: kron_hf.sparsity.groups, and its part in both modes of Sparsifier."""

import pytest
import torch
from tiny_training import TinyKron, assert_target, masks, train

from kron_hf.layers import KronLinear
from kron_hf.sparsity import Sparsifier, empty_columns, empty_rows
from kron_hf.sparsity.groups import group_factor, group_importance, regrouping
from kron_hf.sparsity.optimizer_state import step_size
from kron_hf.sparsity.proximal import soft_threshold
from kron_hf.sparsity.pruning import choose_dead, kron_layers

STEPS = 40
S_ENTRIES = 32 + 16

IMPORTANCE = torch.tensor([[3.0, 4.0], [1.0, 7.0]], dtype=torch.float64)  # root mean squares: of rows sqrt(12.5), 5
ROWS = torch.tensor([[12.5**0.5] * 2, [5.0, 5.0]], dtype=torch.float64)
COLUMNS = torch.tensor([[5**0.5, 32.5**0.5]] * 2, dtype=torch.float64)


@pytest.mark.parametrize("penalty", [0.25, 1.0])
@pytest.mark.parametrize(
    ("groups", "group"),
    [("rows", ROWS), ("columns", COLUMNS), ("both", torch.minimum(ROWS, COLUMNS))],
    ids=["rows", "columns", "both"],
)
def test_group_importance_is_the_formula(groups, group, penalty):
    expected = IMPORTANCE ** (1 - penalty) * group**penalty
    torch.testing.assert_close(group_importance(IMPORTANCE, penalty, groups), expected)


def test_marks_of_dead_blocks_stay_and_count_as_zero():
    importance = torch.tensor([[3.0, -1.0], [-torch.inf, 4.0]])
    mixed = group_importance(importance, 1.0, "rows")
    torch.testing.assert_close(mixed, torch.tensor([[4.5**0.5, -1.0], [-torch.inf, 8**0.5]]))


def test_no_penalty_is_no_regrouping():
    assert regrouping(0.0, "rows") is None


def layers_with_random_s():
    torch.manual_seed(0)
    layers = [KronLinear(32, 48, (4, 4), 2), KronLinear(48, 16, (2, 8), 2)]  # S of [12, 8] and [8, 6]
    for layer in layers:
        layer.s.data.normal_()
    return layers


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("groups", ["rows", "columns", "both"])
def test_full_penalty_prunes_whole_groups(groups, scope):
    layers = layers_with_random_s()
    dead = choose_dead(layers, [None, None], 0.6, scope, regrouping(1.0, groups))
    partial = 0
    for mask in dead:
        rows, columns = mask.all(1, keepdim=True), mask.all(0, keepdim=True)
        whole = {"rows": rows, "columns": columns, "both": rows | columns}[groups]
        assert whole.any()
        loose = mask & ~whole
        partial += int(loose.any(1 if groups == "rows" else 0).sum()) if groups != "both" else int(loose.any())
    # The last group of each choice is cut where the target is met, and what is best in a layer may stay.
    assert partial <= {"global": 2, "layer": 2}[scope]


@pytest.mark.parametrize("penalty", [0.5, 1.0])
@pytest.mark.parametrize("groups", ["rows", "columns", "both"])
@pytest.mark.parametrize("regrowth", ["interval", "straight_through"])
@pytest.mark.parametrize("target", [0.5, 0.93])
def test_the_target_stays_exact_and_no_layer_empties(penalty, groups, regrowth, target):
    model = TinyKron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"group_penalty": penalty, "groups": groups, "regrowth": regrowth}
    Sparsifier(model, target_sparsity=target, total_steps=STEPS, **options).attach(optimizer)
    train(model, optimizer, range(STEPS))
    assert_target(model, target)


@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_more_penalty_empties_more_groups(groups):
    empty = {"rows": empty_rows, "columns": empty_columns}[groups]
    shares = []
    for penalty in (0.0, 0.5, 1.0):
        model = TinyKron()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        options = {"group_penalty": penalty, "groups": groups}
        Sparsifier(model, target_sparsity=0.7, total_steps=STEPS, **options).attach(optimizer)
        train(model, optimizer, range(STEPS))
        shares.append(empty(kron_layers(model)))
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_empty_rows_and_columns_count_features():
    layers = [KronLinear(16, 12, (4, 4), 1), KronLinear(24, 8, (2, 8), 1)]  # S of [3, 4] and [4, 3]
    layers[0].s.data[1] = 0.0
    layers[0].s.data[0] = -1.0
    layers[1].s.data[[0, 3]] = 0.0
    layers[1].freeze_mask()
    assert empty_rows(layers) == (4 + 2 * 2) / (12 + 8)
    layers[0].s.data[:, 2] = 0.0
    layers[1].s.data[:, 1] = 0.0
    assert empty_columns(layers) == (4 + 8) / (16 + 24)
    assert (empty_rows([]), empty_columns([])) == (0.0, 0.0)


def test_group_factor_is_the_group_soft_threshold():
    x = torch.tensor([[3.0, -4.0], [0.3, 0.4], [0.0, 0.0], [6.0, 8.0]])
    step, weight = 0.5, 2.0  # threshold 1 on norms of 5, .5, 0, 10
    factors = group_factor((x / step).square().sum(1, keepdim=True), weight)
    torch.testing.assert_close(factors, torch.tensor([[0.8], [0.0], [0.0], [0.9]]))
    assert torch.equal(group_factor(torch.zeros(2), 0.0), torch.ones(2))
    assert torch.equal(group_factor(torch.tensor([torch.inf]), 1.0), torch.ones(1))


@pytest.mark.parametrize("seed", range(5))
def test_group_factor_is_zero_where_the_preconditioned_proximal_map_is(seed):
    """Zero minimises `sum((z - x) ** 2 / (2 * step)) + weight * ||z||` exactly where no direction leads down."""
    generator = torch.Generator().manual_seed(seed)
    x, step = torch.randn(6, generator=generator).double(), torch.rand(6, generator=generator).double() + 0.1
    critical = float((x / step).norm())
    for weight, zero in ((critical * 1.001, True), (critical * 0.999, False)):
        assert (float(group_factor((x / step).square().sum(), weight)) == 0) == zero
        direction = x / step * 1e-6
        down = (direction - x).square().div(2 * step).sum() + weight * direction.norm() < x.square().div(2 * step).sum()
        assert bool(down) != zero


@pytest.mark.parametrize("groups", ["rows", "columns", "both"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_proximal_step_is_the_formula(kind, groups):
    model = TinyKron().double()
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    optimizer = make(model.parameters(), lr=1e-2)
    options = {"l1": 3.0, "group_penalty": 0.75, "groups": groups, "start": 0.0, "interval": 15}
    sparsifier = Sparsifier(model, total_steps=STEPS, **options)
    for number in range(4):
        train(model, optimizer, [number])
        before = [layer.s.detach().clone() for layer in kron_layers(model)]
        sparsifier.step(optimizer)
        if number == 0:
            continue  # that one rescales
        for layer, s in zip(kron_layers(model), before, strict=True):
            steps = torch.as_tensor(step_size(optimizer, layer.s)).double().expand_as(s)
            kept = layer.s == s
            assert kept.sum() == 1
            x = soft_threshold(s, 0.25 * 3.0 / S_ENTRIES * steps)
            dims = {"rows": [1], "columns": [0], "both": [1, 0]}[groups]
            for dim in dims:
                norms = (x / steps).masked_fill(kept, 0.0).norm(dim=dim, keepdim=True)
                weight = 0.75 / len(dims) * 3.0 / S_ENTRIES * s.shape[dim] ** 0.5
                x = x * (1 - weight / norms).clamp_min(0)
            torch.testing.assert_close(layer.s[~kept], x[~kept])


def l1_trained(penalty, groups="both", l1=1.0, steps=200):
    model = TinyKron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    Sparsifier(model, l1=l1, total_steps=steps, group_penalty=penalty, groups=groups).attach(optimizer)
    train(model, optimizer, range(steps))
    return model


@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_under_l1_full_penalty_leaves_whole_groups_alone(groups):
    model = l1_trained(1.0, groups, l1=3.0)
    emptied = 0
    for mask in masks(model):
        dim = 1 if groups == "rows" else 0
        alive = mask.any(dim)
        emptied += int((~alive).sum())
        mixed = alive & ~mask.all(dim)
        assert int(mixed.sum()) <= 1  # but for the group of the block that is never penalised
    assert emptied > 0


@pytest.mark.parametrize("groups", ["rows", "columns", "both"])
def test_an_overwhelming_penalty_leaves_one_block_in_each_layer(groups):
    assert [int(mask.sum()) for mask in masks(l1_trained(1.0, groups, l1=1e4, steps=STEPS))] == [1, 1]


def test_the_end_zeroes_groups_that_one_more_interval_of_the_penalty_would():
    model = TinyKron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"group_penalty": 1.0, "groups": "rows", "start": 0.0, "interval": 10}
    sparsifier = Sparsifier(model, l1=0.96, total_steps=STEPS, **options)
    threshold = 0.05 * 0.96 / S_ENTRIES * 2  # .001 on each entry, rows of 4: .002 on the norm
    for number in range(20):
        train(model, optimizer, [number])
        if number == 19:
            with torch.no_grad():
                model.fc1.s[0] = torch.tensor([8 * threshold, 0.0, 6 * threshold, 0.0])  # norm 10, then 9
                model.fc1.s[1] = torch.tensor([9 * threshold, 0.0, 8 * threshold, 0.0])  # norm 12.04
        sparsifier.step(optimizer)
    assert model.fc1.block_mask[0].tolist() == [False] * 4
    assert model.fc1.block_mask[1].tolist() == [True, False, True, False]
