"""`KronCandidates`: the formula, dropping, state dicts from before and after drops."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kron_hf import KronLinear
from kron_hf.param_groups import kron_param_groups
from kron_hf.selection import KronCandidates, candidates
from kron_hf.selection.candidates import candidate_key, candidate_name, converted_layers
from kron_hf.selection.restart import forget

# (in, out, candidates)
SHAPES = {
    "squares": (16, 8, [(2, 1), (4, 2), (8, 1)]),
    "rectangles": (24, 12, [((2, 8), 3), ((4, 3), 2), (4, 2)]),
    "odd": (15, 21, [((7, 5), 3), ((3, 3), 1), ((1, 15), 2)]),
    "whole-dimensions": (10, 6, [((1, -1), 2), ((-1, 1), 2), ((-1, -1), 1)]),
    "ranks": (8, 8, [(4, 1), (4, 3), (4, 16)]),
    "one": (8, 8, [(4, 2)]),
}


def layer_of(shape="squares", **kwargs):
    """A layer whose factors are all random: S = 1 would hide a formula that leaves it out."""
    layer = KronCandidates(*SHAPES[shape], **kwargs)
    with torch.no_grad():
        for candidate in layer.candidates.values():
            candidate.s.copy_(torch.randn_like(candidate.s))
    return layer


def weight_by_torch_kron(layer, keys=None):
    return sum(
        torch.kron(candidate.s * a, b)
        for key, candidate in layer.candidates.items()
        if keys is None or key in keys
        for a, b in zip(candidate.a, candidate.b, strict=True)
    )


def input_for(layer, rows=5):
    return torch.randn(rows, layer.in_features, dtype=layer.weight.dtype)


def sizes(layer):
    return {name: parameter.numel() for name, parameter in layer.named_parameters()}


def loaded(source, target=None, **kwargs):
    """The layer `target`, or a fresh one, after it has loaded the state dict of `source`."""
    target = KronCandidates(*SHAPES["squares"]) if target is None else target
    target.load_state_dict(source.state_dict(), **kwargs)
    return target


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# The formula


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_formula_and_gradients(shape, bias):
    layer = layer_of(shape, bias=bias, dtype=torch.float64)
    x = input_for(layer).requires_grad_()
    inputs = [x, *layer.parameters()]
    expected = F.linear(x, weight_by_torch_kron(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.dense_weight(), weight_by_torch_kron(layer))
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(layer(x), inputs, cotangent)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, cotangent))


@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "with-a-gated-candidate"])
def test_gradcheck(dropped):
    layer = KronCandidates(6, 4, [((2, 3), 2), ((4, 2), 1), ((1, 1), 1)], dtype=torch.float64)
    if dropped:
        layer.drop("4x2_rank1", free=False)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (input_for(layer, 2).requires_grad_(), *layer.parameters()))


@pytest.mark.parametrize("lead", [(), (0,), (2, 3)], ids=str)
def test_leading_dimensions(lead):
    layer = layer_of()
    x = torch.randn(*lead, 16)
    assert layer(x).shape == (*lead, 8)
    torch.testing.assert_close(layer(x), F.linear(x, weight_by_torch_kron(layer), layer.bias))


def test_autocast_gives_the_dtype_of_nn_linear():
    layer = layer_of()
    x = input_for(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == layer.to_linear()(x).dtype == torch.bfloat16


# Construction


def test_names_and_sizes_of_the_candidates():
    layer = KronCandidates(24, 12, [((2, 8), 3), ((4, 3), 2), (4, 2)])
    assert layer.keys == layer.alive == ["2x8_rank3", "4x3_rank2", "4x4_rank2"]
    assert [layer.size(key) for key in layer.keys] == [((2, 8), 3), ((4, 3), 2), ((4, 4), 2)]
    assert candidate_key((2, 8), 3) == "2x8_rank3"
    assert dict(layer.named_modules())[candidate_name("", (2, 8), 3).removeprefix(".")] is layer.layer("2x8_rank3")
    assert not any(candidate.bias is not None for candidate in layer.candidates.values())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "needs at least one candidate, got none"),
        ([(4, 1), ((4, 4), 1)], r"two candidates are blocks of \(4, 4\) at rank 1 in a weight of shape \(8, 16\)"),
        ([((1, -1), 1), ((1, 16), 1)], r"two candidates are blocks of \(1, 16\) at rank 1"),
        ([(4, 1), (5, 1)], r"block_size \(5, 5\) does not divide its weight of shape \(8, 16\)"),
        ([(4, 1), (32, 1)], r"block_size \(32, 32\) does not divide its weight of shape \(8, 16\)"),
        ([(2, 5)], r"rank must be an int from 1 to bo \* bi = 4, got 5"),
    ],
    ids=["none", "equal", "equal-once-resolved", "does-not-divide", "larger-than-the-layer", "rank"],
)
def test_candidates_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        KronCandidates(16, 8, sizes)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_candidates_share_the_variance_of_nn_linear(count):
    layer = KronCandidates(256, 512, [(16, 1), (8, 2), (4, 4), (16, 8)][:count])
    # b of the first has 256 entries: its variance is known to 9 %, that of a to 6 %
    torch.testing.assert_close(layer.dense_weight().var().item(), 1 / (3 * 256), rtol=0.3, atol=0)
    for candidate in layer.candidates.values():
        torch.testing.assert_close(candidate.dense_weight().var().item(), 1 / (3 * 256 * count), rtol=0.4, atol=0)
        assert torch.all(candidate.s == 1)
    assert 0.9 * 256**-0.5 < layer.bias.abs().max() <= 256**-0.5


def test_meta_device_and_materialisation():
    layer = KronCandidates(*SHAPES["squares"], device="meta", dtype=torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
    assert layer(torch.empty(3, 16, device="meta", dtype=torch.bfloat16)).shape == (3, 8)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(layer(torch.ones(16, dtype=torch.bfloat16))).all()


def test_like_takes_sizes_dtype_mode_and_bias():
    linear = nn.Linear(16, 8, dtype=torch.float64).eval()
    layer = KronCandidates.like(linear, SHAPES["squares"][2])
    assert not any(module.training for module in layer.modules())
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias is not linear.bias
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert KronCandidates.like(nn.Linear(16, 8, bias=False), [(4, 1)]).bias is None


# Dropping


@pytest.mark.parametrize("free", [True, False], ids=["freed", "gated"])
@pytest.mark.parametrize("shape", ["squares", "rectangles", "odd", "ranks"])
def test_a_dropped_candidate_is_out_of_the_sum(shape, free):
    layer = layer_of(shape, dtype=torch.float64)
    first, second, third = layer.keys
    layer.drop(second, free=free)
    assert layer.alive == [first, third]
    assert layer.keys == [first, second, third]
    x = input_for(layer)
    expected = F.linear(x, weight_by_torch_kron(layer, {first, third}), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.dense_weight(), weight_by_torch_kron(layer, {first, third}))
    assert f"dropped=['{second}']" in repr(layer)


def test_a_freed_candidate_has_no_memory_and_stays_in_the_parameters():
    layer = layer_of()
    before = dict(layer.named_parameters())
    layer(input_for(layer)).sum().backward()
    layer.drop("4x4_rank2")
    assert dict(layer.named_parameters()) == before  # the same objects
    freed = list(layer.layer("4x4_rank2").parameters())
    assert [factor.untyped_storage().nbytes() for factor in freed] == [0, 0, 0]
    assert [factor.grad for factor in freed] == [None] * 3
    layer(input_for(layer)).sum().backward()
    assert [factor.grad for factor in freed] == [None] * 3  # an optimizer makes no state


def test_a_gated_candidate_keeps_its_shapes_and_gets_zero_gradients():
    layer = layer_of()
    shapes = [factor.shape for factor in layer.layer("4x4_rank2").parameters()]
    layer.drop("4x4_rank2", free=False)
    layer(input_for(layer)).sum().backward()
    for factor, shape in zip(layer.layer("4x4_rank2").parameters(), shapes, strict=True):
        assert factor.shape == factor.grad.shape == shape
        assert not factor.any()
        assert not factor.grad.any()
    assert all(factor.grad.any() for factor in layer.layer("8x8_rank1").parameters())


def test_among_several_processes_dropping_gates(monkeypatch):
    monkeypatch.setattr(candidates, "_is_alone", lambda: False)
    layer = layer_of()
    layer.drop("2x2_rank1")
    assert sizes(layer)["candidates.2x2_rank1.s"] == 32
    layer(input_for(layer)).sum().backward()
    # A reducer waits for a gradient of each parameter.
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_gated_candidates_make_no_output_trainable_that_is_not(frozen):
    layer = layer_of().requires_grad_(not frozen)
    layer.drop("2x2_rank1", free=False)
    assert layer(input_for(layer)).requires_grad == (not frozen)
    with torch.no_grad():
        assert not layer(input_for(layer)).requires_grad


def test_without_is_as_dropped_for_a_moment():
    layer, dropped = layer_of(), layer_of()
    dropped.load_state_dict(layer.state_dict())
    dropped.drop("2x2_rank1")
    x = input_for(layer)
    before = layer(x)
    with layer.without("2x2_rank1"):
        assert_equal(layer(x), dropped(x))
        assert_equal(layer.dense_weight(), dropped.dense_weight())
        dropped.drop("8x8_rank1")
        with layer.without("8x8_rank1"):
            assert_equal(layer(x), dropped(x))
            with pytest.raises(ValueError, match="'4x4_rank2' is the last candidate"), layer.without("4x4_rank2"):
                pass
    assert_equal(layer(x), before)
    assert layer.alive == layer.keys
    with pytest.raises(RuntimeError, match="inside"), layer.without("2x2_rank1"):
        raise RuntimeError("inside")
    assert_equal(layer(x), before)


@pytest.mark.parametrize("way", ["drop", "without"])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("2x2_rank1", r"'2x2_rank1' is not one of the candidates left, \['4x4_rank2', '8x8_rank1'\]"),
        ("9x9_rank1", "'9x9_rank1' is not one of the candidates left"),
    ],
    ids=["dropped-before", "unknown"],
)
def test_only_living_candidates_can_be_dropped(way, key, message):
    layer = layer_of()
    layer.drop("2x2_rank1")
    with pytest.raises(ValueError, match=message):
        layer.drop(key) if way == "drop" else layer.without(key).__enter__()
    assert layer.alive == ["4x4_rank2", "8x8_rank1"]


def test_the_last_candidate_stays():
    layer = layer_of("one")
    with pytest.raises(ValueError, match="'4x4_rank2' is the last candidate and cannot be dropped"):
        layer.drop("4x4_rank2")
    assert layer.alive == ["4x4_rank2"]


def test_dropping_a_candidate_with_a_frozen_mask():
    layer = layer_of()
    with torch.no_grad():
        layer.layer("4x4_rank2").s[0, 0] = 0
    layer.layer("4x4_rank2").freeze_mask()
    layer.drop("4x4_rank2")
    assert layer.state_dict().keys() == loaded(layer).state_dict().keys()


# The chosen layer, and back to dense


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("free", [True, False], ids=["freed", "gated"])
def test_chosen_is_a_plain_layer_of_the_same_parameters(bias, free):
    layer = layer_of("rectangles", bias=bias).eval()
    with torch.no_grad():
        layer.layer("4x3_rank2").s[0, 0] = 0
    layer.layer("4x3_rank2").freeze_mask()
    layer.drop("2x8_rank3", free=free)
    layer.drop("4x4_rank2", free=free)
    x = input_for(layer)
    before, plain = layer(x), layer.chosen()
    assert type(plain) is KronLinear
    assert (plain.block_size, plain.rank, plain.training) == ((4, 3), 2, False)
    assert plain.dead_blocks.sum() == 1
    torch.testing.assert_close(plain(x), before)
    last = layer.layer("4x3_rank2")
    assert (plain.s is last.s, plain.a is last.a, plain.b is last.b, plain.bias is layer.bias) == (True,) * 4
    assert_equal(layer(x), before)  # choosing has not changed it
    fresh = KronLinear(24, 12, (4, 3), 2, bias=bias)
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh(x), before)


def test_chosen_needs_one_candidate():
    layer = layer_of()
    layer.drop("2x2_rank1")
    with pytest.raises(ValueError, match=re.escape("2 candidates are left, ['4x4_rank2', '8x8_rank1']")):
        layer.chosen()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("drops", [0, 1, 2])
def test_to_linear_has_the_same_function(drops, bias):
    layer = layer_of("odd", bias=bias, dtype=torch.float64).eval()
    for key in layer.keys[:drops]:
        layer.drop(key)
    layer.layer(layer.alive[0]).requires_grad_(False)
    linear = layer.to_linear()
    x = input_for(layer)
    torch.testing.assert_close(linear(x), layer(x))
    assert linear.weight.requires_grad == (drops < 2)
    assert not linear.training


def test_converted_layers_leave_out_what_is_inside():
    candidates, plain = layer_of(), KronLinear(4, 4, 2, 1)
    model = nn.ModuleDict({"a": candidates, "b": nn.Sequential(plain), "c": candidates, "d": nn.Linear(2, 2)})
    assert converted_layers(model) == {"a": candidates, "b.0": plain}
    assert converted_layers(model, remove_duplicate=False) == {"a": candidates, "b.0": plain, "c": candidates}
    assert converted_layers(candidates) == {"": candidates}


# State dicts


@pytest.mark.parametrize("free", [True, False], ids=["freed", "gated"])
def test_dropped_candidates_are_not_in_the_state_dict(free):
    model = nn.Sequential(layer_of(), nn.Linear(8, 8))
    whole = set(model.state_dict())
    model[0].drop("4x4_rank2", free=free)
    gone = whole - set(model.state_dict())
    assert gone == {f"0.candidates.4x4_rank2.{name}" for name in ("s", "a", "b", "weight")}


@pytest.mark.parametrize("free", [True, False], ids=["freed", "gated"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in-a-model"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize("drops", [0, 1, 2])
def test_a_state_dict_says_which_candidates_live(drops, strict, inside, free):
    source, target = layer_of(), layer_of()
    for key in source.keys[:drops]:
        source.drop(key, free=free)
    if inside:
        result = nn.Sequential(target).load_state_dict(nn.Sequential(source).state_dict(), strict)
    else:
        result = target.load_state_dict(source.state_dict(), strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert target.alive == source.alive == source.keys[drops:]
    assert_equal(target.state_dict(), source.state_dict())
    x = input_for(source)
    assert_equal(target(x), source(x))
    freed = [
        size
        for name, size in sizes(target).items()
        if name.startswith(tuple(f"candidates.{key}." for key in source.keys[:drops]))
    ]
    assert freed == [0] * 3 * drops


def test_an_earlier_state_dict_brings_dropped_candidates_back():
    layer = layer_of()
    earlier, x = copy.deepcopy(layer.state_dict()), input_for(layer)
    before, parameters = layer(x), list(layer.parameters())
    layer.drop("2x2_rank1")
    layer.drop("8x8_rank1", free=False)
    layer.load_state_dict(earlier)
    assert layer.alive == layer.keys
    assert_equal(layer(x), before)
    assert [id(parameter) for parameter in layer.parameters()] == [id(parameter) for parameter in parameters]
    layer(x).sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in layer.parameters())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in-a-model"])
def test_the_state_dict_of_the_chosen_layer_leaves_its_candidate(inside, bias):
    source, target = layer_of("ranks", bias=bias), layer_of("ranks", bias=bias)
    for key in ("4x4_rank1", "4x4_rank16"):
        source.drop(key)
    plain = source.chosen()
    if inside:
        nn.Sequential(target).load_state_dict(nn.Sequential(plain).state_dict())
    else:
        target.load_state_dict(plain.state_dict())
    assert target.alive == ["4x4_rank3"]
    assert_equal(target(torch.ones(8)), source(torch.ones(8)))


def test_the_zeros_of_a_loaded_candidate_are_frozen():
    source = layer_of()
    with torch.no_grad():
        source.layer("4x4_rank2").s[1, 2] = 0
    target = loaded(source)
    assert target.layer("4x4_rank2").dead_blocks.nonzero().tolist() == [[1, 2]]


def test_a_state_dict_loads_onto_meta():
    source = layer_of()
    source.drop("2x2_rank1")
    target = loaded(source, KronCandidates(*SHAPES["squares"], device="meta"), assign=True)
    assert_equal(target(torch.ones(16)), source(torch.ones(16)))


def rename(key):
    return lambda state: {name.replace("4x4_rank2", key): value for name, value in state.items()}


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


S = "candidates.4x4_rank2.s"
PLAIN = KronLinear(16, 8, (2, 4), 1).state_dict()


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename("4x8_rank2"), r"'0': candidates \['4x8_rank2'\] are stored, this layer has \['2x2_rank1', '4x4_rank2'"),
        (without(S), rf"'0\.{S}' is missing beside other factors of this candidate"),
        (lambda state: {**state, S: torch.zeros(3, 3)}, rf"'0\.{S}' has shape \[3, 3\], required is \[2, 4\]"),
        (lambda state: PLAIN, r"'0': factors of shapes .*\(4, 4\).* are stored, which no candidate of \['2x2_rank1'"),
    ],
    ids=["unknown candidate", "missing factor", "shape", "another plain layer"],
)
def test_a_state_dict_that_does_not_fit_is_an_error_and_drops_nothing(change, message, strict):
    layer = layer_of()
    state = change(layer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(layer).load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=strict)
    assert layer.alive == layer.keys


def test_a_state_dict_without_the_layer_misses_all_of_it_and_drops_nothing():
    layer = layer_of()
    result = layer.load_state_dict({}, strict=False)
    assert set(result.missing_keys) >= {name for name, _ in layer.named_parameters()}
    assert layer.alive == layer.keys


def test_a_dense_state_dict_does_not_load():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer_of().load_state_dict(nn.Linear(16, 8).state_dict(), strict=False)


def test_a_state_dict_without_the_empty_tensors_loads():
    source = layer_of()
    state = {name: value for name, value in source.state_dict().items() if value.numel()}
    target = KronCandidates(*SHAPES["squares"])
    target.load_state_dict(state)
    assert_equal(target(torch.ones(16)), source(torch.ones(16)))


# As any other module


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("free", [True, False], ids=["freed", "gated"])
def test_copies(copied, free):
    layer = layer_of()
    layer.drop("2x2_rank1", free=free)
    other = copied(layer)
    x = input_for(layer)
    assert_equal(other(x), layer(x))
    other.drop("8x8_rank1")
    assert layer.alive == ["4x4_rank2", "8x8_rank1"]
    assert set(layer.state_dict()) - set(other.state_dict()) == {
        f"candidates.8x8_rank1.{name}" for name in ("s", "a", "b", "weight")
    }


def test_dtype_and_device_follow():
    layer = layer_of()
    layer.drop("2x2_rank1")
    layer.to(torch.float64)
    assert {tensor.dtype for tensor in [*layer.parameters(), layer.weight]} == {torch.float64}
    assert layer(input_for(layer)).dtype == torch.float64
    layer.to("meta")
    assert all(tensor.is_meta for tensor in [*layer.parameters(), layer.weight])


def test_compiles_as_one_graph_also_after_drops():
    torch.compiler.reset()
    layer = layer_of()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = input_for(layer)

    def check():
        outputs = [module(x) for module in (compiled, layer)]
        torch.testing.assert_close(*outputs)
        parameters = [parameter for parameter in layer.parameters() if parameter.numel()]
        torch.testing.assert_close(*(torch.autograd.grad(output.sum(), parameters) for output in outputs))

    check()
    layer.drop("2x2_rank1", free=True)
    check()
    layer.drop("8x8_rank1", free=False)
    check()


@pytest.mark.parametrize("free", [True, False], ids=["freed", "gated"])
def test_gradient_checkpointing(free):
    layer = layer_of(dtype=torch.float64)
    layer.drop("4x4_rank2", free=free)
    x = input_for(layer).requires_grad_()
    parameters = [x, *(parameter for parameter in layer.parameters() if parameter.numel())]
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    actual = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), parameters)
    torch.testing.assert_close(actual, expected)


def test_parameter_groups_made_after_a_drop_are_those_of_the_candidates_left():
    model = nn.Sequential(layer_of(), nn.Linear(8, 2))
    groups = kron_param_groups(model, 0.1, weight_decay=0.05)
    by_id = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        role = name.rpartition(".")[2]
        expected = {"s": (0.1, 0.0), "bias": (0.1, 0.0), "weight": (0.1, 0.05)}.get(role, (0.4, 0.05))
        assert by_id[id(parameter)] == expected, name
    state = copy.deepcopy(model.state_dict())
    model[0].drop("2x2_rank1")
    left = [parameter for name, parameter in model.named_parameters() if "2x2_rank1" not in name]
    after = kron_param_groups(model, 0.1, weight_decay=0.05)
    assert {id(parameter) for group in after for parameter in group["params"]} == {id(parameter) for parameter in left}
    model.load_state_dict(state)
    again = kron_param_groups(model, 0.1, weight_decay=0.05)
    assert [len(group["params"]) for group in again] == [len(group["params"]) for group in groups]


def test_training_and_the_optimizers_state_go_on_over_a_drop_and_a_restart():
    def build():
        return nn.Sequential(layer_of(dtype=torch.float64), nn.Linear(8, 2, dtype=torch.float64))

    def steps(model, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    def optimizer_of(model):
        return torch.optim.AdamW(kron_param_groups(model, 1e-2), fused=True)

    model = build()
    optimizer = optimizer_of(model)
    steps(model, optimizer, range(3))
    model[0].drop("4x4_rank2")
    forget(optimizer, list(model[0].layer("4x4_rank2").parameters()), leave=True)
    steps(model, optimizer, range(3, 6))
    assert not any(factor in optimizer.state for factor in model[0].layer("4x4_rank2").parameters())
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    steps(model, optimizer, range(6, 9))
    resumed = build()
    resumed.load_state_dict(saved["model"])  # before the optimizer is made, as Trainer does
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    steps(resumed, optimizer, range(6, 9))
    assert_equal(resumed.state_dict(), model.state_dict())
