"""W of a moment and the way back from its gradient, by one thread and by several, against the formula."""

import pytest
import torch

from kron_hf.factors import kron_sum
from kron_hf.ops import dense_weight
from kron_hf.ops.dense_weight import build_weight, factor_gradients

SIZES = [
    ((2, 3), (4, 5), 3),  # O, I, bo, bi, rank
    ((48, 48), (4, 4), 2),
    ((47, 24), (5, 8), 8),  # an odd number of block rows, of which parts are copied
    ((1, 192), (192, 1), 1),
    ((24, 24), (8, 8), 9),
    ((48, 48), (8, 8), 2),
    ((9, 130), (2, 8), 2),  # blocks of few entries, whose table has a row for each of them
    ((130, 9), (16, 1), 3),
    ((97, 193), (2, 2), 4),
]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _factors(grid, block, rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    m, b = (torch.randn(rank, *size, generator=generator).to(dtype) for size in (grid, block))
    return m.transpose(0, 1).contiguous().transpose(0, 1), b  # M with strides of its own, as folded ones have


@pytest.mark.parametrize(("grid", "block", "rank"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_w_and_gradients_are_those_of_the_formula(threads, grid, block, rank, dtype):
    m, b = _factors(grid, block, rank, dtype)
    exact_m, exact_b = (each.double().requires_grad_() for each in (m, b))
    exact = kron_sum(exact_m, exact_b)
    tolerance = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    weight = build_weight(m, b)
    assert weight.dtype == dtype
    assert weight.is_contiguous()
    torch.testing.assert_close(weight.double(), exact.detach(), **tolerance)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact.backward(grad.double())
    for found, wanted in zip(factor_gradients(grad, m, b), (exact_m.grad, exact_b.grad), strict=True):
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-3)


def test_few_entries_are_left_to_one_thread(threads):
    def one_thread(grid, block, rank, dtype=torch.float32, device="cpu"):
        m, b = (each.to(device).flatten(1) for each in _factors(grid, block, rank, dtype))
        return dense_weight._alone(m, b)

    assert one_thread((48, 48), (4, 4), 8) == (threads > 1)
    assert not one_thread((48, 48), (4, 4), 9)
    assert not one_thread((96, 96), (4, 4), 1)
    assert not one_thread((48, 48), (4, 4), 1, torch.bfloat16)
    assert not one_thread((48, 48), (4, 4), 1, device="meta")
