"""Each baseline against numbers worked out by hand."""

import math

import pytest
import torch
from tiny_dense import STEPS, TinyDense, adamw, sgd, tiny_layers, zeros
from tiny_training import train
from torch import nn

from kron_hf.baselines import BlockRigL, ElasticGroupLasso, GradualPruning, GroupLasso, IterativePruning
from kron_hf.baselines.block_layer import BlockLayer, block_rms, entry_mask, scale_blocks, share_of_zero_blocks
from kron_hf.baselines.group_lasso import group_soft_threshold
from kron_hf.baselines.rigl import cosine_share, erk_quotas, moved
from kron_hf.data.grey import load_grey_set


def linear_of(blocks, size):
    """A layer of one row of blocks, each filled with a number."""
    linear = nn.Linear(size[1] * len(blocks), size[0], bias=False)
    with torch.no_grad():
        for index, value in enumerate(blocks):
            linear.weight[:, index * size[1] : (index + 1) * size[1]] = value
    return linear


def step(pruner, optimizer, gradient):
    """One optimizer step with a gradient that is the same within each block of a layer of one row."""
    (layer,) = pruner.layers.values()
    layer.linear.weight.grad = entry_mask(torch.tensor([gradient]), layer)
    optimizer.step()


def values(pruner):
    """One number for each block, which must be the same in all its entries."""
    (layer,) = pruner.layers.values()
    blocks = layer.linear.weight.detach().reshape(layer.grid[0], layer.block_size[0], layer.grid[1], -1)
    assert torch.equal(blocks, blocks[:, :1, :, :1].expand_as(blocks))
    return blocks[:, 0, :, 0].flatten()


def test_block_rms_and_zero_blocks_of_rectangles():
    layer = BlockLayer(linear_of([3.0, -1.0, 0.0], (2, 4)), (2, 4))
    with torch.no_grad():
        layer.linear.weight[0, 4] = 7.0
        layer.linear.weight[1, 8] = -1e-30  # negative, small, and not zero
        rms = block_rms(layer.linear.weight, layer)
    torch.testing.assert_close(rms, torch.tensor([[3.0, math.sqrt((49 + 7) / 8), 0.0]]).double())
    assert share_of_zero_blocks([layer]) == 0.0
    scale_blocks(layer, torch.tensor([[1.0, 0.0, 1.0]]))
    assert share_of_zero_blocks([layer]) == pytest.approx(1 / 3)
    assert torch.equal(layer.linear.weight[:, 4:8], torch.zeros(2, 4))


def test_group_soft_threshold():
    factor = group_soft_threshold(torch.tensor([2.0, 1.0, 0.5, 0.0]), torch.tensor(1.0))
    assert factor.tolist() == [0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("l2", [0.0, 2.0])
def test_proximal_step_of_sgd(l2):
    """Root mean square of the layer 2.5, 10 steps of penalty, strength 8: a threshold of 2."""
    linear = linear_of([4.0, 1.0, -2.5, math.sqrt(1.75)], (2, 3))
    options = {"target_sparsity": 0.5, "total_steps": 20, "start": 0.0, "end": 0.5, "strength": 8.0}
    if l2:
        pruner = ElasticGroupLasso({"": (linear, (2, 3))}, l2=l2, **options)
    else:
        pruner = GroupLasso({"": (linear, (2, 3))}, **options)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    pruner.attach(optimizer)
    step(pruner, optimizer, [0.0, 0.0, 0.0, 0.0])
    # The blocks of 4 and -2.5 would survive: they lose at most the tenth root of a half.
    least = 0.5**0.1
    expected = torch.tensor([4 * max(0.5, least), 0.0, -2.5 * max(0.2, least), 0.0]) / (1 + l2 / 10)
    torch.testing.assert_close(values(pruner), expected)


def test_proximal_step_weighs_blocks_by_their_step_size_under_adam():
    linear = linear_of([4.0, 4.0], (2, 2))
    pruner = GroupLasso(
        {"": (linear, 2)}, target_sparsity=0.0, total_steps=2000, start=0.0, end=0.5, strength=10.0, interval=1
    )
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.0)
    pruner.attach(optimizer)
    step(pruner, optimizer, [1.0, 3.0])  # sqrt(v) in the ratio 1 : 3, mean 2
    expected = torch.tensor([4 - 10 / 1000 * 4 * 2, 4 - 10 / 1000 * 4 * 2 / 3])
    torch.testing.assert_close(values(pruner), expected)


