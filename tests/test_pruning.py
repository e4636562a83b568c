import pytest
import torch
from tiny_training import TinyKron

from kron_hf.factors import to_blocks
from kron_hf.layers import KronLinear
from kron_hf.sparsity.pruning import (
    choose_dead,
    cubic_sparsity,
    kron_layers,
    layer_quotas,
    model_sparsity,
    required_entries,
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.2), (10, 0.2), (20, 0.8 - 0.6 / 8), (30, 0.8), (99, 0.8)],
    ids=["before", "start", "middle", "end", "after"],
)
def test_cubic_sparsity(step, expected):
    assert cubic_sparsity(step, start_step=10, end_step=30, final=0.8, initial=0.2) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize(
    ("sparsity", "total", "expected"),
    [(0.57, 100, 57), (0.7, 10, 7), (0.5, 7, 4), (0.0, 9, 0), (1e-9, 9, 1), (0.29, 100, 29)],
)
def test_required_entries_is_exact(sparsity, total, expected):
    assert required_entries(sparsity, total) == expected


@pytest.mark.parametrize(
    ("sizes", "entries", "dead", "required", "expected"),
    [
        ([4, 4, 4, 4], [1, 1, 1, 1], [0, 0, 0, 0], 5, [2, 1, 1, 1]),
        ([8, 4], [1, 1], [0, 0], 6, [4, 2]),
        ([32, 16], [16, 32], [0, 0], 512, [16, 8]),
        ([2, 10], [1, 1], [0, 0], 10, [1, 9]),
        ([4, 4], [1, 1], [3, 0], 4, [3, 1]),
        ([4, 4], [1, 1], [3, 2], 2, [3, 2]),
        ([1, 8], [1, 1], [0, 0], 7, [0, 7]),
        ([2, 4], [1, 1], [2, 0], 4, [2, 2]),
        ([4, 1, 3], [1, 5, 2], [0, 1, 0], 15, [3, 1, 2]),
    ],
    ids=["rounding", "sizes", "entries", "capped", "dead", "sparser", "one-block", "emptied-before", "beyond"],
)
def test_layer_quotas(sizes, entries, dead, required, expected):
    assert layer_quotas(sizes, entries, dead, required) == expected


def block_rms(layer):
    """The definition, from the dense weight: root mean square of each block."""
    return to_blocks(layer.dense_weight(), layer.block_size).square().mean(1).sqrt().view_as(layer.s)


@torch.no_grad()
def random_layers():
    layers = kron_layers(TinyKron())
    for layer in layers:
        layer.s.normal_()
    return layers


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_dead_blocks_have_the_smallest_entries(scope):
    layers = [KronLinear(64, 64, block_size=2, rank=2), KronLinear(64, 64, block_size=8, rank=2)]
    with torch.no_grad():
        for layer in layers:
            layer.s.normal_()
    dead = choose_dead(layers, [None, None], 0.5, scope)
    norms = [block_rms(layer) for layer in layers]
    pairs = zip(dead, norms, strict=True) if scope == "layer" else [map(torch.cat, map(flat, (dead, norms)))]
    for mask, norm in pairs:
        assert norm[mask].max() < norm[~mask].min()


def flat(tensors):
    return [tensor.flatten() for tensor in tensors]


@pytest.mark.parametrize("change", ["negative s", "s against a", "a against b"])
@torch.no_grad()
def test_choice_depends_on_the_weight_alone(change):
    layers = random_layers()
    before = choose_dead(layers, [None, None], 0.4, "global")
    for layer in layers:
        if change == "negative s":
            layer.s.mul_(-1)
        elif change == "s against a":
            scale = torch.exp(torch.randn_like(layer.s))
            layer.s.mul_(scale)
            layer.a.div_(scale)
        else:
            layer.a.mul_(100)
            layer.b.div_(100)
    after = choose_dead(layers, [None, None], 0.4, "global")
    assert all(torch.equal(mask, other) for mask, other in zip(before, after, strict=True))
    assert sum(int(mask.sum()) for mask in before) > 0


@torch.no_grad()
def test_ties_go_by_layer_order_and_index():
    layers = [KronLinear(8, 4, block_size=4, rank=1) for _ in range(3)]
    for layer in layers:
        layer.s.fill_(1), layer.a.fill_(1), layer.b.fill_(1)
    dead = choose_dead(layers, [None] * 3, 1 / 3, "global")
    assert [mask.flatten().tolist() for mask in dead] == [[True, False], [True, False], [False, False]]


@torch.no_grad()
def test_global_scope_keeps_the_best_block_of_the_least_important_layer():
    layers = random_layers()
    layers[0].b.mul_(1e-3)
    best = int(block_rms(layers[0]).argmax())
    dead = choose_dead(layers, [None, None], 0.8, "global")
    assert torch.nonzero(~dead[0].flatten()).flatten().tolist() == [best]


@pytest.mark.parametrize("scope", ["global", "layer"])
@torch.no_grad()
def test_a_target_beyond_that_leaves_the_best_block_of_each_layer(scope):
    layers = random_layers()
    dead = choose_dead(layers, [None, None], 0.9999, scope)
    best = [int(block_rms(layer).argmax()) for layer in layers]
    assert [torch.nonzero(~mask.flatten()).flatten().tolist() for mask in dead] == [[each] for each in best]


@torch.no_grad()
def test_zeros_of_s_are_chosen_before_blocks_without_factors():
    layer = KronLinear(16, 4, block_size=4, rank=1)
    layer.a[0, 0, 0] = 0.0  # a zero block whose S is not zero
    layer.s[0, 2] = 0.0
    (dead,) = choose_dead([layer], [None], 0.25, "global")
    assert dead.flatten().tolist() == [False, False, True, False]


@torch.no_grad()
def test_blocks_dead_before_are_chosen_first():
    layers = random_layers()
    always = torch.zeros_like(layers[1].s, dtype=torch.bool)
    always.view(-1)[int(block_rms(layers[1]).argmax())] = True  # the most important one
    dead = choose_dead(layers, [None, always], 32 / 1024, "global")
    assert torch.equal(dead[1], always)
    assert not dead[0].any()


@torch.no_grad()
def test_model_sparsity_weighs_blocks_by_their_entries_and_does_not_count_negative_s():
    model = TinyKron()
    model.fc1.s.fill_(-1.0)
    assert model_sparsity(model) == 0.0
    model.fc2.s[0, :4] = 0.0  # 4 blocks of 32 entries
    assert model_sparsity(model) == 4 * 32 / 1024
