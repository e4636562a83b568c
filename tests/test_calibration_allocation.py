"""The allocation against an exact dynamic programme, and what it promises about budgets."""

import math
import random
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from properties import check_all, examples

from kron_hf.calibration.allocation import LayerChoices, allocate, predicted_loss
from kron_hf.calibration.knapsack import Choices
from kron_hf.calibration.knapsack import least_loss as chosen_indices
from kron_hf.calibration.menu import Option, layer_menu


def random_layers(seed: int, count: int, sizes: tuple[int, ...] = (16, 24, 32, 48)) -> list[LayerChoices]:
    """Layers whose errors fall with their parameters, neither smoothly nor always; rectangles fit better."""
    rng = random.Random(seed)
    layers = []
    for index in range(count):
        menu = layer_menu(rng.choice(sizes), rng.choice(sizes), True)
        scale = menu[-1].params * rng.uniform(0.02, 0.3)
        errors = [
            math.exp(-option.params / scale)
            * rng.uniform(0.9, 1.1)
            * (0.85 if option.block_size != menu[0].block_size else 1)
            for option in menu[:-1]
        ]
        layers.append(LayerChoices(f"layer{index}", menu, [*errors, 0.0], 10 ** rng.uniform(-1, 1)))
    return layers


def total(layers: list[LayerChoices], what: str = "params") -> int:
    return sum(getattr(layer.dense, what) for layer in layers)


def spent(chosen: dict[str, Option], what: str = "params") -> int:
    return sum(getattr(option, what) for option in chosen.values())


def least_loss(layers: list[LayerChoices], budget: float) -> float:
    """The exact minimum: for every cost, the least loss of all that cost no more."""
    best = {0: 0.0}
    for layer in layers:
        reached: dict[int, float] = {}
        for cost, loss in best.items():
            for option, error in zip(layer.options, layer.errors, strict=True):
                if (new := cost + option.params) <= budget:
                    reached[new] = min(reached.get(new, math.inf), loss + layer.sensitivity * error)
        best, least = {}, math.inf
        for cost in sorted(reached):
            if reached[cost] < least:
                best[cost] = least = reached[cost]
    return min(best.values())


def largest_gain(layers: list[LayerChoices]) -> float:
    """Of a step along the lower convex hull of a layer's costs and losses."""
    gains = []
    for layer in layers:
        pairs = zip(layer.options, layer.errors, strict=True)
        hull: list[tuple[int, float]] = []
        for cost, loss in sorted((option.params, layer.sensitivity * error) for option, error in pairs):
            if hull and loss >= hull[-1][1]:
                continue
            while len(hull) > 1 and (hull[-2][1] - hull[-1][1]) * (cost - hull[-1][0]) <= (hull[-1][1] - loss) * (
                hull[-1][0] - hull[-2][0]
            ):
                hull.pop()
            hull.append((cost, loss))
        gains += [before[1] - after[1] for before, after in pairwise(hull)]
    return max(gains)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_close_to_the_exact_minimum_and_never_above_the_budget(count):
    ratios = []
    for seed in range(20):
        layers = random_layers(seed, count)
        share = random.Random(seed).uniform(0.15, 0.8)
        chosen = allocate(layers, target_params=share)
        assert spent(chosen) <= share * total(layers)
        loss, exact = predicted_loss(layers, chosen), least_loss(layers, share * total(layers))
        assert exact * (1 - 1e-12) <= loss < exact + largest_gain(layers)
        ratios.append(loss / exact)
    assert sum(ratio <= 1 + 1e-12 for ratio in ratios) >= 10
    assert sum(ratios) / len(ratios) < 1.02
    assert max(ratios) < 1.3


def test_many_layers_spend_nearly_everything():
    layers = random_layers(0, 60)
    for share in (0.15, 0.3, 0.6):
        left = share * total(layers) - spent(allocate(layers, target_params=share))
        assert 0 <= left < 0.001 * total(layers)


def test_the_last_bit_of_a_budget_is_spent():
    menu = [Option((1, 1), 1, 28, 28), Option((1, 1), 2, 29, 29), Option(None, None, 100, 100)]
    layer = LayerChoices("layer", menu, [0.5, 0.4, 0.0])
    assert 0.29 * 100 < 29
    assert allocate([layer], target_params=0.29)["layer"].rank == 2
    assert allocate([layer], target_params=0.2899)["layer"].rank == 1


def test_options_off_the_convex_hull_fill_a_budget():
    menu = [Option((1, 1), rank, cost, cost) for rank, cost in ((1, 10), (2, 40))] + [Option(None, None, 50, 50)]
    layer = LayerChoices("layer", menu, [1.0, 0.9, 0.0])
    ranks = [allocate([layer], target_params=share)["layer"].rank for share in (0.3, 0.79, 0.8, 0.9, 1.0)]
    assert ranks == [1, 1, 2, 2, None]


