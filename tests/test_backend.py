"""`KRON_HF_BACKEND`, and what the cost model says of each way."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from kron_hf.factors import kron_weight
from kron_hf.ops import backend, cost, cpu_costs, gemm, kron_linear, paths, ways

SHAPE = cost.Shape("cpu", torch.float32, 4096, 48, 48, 16, 16, 2)
FACTORED = [name for name in backend.BACKENDS if name.count("-") == 3]


@pytest.fixture
def environment(monkeypatch):
    """Sets `KRON_HF_BACKEND` as a new process would find it."""
    caches = (backend._named_by_environment, backend.forward_path, backend.backward_path, backend.fused_first)
    caches = (*caches, backend._say_that_fused_does_not_serve)

    def forget():
        for function in caches:
            function.cache_clear()

    def set_to(value):
        forget()
        monkeypatch.setenv(backend.VARIABLE, value)

    yield set_to
    forget()


@pytest.mark.parametrize("value", ["", "auto"])
def test_by_default_the_cost_model_chooses(environment, value):
    environment(value)
    assert backend.forced_backend() is None
    for shape in (SHAPE, SHAPE._replace(rank=16)):
        assert backend.forward_path(shape) == cost.forward_path(shape)
        assert backend.backward_path(shape) == cost.backward_path(shape)


@pytest.mark.parametrize("value", ["dense", "token", "token-major-b", "Fused "], ids=repr)
def test_an_unknown_name_lists_the_valid_ones(environment, value):
    environment(value)
    message = f"KRON_HF_BACKEND must be one of {', '.join(backend.BACKENDS)}, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        kron_linear(torch.ones(1, 2), torch.ones(1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 2))


def test_the_environment_is_read_once(environment, monkeypatch):
    environment("build-w")
    assert backend.forced_backend() == "build-w"
    monkeypatch.setenv(backend.VARIABLE, "token-last")
    assert backend.forced_backend() == "build-w"


def test_a_way_is_forced_for_a_while(environment):
    environment("token-last")
    with backend.forced("build-w"):
        assert backend.forward_path(SHAPE) is None
        with backend.forced("auto"):
            assert backend.forward_path(SHAPE) == cost.forward_path(SHAPE)
        assert backend.backward_path(SHAPE) is None
        with backend.forced("fused"):
            assert backend.fused_first(SHAPE)
        assert not backend.fused_first(SHAPE)
    assert backend.path_name(backend.forward_path(SHAPE)).startswith("token-last")
    with pytest.raises(ValueError, match=r"KRON_HF_BACKEND must be one of auto, build-w, .*, got 'dense'"):
        backend.forced("dense").__enter__()
    assert backend.path_name(backend.forward_path(SHAPE)).startswith("token-last")


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("block", [2, 16, 64])
def test_a_factored_way_is_taken_for_every_shape(environment, name, block):
    environment(name)
    shape = SHAPE._replace(block_out=block, block_in=block)
    assert backend.path_name(backend.forward_path(shape)) == name
    assert backend.path_name(backend.backward_path(shape)) == name


def test_building_w_is_taken_where_factors_are_cheaper(environment):
    assert cost.forward_path(SHAPE) is not None
    environment("build-w")
    assert backend.forward_path(SHAPE) is None
    assert backend.backward_path(SHAPE) is None


@pytest.mark.parametrize("layout", ["token-major", "token-last"])
def test_without_an_order_the_cheaper_one_is_taken(environment, layout):
    environment(layout)
    to_wide = SHAPE._replace(out_blocks=192)
    assert backend.path_name(backend.forward_path(to_wide)) == f"{layout}-b-first"
    assert backend.path_name(backend.forward_path(to_wide.transposed)) == f"{layout}-m-first"
    assert backend.path_name(backend.backward_path(to_wide)) == f"{layout}-b-first"
    assert backend.path_name(backend.backward_path(to_wide.transposed)) == f"{layout}-m-first"


def test_fused_says_once_that_it_does_not_serve(environment):
    environment("fused")
    with pytest.warns(UserWarning, match="KRON_HF_BACKEND=fused: the fused kernels do not serve every product here"):
        assert backend.forward_path(SHAPE) == cost.forward_path(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.backward_path(SHAPE) == cost.backward_path(SHAPE)
        assert backend.forward_path(SHAPE.transposed) == cost.forward_path(SHAPE.transposed)


@pytest.mark.parametrize("name", ["build-w", "token-major", "token-last", *FACTORED])
def test_every_forced_way_gives_the_product(environment, monkeypatch, name):
    environment(name)
    taken = []
    for direction in ("forward_path", "backward_path"):
        choose = getattr(backend, direction)
        monkeypatch.setattr(paths, direction, lambda shape, choose=choose: (taken.append(choose(shape)), taken[-1])[1])
    sizes = [(9, 6), (2, 3), (2, 2, 3), (2, 5, 2), (10,)]
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    x, s, a, b, bias = inputs
    out, naive = kron_linear(*inputs), F.linear(x, kron_weight(s, a, b), bias)
    torch.testing.assert_close(out, naive)
    gradients = [torch.autograd.grad(result.square().sum(), inputs) for result in (out, naive)]
    torch.testing.assert_close(*gradients)
    assert all(backend.path_name(path).startswith(name) for path in taken)


# What the cost model says


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("features", [128, 384, 768])
def test_the_chosen_way_is_the_cheapest_but_for_the_margin(features, rank):
    blocks = features // 16
    shape = SHAPE._replace(out_blocks=blocks, in_blocks=blocks, rank=rank)
    built = cost.forward_cost(shape, None)
    best = min(cost.forward_cost(shape, path) for path in cost.factored_paths(shape))
    assert (cost.forward_path(shape) is not None) == (best < 0.95 * built)
    built = cost.backward_cost(shape, None, cost.forward_path(shape.transposed))
    best = min(cost.backward_cost(shape, path) for path in cost.factored_paths(shape))
    assert (cost.backward_path(shape) is not None) == (best < 0.95 * built)
    for chosen, way_cost in ((cost.forward_path, cost.forward_cost), (cost.backward_path, cost.backward_cost)):
        path = chosen(shape)
        assert path is None or way_cost(shape, path) == min(
            way_cost(shape, each) for each in cost.factored_paths(shape)
        )


def test_building_w_costs_more_than_a_dense_product(without_onednn):
    dense = SHAPE.in_features * SHAPE.out_features
    assert dense < cost.forward_cost(SHAPE, None) < 1.2 * dense
    assert cost.forward_cost(SHAPE._replace(tokens=1), None) > 30 * dense  # W is built for one token


def test_a_large_product_with_w_costs_less_by_onednn(without_onednn, monkeypatch):
    shapes = [SHAPE, SHAPE._replace(tokens=16), SHAPE._replace(dtype=torch.bfloat16)]
    before = [(cost.forward_cost(shape, None), cost.dense_cost(shape)) for shape in shapes]
    monkeypatch.setattr(gemm, "_faster", lambda: True)
    after = [(cost.forward_cost(shape, None), cost.dense_cost(shape)) for shape in shapes]
    won = (1 - cpu_costs.cpu_costs(torch.float32, 1).onednn) * SHAPE.in_features * SHAPE.out_features
    assert before[0][0] - after[0][0] == pytest.approx(won)
    assert before[0][1] == after[0][1]  # nn.Linear stays with MKL
    assert before[1:] == after[1:]


def test_backward_computes_the_first_product_again():
    wide = SHAPE._replace(out_blocks=12, in_blocks=12, block_out=64, block_in=64, rank=1)
    with_b, with_m = 768 * 64, 12 * 768
    counts = {path.order: ways.multiply_adds(wide, path) for path in cost.factored_paths(wide)}
    assert counts["b_first"] == (with_b + with_m, 3 * with_b + 2 * with_m)
    assert counts["m_first"] == (with_b + with_m, 2 * with_b + 3 * with_m)
    assert cost.backward_path(wide).order == "m_first"


def test_chunks_fill_the_cache_and_no_row_of_tokens_is_a_power_of_two():
    small_blocks = SHAPE._replace(out_blocks=96, in_blocks=96, block_out=8, block_in=8, rank=1)
    sizes = {path.layout: (path.chunk, path.backward_chunk) for path in cost.factored_paths(small_blocks)}
    assert sizes == {"token_major": (1024, 1024), "token_last": (1008, 496)}
    wide = SHAPE._replace(out_blocks=2048, in_blocks=2048, rank=16)
    assert {(path.chunk, path.backward_chunk) for path in cost.factored_paths(wide)} == {(16, 16)}


def test_threads_that_are_not_there_are_not_woken():
    few = SHAPE._replace(tokens=1, out_blocks=96, in_blocks=96, block_out=8, block_in=8, rank=1)
    alone, two = (few._replace(threads=threads) for threads in (1, 2))
    assert cost.forward_path(alone) is not None  # one thread: measured at a quarter of building W
    for path in (None, *cost.factored_paths(few)):
        assert cost.forward_cost(two, path) > cost.forward_cost(alone, path) + 3 * 5e6


def test_what_was_measured_with_several_threads_is_taken_for_several(monkeypatch):
    one = cpu_costs.cpu_costs(torch.bfloat16, 1)
    several = one._replace(build=1e6, gather=1e9, scatter=1e9)
    monkeypatch.setitem(cpu_costs._MEASURED, torch.bfloat16, (one, several))
    alone = SHAPE._replace(dtype=torch.bfloat16, tokens=32, rank=4)
    four = alone._replace(threads=4)
    assert cost.forward_cost(four, None) > 1e6 * 768 * 768 / 32 > cost.forward_cost(alone, None)
    assert any(cost.worth_dropping(alone, 4, 4))
    assert not any(cost.worth_dropping(four, 4, 4))


def test_few_tokens_pay_for_reading_w():
    assert cost.dense_cost(SHAPE) == pytest.approx(768 * 768, rel=0.01)
    assert cost.dense_cost(SHAPE._replace(tokens=1)) > 5 * 768 * 768


def test_a_shape_knows_the_threads_that_compute():
    m, b = torch.empty(2, 3, 4), torch.empty(2, 5, 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert cost.Shape.of(7, m, b) == cost.Shape("cpu", torch.float32, 7, 3, 4, 5, 6, 2, threads=3)
        on_meta = cost.Shape.of(7, m.to("meta", torch.bfloat16), b.to("meta", torch.bfloat16))
        assert on_meta == cost.Shape("meta", torch.bfloat16, 7, 3, 4, 5, 6, 2)
    finally:
        torch.set_num_threads(before)
