"""Converting random trees of modules: refused with the model untouched, or exactly the named modules, and back."""

import re
import warnings
from contextlib import suppress

import torch
from hypothesis import strategies as st
from properties import check_all, examples
from torch import nn

from kron_hf import KronConfig, KronLinear, get_kron_model, to_dense
from kron_hf.targets import find_targets

WIDTHS = st.sampled_from([1, 4, 6, 7, 8, 12])
# What may stand in a ModuleDict's keys, much of it with a meaning in regular expressions.
KEYS = st.text("abfc019_-^$*+?()[]{}|\\ é", min_size=1, max_size=5).filter(lambda key: not hasattr(nn.Module(), key))


class Chain(nn.Module):
    """Modules in a container of torch's, called one after the other."""

    def __init__(self, modules):
        super().__init__()
        self.modules_ = modules

    def forward(self, x):
        parts = self.modules_.values() if isinstance(self.modules_, nn.ModuleDict) else self.modules_
        for part in parts:
            x = part(x)
        return x


class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Reader(nn.Module):
    """Reads the weight of its linear by itself."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, width)

    def forward(self, x):
        return x @ self.fc1.weight.t()


@st.composite
def chains(draw, width, depth):
    """A list of modules that take `width` features, and the width that comes out."""
    modules = []
    for _ in range(draw(st.integers(1, 4 if depth else 3))):
        kinds = ["linear", "linear", "linear", "norm", "attention", "reader", "shared", "tied", "frozen"]
        kind = draw(st.sampled_from(kinds + ["sequential", "list", "dict"] * (depth > 0)))
        if kind in ("sequential", "list", "dict"):
            inner, width = draw(chains(width, depth - 1))
            modules.append(container(draw, kind, inner))
        elif kind in ("linear", "frozen"):
            out = draw(WIDTHS)
            modules.append(nn.Linear(width, out, bias=draw(st.booleans())).requires_grad_(kind == "linear"))
            width = out
        elif kind in ("shared", "tied"):
            first = nn.Linear(width, width)
            second = first if kind == "shared" else nn.Linear(width, width)
            second.weight = first.weight
            modules += [first, nn.Tanh(), second]
        else:
            modules.append({"norm": nn.LayerNorm, "attention": SelfAttention, "reader": Reader}[kind](width))
    return modules, width


def container(draw, kind, modules):
    if kind == "sequential":
        return nn.Sequential(*modules)
    if kind == "list":
        return Chain(nn.ModuleList(modules))
    keys = draw(st.lists(KEYS, min_size=len(modules), max_size=len(modules), unique=True))
    return Chain(nn.ModuleDict(zip(keys, modules, strict=True)))


@st.composite
def models(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    width = draw(WIDTHS)
    modules, _ = draw(chains(width, depth=2))
    model = nn.Sequential(*modules).double()
    return model.train(draw(st.booleans())), torch.randn(2, 3, width, dtype=torch.float64)


@st.composite
def conversions(draw):
    model, x = draw(models())
    names = [name for name, _ in model.named_modules() if name]
    some = st.lists(st.sampled_from(names), min_size=1, max_size=4)
    endings = some.map(lambda chosen: [name.rpartition(".")[2] for name in chosen])
    # As a whole name, or as a regular expression that matches it alone.
    pattern = st.sampled_from(names).map(re.escape)
    block_size = draw(st.sampled_from([1, 2, 4, 3, (2, 4), (1, -1), (-1, 1), (-1, -1), (7, 1)]))
    arguments = {
        "block_size": block_size,
        "rank": 1 if block_size == 1 else draw(st.sampled_from([1, 1, 2])),
        "target_modules": draw(st.none() | st.just("all-linear") | some | endings | pattern),
        "exclude_modules": draw(st.none() | some | pattern),
        "block_size_pattern": draw(st.dictionaries(pattern, st.sampled_from([1, 2, (1, -1)]), max_size=2)),
        "init_weights": draw(st.sampled_from([None, "random", "nearest"])),
    }
    return model, x, KronConfig(**arguments)


def snapshot(model):
    """Everything that a refusal must leave: the objects, their values, and their flags."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    flags = {name: module.training for name, module in modules.items()}
    flags |= {name: parameter.requires_grad for name, parameter in parameters.items()}
    return modules, parameters, flags, {name: parameter.detach().clone() for name, parameter in parameters.items()}


def assert_untouched(model, before):
    modules, parameters, flags, values = before
    now = snapshot(model)
    for old, new in ((modules, now[0]), (parameters, now[1])):
        assert list(old) == list(new)
        assert all(old[name] is new[name] for name in old)
    assert flags == now[2]
    torch.testing.assert_close(values, now[3], rtol=0, atol=0)


def is_named(config, name):
    """What naming means, said again: whole names or their endings in a list, else a pattern for the whole name."""

    def matches(entries):
        if isinstance(entries, str):
            return re.fullmatch(entries, name) is not None
        return any(name == entry or name.endswith(f".{entry}") for entry in entries or [])

    return matches(config.target_modules) and not matches(config.exclude_modules)


@examples(200, 1500)
def test_conversion_is_all_or_nothing_and_reversible(examples):
    outcomes = {"refused": 0, "converted": 0}

    def check(case):
        model, x, config = case
        before = snapshot(model)
        shape = model(x).shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                names = [target.name for target in find_targets(model, config)]
                assert_untouched(model, before)
                assert get_kron_model(model, config) is model
            except ValueError:
                outcomes["refused"] += 1
                assert_untouched(model, before)
                return
        outcomes["converted"] += 1
        assert_converted(model, names, before)
        if config.target_modules not in (None, "all-linear"):
            assert names == [name for name in before[0] if name and is_named(config, name)]
        y = model(x)
        assert y.shape == shape
        assert to_dense(model) is model
        assert_dense_again(model, before)
        torch.testing.assert_close(model(x), y)

    check_all(check, conversions(), examples)
    assert min(outcomes.values()) > examples / 10, outcomes


def assert_converted(model, names, before):
    modules, _, flags, _ = before
    now = dict(model.named_modules(remove_duplicate=False))
    assert [name for name, module in now.items() if isinstance(module, KronLinear)] == names
    assert list(now) == list(modules)
    assert all(now[name] is modules[name] for name in modules.keys() - set(names))
    for name in names:
        assert type(modules[name]) is nn.Linear
        assert now[name].training == flags[name]
        assert {p.requires_grad for p in now[name].parameters()} == {
            p.requires_grad for p in modules[name].parameters()
        }


def assert_dense_again(model, before):
    modules, parameters, flags, _ = before
    now = snapshot(model)
    assert {name: type(module) for name, module in now[0].items()} == {n: type(module) for n, module in modules.items()}
    assert {name: p.shape for name, p in now[1].items()} == {name: p.shape for name, p in parameters.items()}
    assert flags == now[2]


@examples(60, 400)
def test_nearest_at_full_rank_changes_nothing(examples):
    converted = []

    def check(case):
        (model, x), block_size = case
        config = KronConfig(
            block_size=block_size,
            rank=block_size[0] * block_size[1],
            target_modules="all-linear",
            init_weights="nearest",
        )
        expected = model.eval()(x)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Left dense|These modules need as many FLOPs")
            with suppress(ValueError):  # no linear of that size in it
                get_kron_model(model, config)
                converted.append(model)
        torch.testing.assert_close(model(x), expected)

    check_all(check, st.tuples(models(), st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])), examples)
    assert len(converted) > examples / 3
