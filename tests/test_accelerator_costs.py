"""What the cost model says of devices that were not measured: arithmetic, which these tests do in another way."""

import pytest
import torch

from kron_hf.bench.layers import ModelLayer
from kron_hf.ops import accelerator_costs, cost
from kron_hf.ops.ways import Factored, Shape, multiply_adds

FLOAT32 = Shape("cuda", torch.float32, 16384, 64, 64, 16, 16, 1)
BFLOAT16 = FLOAT32._replace(dtype=torch.bfloat16)
RECTANGULAR = Shape("cuda", torch.float32, 4096, 24, 96, 32, 16, 2)
# The setting in which the authors of the method measured: float32, 1,024 features, 20,000 rows, blocks of 8.
AUTHORS = [
    FLOAT32._replace(tokens=20000, out_blocks=128, in_blocks=128, block_out=8, block_in=8, rank=rank)
    for rank in (1, 2, 4)
]


def whole(order, size=2**20):
    """All tokens in one chunk."""
    return Factored("token_last", order, size, size)


def step_cost(shape):
    """Forward and backward as they are chosen, over dense."""
    backward = cost.backward_cost(shape, cost.backward_path(shape), cost.forward_path(shape.transposed))
    return (cost.forward_cost(shape, cost.forward_path(shape)) + backward) / (3 * cost.dense_cost(shape))


@pytest.fixture
def moving_is_free(monkeypatch):
    monkeypatch.setattr(accelerator_costs, "_BYTES", float("inf"))
    monkeypatch.setattr(accelerator_costs, "_LAUNCH", 0)


@pytest.mark.parametrize("order", ["b_first", "m_first"])
@pytest.mark.parametrize("shape", [FLOAT32, RECTANGULAR, RECTANGULAR.transposed], ids=["square", "one", "other"])
def test_multiply_adds_are_what_the_ways_count(moving_is_free, shape, order):
    path = whole(order)
    assert (cost.forward_cost(shape, path), cost.backward_cost(shape, path)) == multiply_adds(shape, path)
    entries = shape.in_features * shape.out_features
    assert cost.dense_cost(shape) == entries
    assert cost.forward_cost(shape, None) == pytest.approx(entries * (1 + shape.rank / shape.tokens))
    grad_w = entries * (1 + 2 * shape.rank / shape.tokens)
    grad_x, _ = multiply_adds(shape.transposed, path)
    assert cost.backward_cost(shape, None, path) == pytest.approx(grad_w + grad_x)


@pytest.mark.parametrize("order", ["b_first", "m_first"])
def test_what_is_moved_where_nothing_is_computed(monkeypatch, order):
    monkeypatch.setattr(accelerator_costs, "_OTHERS", 1.0)
    monkeypatch.setattr(accelerator_costs, "_BYTES", 4e-9)  # a float moved takes a thousand million multiply-adds
    monkeypatch.setattr(accelerator_costs, "_LAUNCH", 0)
    path, (x, y) = whole(order), (RECTANGULAR.in_features, RECTANGULAR.out_features)
    z = 2 * (96 * 32 if order == "b_first" else 24 * 16)
    copies = 2 * y if order == "b_first" else 2 * x + 2 * y
    assert cost.forward_cost(RECTANGULAR, path) == pytest.approx(1e9 * (x + 2 * z + y + copies))
    copies = 2 * y + 2 * x if order == "b_first" else 2 * x + 2 * x
    gradients = 2 * (z + x) + 2 * (z + y) + z + x  # Z, dB; dM, V; dX from V, or from Z
    assert cost.backward_cost(RECTANGULAR, path) == pytest.approx(1e9 * (gradients + copies))


def test_a_call_takes_as_long_as_launching_its_kernels(monkeypatch):
    one = FLOAT32._replace(tokens=1)
    launch = accelerator_costs._LAUNCH * accelerator_costs._OTHERS
    assert cost.dense_cost(one) == launch
    assert cost.forward_cost(one, whole("b_first")) == 3 * launch
    assert cost.backward_cost(one, whole("b_first")) == 7 * launch
    many = FLOAT32._replace(tokens=6400)
    assert cost.forward_cost(many, whole("b_first", 64)) == pytest.approx(300 * launch / 6400)


@pytest.mark.parametrize("shape", AUTHORS, ids=lambda shape: f"rank_{shape.rank}")
def test_the_setting_of_the_authors_is_faster_and_no_heavier_than_dense(shape):
    assert step_cost(shape) < 0.8
    dense_only = 4 * 1024 * 1024  # its weight, gradient, and two of AdamW
    for path in cost.factored_paths(shape):
        held = shape.in_features + shape.out_features + shape.rank * 1024
        assert 256 < path.chunk == path.backward_chunk
        assert path.chunk * held < 0.9 * dense_only


def test_large_layers_take_large_chunks_and_small_ones_what_a_cache_holds():
    large = BFLOAT16._replace(out_blocks=256, in_blocks=256)
    small = BFLOAT16._replace(out_blocks=12, in_blocks=12)
    for shape, most in ((large, 3.5 * 4096 * 4096), (small, 7 * 2**20)):
        held = 3 * shape.in_features
        (size,) = {path.chunk for path in cost.factored_paths(shape)}
        assert size % 64 == 0
        assert most - 64 * held < size * held <= most


def test_half_precision_and_tf32_bind_by_memory():
    assert cost.forward_path(FLOAT32) is not None
    for shape in (BFLOAT16, FLOAT32._replace(tf32=True)):
        assert cost.forward_path(shape) is None
        assert cost.backward_path(shape) is None
        assert 1 < step_cost(shape) < 1.1
    large = BFLOAT16._replace(out_blocks=128, in_blocks=128, block_out=32, block_in=32)
    assert cost.forward_path(large) is not None


def test_the_fused_kernels_are_at_the_roofline():
    forward, backward = (part / cost.dense_cost(BFLOAT16) for part in accelerator_costs.fused_cost(BFLOAT16))
    assert 1 / forward == pytest.approx(2.8, rel=0.05)  # elements of x and y alone
    assert 2 / backward == pytest.approx(2.8 * 4 / 5, rel=0.05)


@pytest.mark.parametrize("allowed", [False, True])
def test_layers_know_whether_tf32_is_allowed(restored_tf32, allowed):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    layer = ModelLayer(1024, 1024, (16, 16), 1, True, ("fc",))
    assert layer.shape("cuda", torch.float32, 16384) == FLOAT32._replace(tf32=allowed)
    assert layer.shape("cuda", torch.bfloat16, 16384) == BFLOAT16
    assert not layer.shape("cpu", torch.float32, 16384).tf32