def test_nothing_is_spent_without_a_gain():
    def layer(name: str, costs: tuple[int, ...], errors: list[float]) -> LayerChoices:
        options = [Option((1, 1), rank, cost, cost) for rank, cost in enumerate(costs[:-1], start=1)]
        return LayerChoices(name, [*options, Option(None, None, costs[-1], costs[-1])], errors)

    layers = [layer("same", (10, 15, 100), [0.5, 0.5, 0.0]), layer("other", (10, 40, 50), [1.0, 0.9, 0.0])]
    chosen = allocate(layers, target_params=59 / 150)
    assert {name: option.rank for name, option in chosen.items()} == {"same": 1, "other": 2}


def test_of_options_alike_in_error_and_mixture_the_one_that_the_budget_favours_is_offered():
    menu = [Option((1, 1), 1, 20, 10), Option((1, 1), 2, 10, 20), Option(None, None, 100, 100)]
    layer = LayerChoices("layer", menu, [0.5, 0.5, 0.0])
    assert allocate([layer], target_params=0.15, flops_weight=1.0)["layer"].rank == 2
    assert allocate([layer], target_flops=0.15, flops_weight=1.0)["layer"].rank == 1


def test_a_large_step_leaves_its_place_to_two_small_ones():
    def layer(name: str, cost: int, gain: float) -> LayerChoices:
        return LayerChoices(name, [Option((1, 1), 1, 1, 1), Option(None, None, 1 + cost, 1)], [gain, 0.0])

    layers = [layer("large", 51, 51 * 1.1), layer("one", 50, 50), layer("two", 50, 50)]
    chosen = allocate(layers, target_params=103 / total(layers))
    assert {name: option.is_dense for name, option in chosen.items()} == {"large": False, "one": True, "two": True}


def test_what_is_made_cheaper_is_what_loses_least_by_it():
    steps = [(51, 1056.1, 1000.0), (60, 600.0, 0.0), (50, 50.0, 0.0), (50, 50.0, 0.0)]
    layers = [
        Choices(torch.arange(2), torch.tensor([1, 1 + cost]), torch.tensor([before, after], dtype=torch.float64))
        for cost, before, after in steps
    ]
    assert chosen_indices(layers, 164) == [0, 1, 1, 1]


def choices(draw, name: str) -> LayerChoices:
    numbers = st.integers(1, 12)
    options = [Option((1, 1), rank + 1, *draw(st.tuples(numbers, numbers))) for rank in range(draw(st.integers(0, 4)))]
    dense = Option(None, None, *draw(st.tuples(st.integers(13, 24), st.integers(13, 24))))
    errors = [draw(st.integers(0, 64)) / 64 for _ in options]
    return LayerChoices(name, [*options, dense], [*errors, 0.0], draw(st.integers(0, 8)) / 4)


@st.composite
def problems(draw):
    layers = [choices(draw, f"layer{index}") for index in range(draw(st.integers(1, 5)))]
    return layers, draw(st.sampled_from(["params", "flops"])), draw(st.sampled_from([0.0, 0.0, 0.5, 3.0]))


def allocated(layers, name, share, weight):
    """The choice, or else the share that the error says can be met."""
    try:
        return allocate(layers, **{name: share}, flops_weight=weight), None
    except ValueError as error:
        return None, float(str(error).split(": ")[-1])


@examples(10, 500)
def test_a_larger_budget_never_gives_a_larger_loss(examples):
    def check(problem):
        layers, what, weight = problem
        whole, last = total(layers, what), math.inf
        for budget in range(1, whole + 1):
            chosen, nearest = allocated(layers, f"target_{what}", budget / whole, weight)
            if chosen is None:
                assert last == math.inf, "a smaller budget was met"
                assert nearest > budget / whole
            else:
                assert spent(chosen, what) <= budget
                loss = predicted_loss(layers, chosen)  # sums of 1/256, exact
                assert loss <= last
                last = loss
        assert last == 0

    check_all(check, problems(), examples)


def test_equal_layers_are_told_apart_by_their_order():
    menu = layer_menu(16, 16, True, ranks=[1, 2])
    errors = [1 / (1 + option.params) for option in menu[:-1]] + [0.0]
    layers = [LayerChoices(name, menu, errors) for name in "abcdef"]
    chosen = allocate(layers, target_params=0.5)
    assert list(chosen) == list("abcdef")
    params = [option.params for option in chosen.values()]
    assert params == sorted(params, reverse=True)
    assert len(set(params)) > 1
    assert allocate(layers, target_params=0.5) == chosen


def test_counts_of_a_large_model_give_the_same_choice():
    layers, factor = random_layers(3, 12), 10**8 + 7
    large = [
        LayerChoices(
            layer.name,
            [Option(o.block_size, o.rank, o.params * factor, o.flops * factor) for o in layer.options],
            layer.errors,
            layer.sensitivity,
        )
        for layer in layers
    ]
    small = allocate(layers, target_params=0.3)
    chosen = allocate(large, target_params=0.3)
    assert [(o.block_size, o.rank) for o in chosen.values()] == [(o.block_size, o.rank) for o in small.values()]


def test_the_device_that_torch_defaults_to_does_not_matter():
    layers = random_layers(4, 3)
    expected = allocate(layers, target_params=0.3)
    with torch.device("meta"):
        assert allocate(layers, target_params=0.3) == expected