@pytest.mark.parametrize("strength", [0.0, 1e9])
def test_no_strength_empties_a_layer_or_overshoots(strength):
    model = TinyDense()
    optimizer = adamw(model)
    pruner = GroupLasso(tiny_layers(model), target_sparsity=0.6, total_steps=STEPS, strength=strength)
    pruner.attach(optimizer)
    seen = []
    train(model, optimizer, range(STEPS), after_step=lambda: seen.append(pruner.sparsity))
    before, after = seen[:19], seen[19:]
    assert max(before) <= 0.6 + 25 / 1110
    assert (max(before) == 0.0) == (strength == 0.0)
    assert len(set(after)) == 1


def test_more_strength_zeroes_more_blocks_before_the_end():
    shares = []
    for strength in (2.0, 8.0, 32.0):
        model = TinyDense()
        optimizer = adamw(model)
        pruner = GroupLasso(tiny_layers(model), target_sparsity=0.9, total_steps=STEPS, strength=strength)
        pruner.attach(optimizer)
        train(model, optimizer, range(19))
        shares.append(pruner.sparsity)
    assert shares == sorted(set(shares))


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, [1, 1, 0, 0, 0, 0]), (0.5, [1, 0, 1, 0, 0, 0]), (1.0, [1, 0, 0, 1, 0, 0])],
    ids=["none", "half", "all"],
)
def test_moved(share, expected):
    """Half of four drops norms 2 and 3; of what is dead then, gradients 1 9 5 7, the largest two grow."""
    dead = torch.tensor([[1, 1, 0, 0, 0, 0]]).bool()
    norm = torch.tensor([[0.0, 0.0, 3.0, 4.0, 9.0, 2.0]])
    gradient = torch.tensor([[1.0, 9.0, 5.0, 4.0, 8.0, 7.0]])
    assert moved(dead, norm, gradient, share).int().flatten().tolist() == expected


def test_blocks_without_gradient_do_not_grow():
    dead = torch.tensor([1, 1, 0, 0]).bool()
    after = moved(dead, torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 0.0, 0.0]), 1.0)
    assert torch.equal(after, dead)


def test_cosine_share():
    assert [cosine_share(step, 100, 0.3) for step in (0, 50, 100)] == pytest.approx([0.3, 0.15, 0.0])


@pytest.mark.parametrize(
    ("grids", "entries", "required", "expected"),
    [
        ([(4, 4)], [1], 8, [8]),
        ([(10, 10), (5, 5)], [1, 1], 80, [70, 10]),  # alive 30 and 15, as 20 to 10
        ([(10, 10), (2, 2)], [1, 1], 60, [60, 0]),  # the small one stays dense
        ([(10, 10), (10, 10)], [1, 4], 250, [50, 50]),
        ([(1, 1), (1, 9)], [1, 1], 8, [0, 8]),
    ],
    ids=["one", "two", "dense", "entries", "tiny"],
)
def test_erk_quotas(grids, entries, required, expected):
    counts = erk_quotas(grids, entries, required)
    dead = sum(count * each for count, each in zip(counts, entries, strict=True))
    assert required <= dead < required + max(entries)
    assert counts == expected


