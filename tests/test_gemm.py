"""Products by oneDNN: where it serves, and that it changes nothing but the time."""

import pytest
import torch
import torch.nn.functional as F

from kron_hf.factors import kron_weight
from kron_hf.ops import backend, gemm, kron_linear
from kron_hf.ops.backend import forced

AMD = {"cpu_name": "AMD EPYC 9B45", "avx512_f": True}
HAS_IT = torch.backends.mkldnn.is_available()
with_onednn = pytest.mark.skipif(not HAS_IT, reason="torch was built without oneDNN")


@pytest.fixture
def processor(monkeypatch):
    """Sets what torch says of the processor."""

    def set_to(about):
        gemm._faster.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: about)

    yield set_to
    gemm._faster.cache_clear()


@pytest.fixture(params=[False, True], ids=["torch", "onednn"])
def library(request, monkeypatch):
    """Products of any size by one of the libraries."""
    if request.param and not HAS_IT:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(gemm, "_faster", lambda: request.param)
    monkeypatch.setattr(gemm, "_MIN_MULTIPLY_ADDS", 1)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (7, 5, 3), (129, 33, 65), (64, 192, 16), (0, 4, 3)])
def test_products_are_those_of_the_formula(library, rows, inner, columns, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(size, generator=generator) for size in ((rows, inner), (columns, inner), (columns,)))
    expected = x.double() @ weight.double().T + (b.double() if bias else 0)
    for layout in (weight, weight.T.contiguous().T):
        found = gemm.linear(x, layout, b if bias else None)
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in backend.BACKENDS if name != "fused"])
@pytest.mark.parametrize(("grid", "block", "rank"), [((6, 8), (4, 2), 3), ((5, 3), (16, 16), 2), ((1, 7), (3, 5), 1)])
def test_every_way_gives_the_same_by_both_libraries(library, name, grid, block, rank):
    generator = torch.Generator().manual_seed(0)
    sizes = ((37, grid[1] * block[1]), grid, (rank, *grid), (rank, *block), (grid[0] * block[0],))
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    exact = [tensor.clone().requires_grad_() for tensor in tensors]
    own = [tensor.float().requires_grad_() for tensor in tensors]
    x, s, a, b, bias = exact
    expected = F.linear(x, kron_weight(s, a, b), bias)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    with forced(name):
        found = kron_linear(*own)
        found.backward(grad.float())
    expected.backward(grad)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(own, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)


@with_onednn
def test_it_serves_large_float32_products_of_amd_processors(processor):
    processor(AMD)
    torch_has_mkl = torch.backends.mkl.is_available()
    assert gemm.onednn_serves("cpu", torch.float32, 2**25) == torch_has_mkl
    assert not gemm.onednn_serves("cpu", torch.float32, 2**25 - 1)
    assert not gemm.onednn_serves("cpu", torch.float32, 0)
    assert not gemm.onednn_serves("cuda", torch.float32, 2**30)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not gemm.onednn_serves("cpu", dtype, 2**30)


@pytest.mark.parametrize(
    "about",
    [
        pytest.param({"cpu_name": "INTEL Xeon Platinum 8481C", "avx512_f": True}, id="intel"),
        pytest.param({"cpu_name": "AMD EPYC 7B12"}, id="without-avx512"),
        pytest.param({}, id="unknown"),
    ],
)
def test_where_nothing_was_measured_products_are_torch_s(processor, about):
    processor(about)
    assert not gemm.onednn_serves("cpu", torch.float32, 2**30)


def test_an_operator_with_other_arguments_is_not_called(processor, monkeypatch):
    processor(AMD)
    monkeypatch.setattr(gemm, "_SCHEMA", "mkldnn::_linear_pointwise(Tensor X) -> Tensor Y")
    assert not gemm.onednn_serves("cpu", torch.float32, 2**30)


def test_a_user_may_turn_onednn_off(library, monkeypatch):
    assert gemm.onednn_serves("cpu", torch.float32, 2**30) == library
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not gemm.onednn_serves("cpu", torch.float32, 2**30)
