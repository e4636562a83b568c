import pytest
import torch
from calibration_rows import correlated_rows, covariances_of, residual_share

from kron_hf.calibration.fit import fit_factors, output_error
from kron_hf.calibration.low_rank import low_rank_path
from kron_hf.factors import kron_weight

SIZES = [pytest.param(6, 10, id="wide"), pytest.param(10, 6, id="tall"), pytest.param(1, 5, id="one output")]


def dense(factors):
    a, b = factors
    return kron_weight(torch.ones_like(a[0]), a, b)


@pytest.fixture(params=["plain", "output weights", "zero weights"])
def weights(request):
    def make(out_features):
        d = torch.rand(out_features).double() + 0.01
        if request.param == "zero weights" and out_features > 1:
            d[::2] = 0
        return None if request.param == "plain" else d

    return make


@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_errors_are_those_of_the_factors_at_every_rank(out_features, in_features, weights):
    d = weights(out_features)
    x, t = correlated_rows(150, in_features, out_features)
    train, held_out = covariances_of(x[:100], t[:100]), covariances_of(x[100:], t[100:])
    path = low_rank_path(train, output_weights=d)
    errors, held = path.errors(), path.errors(held_out)
    assert len(errors) == len(held) == min(out_features, in_features)
    for rank in range(1, len(errors) + 1):
        weight = dense(path.factors(rank, (1, in_features)))
        torch.testing.assert_close(dense(path.factors(rank, (out_features, 1))), weight)
        assert torch.linalg.matrix_rank(weight) <= rank
        assert float(errors[rank - 1]) == pytest.approx(residual_share(x[:100], t[:100], weight, d), rel=1e-8)
        assert float(held[rank - 1]) == pytest.approx(residual_share(x[100:], t[100:], weight, d), rel=1e-8)
    assert (errors.diff() <= 1e-12).all()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_other_weight_of_that_rank_is_better(rank, weights):
    d = weights(6)
    covariances = covariances_of(*correlated_rows(100, 10, 6))
    path = low_rank_path(covariances, output_weights=d, ridge=0.0)
    best = float(path.errors()[rank - 1])
    left, right = path.left[:rank], path.right[:rank]
    for _ in range(20):
        scale = float(10 ** -(3 * torch.rand(1)))
        other = (left + scale * torch.randn_like(left) * left.std()).T @ (right + scale * torch.randn_like(right))
        assert output_error(covariances, other, output_weights=d) >= best - 1e-12
        random = torch.randn(6, rank).double() @ torch.randn(rank, 10).double()
        assert output_error(covariances, random, output_weights=d) > best


@pytest.mark.parametrize("block", [(1, 10), (6, 1)], ids=str)
def test_long_alternating_least_squares_end_there(block, weights):
    d = weights(6)
    covariances = covariances_of(*correlated_rows(100, 10, 6))
    everything = torch.ones(6 // block[0], 10 // block[1], dtype=torch.bool)  # a mask: no closed form
    alternated = fit_factors(covariances, block, 2, output_weights=d, mask=everything, sweeps=60)
    direct = fit_factors(covariances, block, 2, output_weights=d)
    errors = [output_error(covariances, each, output_weights=d) for each in (direct, alternated)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


def test_outputs_without_weight_are_fitted_in_the_same_subspace():
    covariances = covariances_of(*correlated_rows(100, 10, 6))
    d = torch.tensor([0.0, 1, 1, 0, 1, 1]).double()
    path = low_rank_path(covariances, output_weights=d)
    weight = dense(path.factors(3, (1, 10)))
    assert weight.isfinite().all()
    error = output_error(covariances, weight, output_weights=1 - d)
    assert error < output_error(covariances, weight * d[:, None], output_weights=1 - d)


def test_more_rank_than_there_is_adds_terms_that_change_nothing():
    path = low_rank_path(covariances_of(*correlated_rows(100, 10, 6)))
    a, b = path.factors(9, (1, 10))
    torch.testing.assert_close(dense((a, b)), dense(path.factors(6, (1, 10))))
    assert not b[6:].any()
    assert a[6:].all()


def test_constant_outputs_and_constant_inputs_have_no_error():
    x, t = correlated_rows(50, 10, 6)
    for covariances in (covariances_of(x, torch.ones_like(t)), covariances_of(torch.ones_like(x), torch.ones_like(t))):
        path = low_rank_path(covariances)
        assert path.errors().tolist() == [0.0] * 6
        assert not path.left.any()
        assert path.right.isfinite().all()


def test_other_blocks_are_refused():
    path = low_rank_path(covariances_of(*correlated_rows(50, 10, 6)))
    with pytest.raises(ValueError, match=r"blocks of \(1, 10\) or \(6, 1\), got \(2, 5\)"):
        path.factors(2, (2, 5))