def test_rigl_grows_at_zero_where_the_gradient_is_largest():
    linear = linear_of([1.0, 2.0, 3.0, 4.0], 2 * (2,))
    pruner = BlockRigL(
        {"": (linear, 2)}, target_sparsity=0.5, total_steps=100, drop_fraction=1.0, interval=2, distribution="uniform"
    )
    assert values(pruner).tolist() == [0.0, 0.0, 3.0, 4.0]
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)
    pruner.attach(optimizer)
    step(pruner, optimizer, [9.0, 9.0, 0.0, 0.0])
    assert values(pruner).tolist() == [0.0, 0.0, 3.0, 4.0]
    step(pruner, optimizer, [5.0, 9.0, 0.0, 0.0])  # share .999: one of two blocks moves
    assert values(pruner).tolist() == [0.0, 0.0, 0.0, 4.0]
    assert pruner.dead_blocks[""].tolist() == [[True, False, True, False]]
    step(pruner, optimizer, [5.0, 9.0, 7.0, 0.0])
    torch.testing.assert_close(values(pruner), torch.tensor([0.0, -0.9, 0.0, 4.0]))


def test_iterative_rounds_prune_equal_shares_of_what_is_left():
    model = TinyDense()
    optimizer = sgd(model)
    pruner = IterativePruning(tiny_layers(model), target_sparsity=0.875, total_steps=STEPS, start=0.2, rounds=3)
    pruner.attach(optimizer)
    seen, masks = [], []
    train(
        model,
        optimizer,
        range(STEPS),
        after_step=lambda: (seen.append(pruner.sparsity), masks.append(zeros(tiny_layers(model)))),
    )
    changes = {k + 1: seen[k] for k in range(STEPS) if k == 0 or seen[k] != seen[k - 1]}
    assert changes == pytest.approx({1: 0.0, 12: 0.5, 16: 0.75, 20: 0.875}, abs=25 / 1110)
    for name in masks[0]:
        assert torch.all(masks[11][name] <= masks[-1][name]), "pruned blocks stay zero"


def test_a_pruned_block_is_not_exchanged_for_one_that_happens_to_be_zero():
    linear = linear_of([8.0, 7.0, 6.0, 5.0, 4.0, 1.0, 2.0, 3.0], (2, 2))
    pruner = IterativePruning({"": (linear, 2)}, target_sparsity=0.5, total_steps=20, start=0.0, rounds=2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.0)
    pruner.attach(optimizer)
    for _ in range(5):
        step(pruner, optimizer, [0.0] * 8)
    assert pruner.dead_blocks[""].int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    with torch.no_grad():
        linear.weight[:, :4] = 0.0
    for _ in range(5):
        step(pruner, optimizer, [0.0] * 8)
    assert pruner.dead_blocks[""].int().tolist() == [[1, 0, 0, 0, 0, 1, 1, 1]]


def test_gradual_ramp_is_cubic_and_blocks_grow_back():
    model = TinyDense()
    optimizer = adamw(model)
    pruner = GradualPruning(tiny_layers(model), target_sparsity=0.8, total_steps=STEPS, start=0.0, interval=5)
    pruner.attach(optimizer)
    seen = []
    train(model, optimizer, range(STEPS), after_step=lambda: seen.append(pruner.sparsity))
    expected = [0.8 * (1 - (1 - t) ** 3) for t in (0.25, 0.5, 0.75, 1.0)]
    assert [seen[k] for k in (4, 9, 14, 19)] == pytest.approx(expected, abs=25 / 1110)
    assert seen[10] < seen[9]


@pytest.mark.slow
def test_gradual_is_no_worse_than_one_shot():
    """Digits, 90 % of the blocks of two layers, mean accuracy over three seeds."""
    digits = load_grey_set("digits")
    images, labels = torch.tensor(digits.train[0]).flatten(1) / 255, torch.tensor(digits.train[1])
    test_images, test_labels = torch.tensor(digits.test[0]).flatten(1) / 255, torch.tensor(digits.test[1])

    def right(algorithm, seed, **options):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        pruner = algorithm({"0": (net[0], 4), "2": (net[2], 4)}, target_sparsity=0.9, total_steps=200, **options)
        pruner.attach(optimizer)
        for _ in range(200):
            chosen = torch.randint(0, len(images), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        return int((net(test_images).argmax(1) == test_labels).sum())

    gradual = sum(right(GradualPruning, seed) for seed in range(3))
    one_shot = sum(right(IterativePruning, seed, rounds=1) for seed in range(3))
    assert 0.8 * 3 * len(test_labels) < one_shot <= gradual