def test_sensitive_layers_get_more_and_a_dead_one_the_least():
    menu = layer_menu(32, 32, True)
    errors = [(1 - option.params / menu[-1].params) ** 2 for option in menu]
    layers = [LayerChoices(name, menu, errors, s) for name, s in (("dead", 0.0), ("weak", 1.0), ("strong", 4.0))]
    chosen = allocate(layers, target_params=0.4)
    assert chosen["dead"] == menu[0]
    assert chosen["weak"].params < chosen["strong"].params


@pytest.mark.parametrize("what", ["params", "flops"])
def test_an_impossible_budget_names_the_nearest_that_can_be_met(what):
    layers = random_layers(5, 7)
    name = f"target_{what}"
    least = sum(min(getattr(option, what) for option in layer.options) for layer in layers) / total(layers, what)
    with pytest.raises(
        ValueError, match=rf"^{name}=0.001 is below the smallest that .* 7 layers can reach: "
    ) as caught:
        allocate(layers, **{name: 0.001})
    nearest = float(str(caught.value).split(": ")[-1])
    assert least <= nearest < least * 1.002
    assert spent(allocate(layers, **{name: nearest}), what) == round(least * total(layers, what))


def test_a_whole_budget_leaves_everything_dense():
    layers = random_layers(6, 3)
    assert all(option.is_dense for option in allocate(layers, target_params=1.0).values())


def test_flops_are_limited_where_they_are_named():
    layers = random_layers(7, 10)
    chosen = allocate(layers, target_flops=0.3)
    assert 0.29 < spent(chosen, "flops") / total(layers, "flops") <= 0.3


def test_the_weight_of_flops_saves_flops_within_the_same_parameters():
    layers = random_layers(8, 20, sizes=(64, 128))
    chosen = [allocate(layers, target_params=0.3, flops_weight=weight) for weight in (0.0, 0.5, 10.0)]
    flops = [spent(options, "flops") for options in chosen]
    losses = [predicted_loss(layers, options) for options in chosen]
    assert flops[0] > 1.05 * flops[1]
    assert flops[0] > 1.05 * flops[2]
    assert losses[0] < min(losses[1:])
    assert all(spent(options) <= 0.3 * total(layers) for options in chosen)


def test_max_error_takes_the_fewest_parameters_that_are_close_enough():
    menu = [Option((1, 1), rank, cost, flops) for rank, cost, flops in ((1, 10, 90), (2, 12, 40), (3, 20, 10))]
    layer = LayerChoices("layer", [*menu, Option(None, None, 100, 100)], [0.25, 0.16, 0.01, 0.0])
    ranks = [allocate([layer], max_error=error)["layer"].rank for error in (0.5, 0.4, 0.39, 0.1, 0.09)]
    assert ranks == [1, 2, 3, 3, None]
    assert allocate([layer], max_error=0.5, flops_weight=0.1)["layer"].rank == 2
    assert allocate([layer], max_error=0.5, flops_weight=1.0)["layer"].rank == 3


def test_the_mixture_adds_shares_of_what_all_dense_layers_cost():
    menu = [Option((1, 1), 1, 10, 500), Option((1, 1), 2, 40, 100), Option(None, None, 100, 1000)]
    layer = LayerChoices("layer", menu, [0.25, 0.25, 0.0])  # .1 + .5 w or .4 + .1 w
    assert [allocate([layer], max_error=0.5, flops_weight=weight)["layer"].rank for weight in (0.7, 0.8)] == [1, 2]


MENU = [Option((1, 1), 1, 10, 10), Option(None, None, 100, 100)]


@pytest.mark.parametrize(
    ("options", "errors", "sensitivity", "message"),
    [
        (MENU, [0.5], 1.0, "layer: needs an error for each option and dense once .* 2 options, 1 of them dense, and 1"),
        (MENU[:1], [0.5], 1.0, "1 options, 0 of them dense"),
        (MENU[1:] * 2, [0.0, 0.0], 1.0, "2 of them dense"),
        (MENU, [math.nan, 0.0], 1.0, "layer: errors must be finite and not negative, got nan"),
        (MENU, [0.5, -0.1], 1.0, "layer: errors must be finite and not negative, got -0.1"),
        (MENU, [0.5, 0.0], math.inf, "layer: sensitivity must be finite and not negative, got inf"),
    ],
    ids=["errors", "no dense", "two dense", "nan", "negative", "sensitivity"],
)
def test_bad_choices(options, errors, sensitivity, message):
    with pytest.raises(ValueError, match=message):
        LayerChoices("layer", options, errors, sensitivity)


@pytest.mark.parametrize(
    ("layers", "targets"),
    [
        ([LayerChoices("layer", MENU, [0.5, 0.0])], {}),
        ([LayerChoices("layer", MENU, [0.5, 0.0])], {"target_params": 0.5, "max_error": 0.5}),
        ([], {"target_params": 0.5}),
    ],
    ids=["none", "two", "no layers"],
)
def test_exactly_one_target_for_some_layers(layers, targets):
    with pytest.raises(
        ValueError, match=re.escape(f"exactly one of target_params, target_flops, max_error, got {targets}")
    ):
        allocate(layers, **targets)
