import pytest
import torch

from kron_hf.calibration.cholesky import cholesky, ridged
from kron_hf.calibration.terms import balanced_terms, orthonormal
from kron_hf.factors import kron_weight, nearest_kronecker


def dense(a, b):
    return kron_weight(torch.ones_like(a[0]), a, b)


def factors(rank=3):
    return torch.randn(rank, 3, 4).double(), torch.randn(rank, 2, 5).double()


def test_orthonormal_factors_keep_the_sum():
    a, b = factors()
    basis, others = orthonormal(b, a)
    torch.testing.assert_close(basis.flatten(1) @ basis.flatten(1).T, torch.eye(3).double())
    torch.testing.assert_close(dense(others, basis), dense(a, b))


@pytest.mark.parametrize("degenerate", ["dependent", "zero"])
def test_dependent_factors_are_replaced_by_new_directions_within_the_mask(degenerate):
    a, b = factors()
    mask = torch.rand(3, 4) < 0.5
    mask[0, :3] = True
    a = a * mask
    a[2] = a[0] - 2 * a[1] if degenerate == "dependent" else 0
    basis, others = orthonormal(a, b, mask)
    torch.testing.assert_close(basis.flatten(1) @ basis.flatten(1).T, torch.eye(3).double())
    torch.testing.assert_close(dense(basis, others), dense(a, b))
    assert not basis[:, ~mask].any()


@pytest.mark.parametrize("spare", [0, 2])
def test_balanced_terms_are_those_of_the_nearest_sum(spare):
    a, b = factors()
    new_a, new_b = balanced_terms(a, b, 3 + spare, 20)
    expected_a, expected_b, _ = nearest_kronecker(dense(a, b), (2, 5), 3)
    torch.testing.assert_close(
        torch.einsum("rjl,rkm->rjlkm", new_a[:3], new_b[:3]).abs(),
        torch.einsum("rjl,rkm->rjlkm", expected_a, expected_b).abs(),
    )
    torch.testing.assert_close(dense(new_a, new_b), dense(a, b))
    torch.testing.assert_close(new_a[:3].flatten(1).norm(dim=1), new_b[:3].flatten(1).norm(dim=1))
    assert not new_b[3:].any()
    assert new_a[3:].all()


def test_spare_terms_respect_the_mask():
    a, b = factors(2)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = True
    new_a, new_b = balanced_terms(a * mask, b, 4, 20, mask)
    torch.testing.assert_close(dense(new_a, new_b), dense(a * mask, b))
    assert not new_a[:, ~mask].any()
    assert new_a[:, mask].all()


def test_the_ridge_is_relative_to_the_mean_variance():
    c = torch.diag(torch.tensor([1.0, 2.0, 9.0]))
    torch.testing.assert_close(ridged(c, 0.5), torch.diag(torch.tensor([3.0, 4.0, 11.0])))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_singular_covariance_has_a_factor_close_to_it(scale):
    x = torch.randn(5, 3).double()
    singular = scale * x @ x.T
    factor = cholesky(singular)
    torch.testing.assert_close(factor @ factor.T, singular, rtol=1e-9, atol=1e-9 * scale)
    assert (factor.diagonal() > 0).all()


def test_a_regular_covariance_is_not_touched_and_a_zero_one_has_the_factor_of_one():
    regular = torch.eye(3).double() * 1e-20
    assert torch.equal(cholesky(regular), torch.linalg.cholesky(regular))
    assert torch.equal(cholesky(torch.zeros(3, 3)), torch.eye(3))
