import json
import math
from itertools import pairwise

import pytest
import torch
from tiny_selection import TwoLayers

from kron_hf.layers import KronLinear
from kron_hf.selection import BlockSizeSelector, KronCandidates
from kron_hf.selection.candidate_set import CandidateSet
from kron_hf.selection.norms import balanced_norm, squared_norms
from kron_hf.selection.penalty import LAST, Penalty, group_shrinkage, growing_rate, shrinkages


def test_group_shrinkage_is_the_proximal_map_of_the_norm():
    """It minimises ||x - z||^2 / 2 + threshold * ||x|| over x."""
    z = torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64)
    x = z * group_shrinkage(5.0, 2.0)
    torch.testing.assert_close(x, torch.tensor([1.8, 0.0, -2.4], dtype=torch.float64))
    best = (x - z).square().sum() / 2 + 2.0 * x.norm()
    for direction in torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        other = x + 0.01 * direction
        assert (other - z).square().sum() / 2 + 2.0 * other.norm() > best


@pytest.mark.parametrize(("norm", "threshold"), [(1.0, 1.0), (1.0, 5.0), (0.0, 1.0), (0.0, 0.0)])
def test_group_shrinkage_ends_at_exactly_zero(norm, threshold):
    assert group_shrinkage(norm, threshold) == 0.0


def test_balanced_norm_is_the_smallest_over_all_scalings():
    """||S||^2 + ||A||^2 + ||B||^2 over all scalings of the factors that leave W as it is."""
    s, a, b = 4.0, 9.0, 0.25  # squared norms
    scales = torch.logspace(-2, 2, 401, dtype=torch.float64)
    over = s * scales[:, None] + a * scales[None, :] + b / (scales[:, None] * scales[None, :])
    assert balanced_norm([(s, a, b)]) <= math.sqrt(float(over.min()))
    assert balanced_norm([(s, a, b)]) == pytest.approx(math.sqrt(float(over.min())), rel=1e-4)
    assert balanced_norm([(s, a, b), (1.0, 1.0, 1.0)]) == pytest.approx(math.sqrt(3 * (s * a * b) ** (1 / 3) + 3))


def test_squared_norms():
    layer = KronLinear(8, 4, (2, 4), rank=2)
    expected = tuple(float(factor.detach().double().square().sum()) for factor in (layer.s, layer.a, layer.b))
    assert squared_norms([layer, layer]) == [expected, expected]


def test_rate_grows_geometrically_from_next_to_nothing_to_a_fifth_a_step():
    rates = [growing_rate(step, 10, 110, reference=2.0) for step in range(11, 111)]
    ratios = [later / earlier for earlier, later in pairwise(rates)]
    assert max(ratios) == pytest.approx(min(ratios))
    assert ratios[0] > 1
    assert rates[0] == pytest.approx(2.0 * 0.01 / 100, rel=0.1)
    assert rates[-1] == pytest.approx(2.0 * LAST)


def test_shrinkages_by_hand():
    found = shrinkages({0: 4.0, 1: 3.0, 2: 1.0}, {0: 1.0, 1: 2.0, 2: 3.0}, rate=0.5)
    assert found == {0: 1 - 0.5 / 4, 1: 1 - 1.0 / 3, 2: 0.0}


def test_all_penalised_to_zero_keeps_the_largest_for_its_weight():
    found = shrinkages({0: 4.0, 1: 3.0, 2: 1.0}, {0: 4.0, 1: 2.0, 2: 3.0}, rate=100.0)
    assert found == {0: 0.0, 1: 1.0, 2: 0.0}


def step_of(layer, step, weight=0.0):
    """One proximal step on a single layer; returns the drops."""
    candidates = CandidateSet(layer, "global")
    dropped = []
    penalty = Penalty(candidates, "norm", weight, 0, 100)
    penalty.advance(step, lambda choice, k, losses: dropped.append((choice, k, losses)))
    return dropped


def test_a_step_multiplies_all_factors_of_a_candidate_by_hand():
    layer = KronCandidates(8, 8, [(2, 1), (4, 2)])
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    step_of(layer, 80)
    norms, weights, factors = {}, {}, {}
    for key in ("2x2_rank1", "4x4_rank2"):
        s, a, b = (before[f"candidates.{key}.{factor}"].double().norm() for factor in "sab")
        norms[key] = math.sqrt(3) * float(s * a * b) ** (1 / 3)
        weights[key] = norms[key]  # at the start
    rate = growing_rate(80, 0, 100, max(norms[key] / weights[key] for key in norms))
    for key in norms:
        factors[key] = 1 - rate * weights[key] / norms[key]
        assert 0 < factors[key] < 1
    for name, value in layer.named_parameters():
        key = name.split(".")[1] if name != "bias" else None
        expected = before[name] if key is None else before[name] * factors[key]
        torch.testing.assert_close(value, expected)


def test_rescaling_s_against_a_changes_nothing_in_w():
    layers = [KronCandidates(8, 8, [(2, 1), (4, 1)]) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    with torch.no_grad():
        layers[1].layer("2x2_rank1").s.mul_(1 / 16)
        layers[1].layer("2x2_rank1").a.mul_(64)
        layers[1].layer("2x2_rank1").b.mul_(1 / 4)
    for layer in layers:
        step_of(layer, 80)
    torch.testing.assert_close(layers[1].dense_weight(), layers[0].dense_weight())
    assert not torch.equal(layers[0].layer("2x2_rank1").s, torch.ones(4, 4))


def test_cost_makes_the_weight_larger_by_its_share():
    model = KronCandidates(8, 8, [(2, 1), (4, 1)])
    selector = BlockSizeSelector(model, mode="penalty", cost="params", cost_weight=2.0, total_steps=10)
    shares = {0: (16 + 16 + 4) / 64, 1: (4 + 4 + 16) / 64}
    (norms,) = selector._set.norms()
    assert selector._method._weights(0) == pytest.approx({k: norms[k] * (1 + 2.0 * shares[k]) for k in (0, 1)})


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_papers_weight_is_the_square_root_of_the_size(scope):
    model = TwoLayers()  # 16 x 32 and 32 x 16
    options = {"cost": "params", "cost_weight": 2.0, "scope": scope, "total_steps": 10}
    selector = BlockSizeSelector(model, mode="penalty", penalty_weights="size", **options)
    sizes = {2: 128 + 128 + 4, 4: 32 + 32 + 16, 8: 8 + 8 + 64}  # S, A and B in each layer, by block size
    layers = 2 if scope == "global" else 1
    for choice in range(len(selector._set.choices)):
        expected = [math.sqrt(layers * size) * (1 + 2.0 * size / 512) for size in sizes.values()]
        assert list(selector._method._weights(choice).values()) == pytest.approx(expected)


def test_the_papers_weight_is_kept_over_drops_and_resumes():
    options = {"mode": "penalty", "penalty_weights": "size", "start": 0.0, "total_steps": 100}
    model, resumed = TwoLayers(), TwoLayers(1)
    selector = BlockSizeSelector(model, **options)
    weights = selector._method._weights(0)
    while selector.candidates_left == 3:
        selector.step()
    resumed.load_state_dict(model.state_dict())
    other = BlockSizeSelector(resumed, **options)
    other.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    left = selector._set.alive(0)
    assert len(left) < 3
    assert selector._method._weights(0) == other._method._weights(0) == {k: weights[k] for k in left}


def test_candidates_begin_at_the_same_distance_from_zero():
    """Whatever their sizes: those that nothing pulls back vanish together, but for one."""
    model = KronCandidates(64, 64, [(2, 1), (8, 4), ((1, 64), 1)])
    selector = BlockSizeSelector(model, mode="penalty", total_steps=100, start=0.0)
    while not selector.done:
        selector.step()
    assert len({event["step"] for event in selector.result.events}) == 1


def test_what_the_penalty_has_not_told_apart_goes_at_the_end():
    model = TwoLayers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    selector = BlockSizeSelector(model, mode="penalty", total_steps=4, start=0.0, restart=False)
    with torch.no_grad():  # the largest for what it was
        for layer in (model.fc1, model.fc2):
            layer.layer("4x4_rank1").b.mul_(8)
    selector.attach(optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match="left [23] candidates at the selection's end, step 2"):
        optimizer.step()
    assert model.fc1.alive == model.fc2.alive == ["4x4_rank1"]
