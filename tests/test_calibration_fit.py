import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from calibration_rows import correlated_rows, covariances_of, residual_share

from kron_hf.calibration import fit, half_step
from kron_hf.calibration.cholesky import ridged
from kron_hf.calibration.fit import fit_factors, fitted_bias, output_error
from kron_hf.factors import balanced_std, kron_weight, nearest_kronecker

OUT, IN = 12, 24
BLOCKS = [(4, 6), (2, 12), (6, 3), (3, 1), (12, 4), (4, 24), (12, 24)]
LOW_RANK = [(1, IN), (OUT, 1)]


@pytest.fixture
def rows():
    return correlated_rows(200, IN, OUT)


@pytest.fixture
def covariances(rows):
    return covariances_of(*rows)


def dense(factors):
    a, b = factors
    return kron_weight(torch.ones_like(a[0]), a, b)


def best_weight(covariances, ridge=1e-4):
    return torch.linalg.solve(ridged(covariances.c, ridge), covariances.g.T).T


def ridge_error(covariances, factors, ridge=1e-4, output_weights=None):
    return output_error(replace(covariances, c=ridged(covariances.c, ridge)), factors, output_weights=output_weights)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "output weights"])
def test_output_error_and_bias_are_those_of_the_rows(rows, covariances, weighted):
    x, t = rows
    d = torch.rand(OUT).double() if weighted else None
    factors = fit_factors(covariances, (4, 6), 3, output_weights=d)
    expected = residual_share(x, t, dense(factors), d)
    assert output_error(covariances, factors, output_weights=d) == pytest.approx(expected, rel=1e-9)
    assert output_error(covariances, dense(factors), output_weights=d) == pytest.approx(expected, rel=1e-9)
    left = t - x @ dense(factors).T - fitted_bias(covariances, factors)
    torch.testing.assert_close(left.mean(0), torch.zeros(OUT).double(), rtol=0, atol=1e-10)


def test_output_error_is_never_negative_and_defined_for_constant_outputs(rows):
    x, _ = rows
    weight = torch.randn(OUT, IN).double() * 1e3
    covariances = covariances_of(x, x @ weight.T)
    assert 0 <= output_error(covariances, weight) < 1e-12
    constant = covariances_of(x, torch.ones(len(x), OUT))
    assert output_error(constant, torch.zeros(OUT, IN)) == 0
    assert output_error(constant, weight) == math.inf


@pytest.mark.parametrize("path", ["by rows", "conjugate gradients"])
@pytest.mark.parametrize("masked", [False, True], ids=["all blocks", "masked"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "output weights"])
def test_no_half_step_raises_the_error_with_its_ridge(covariances, weighted, masked, path, monkeypatch):
    d = torch.rand(OUT).double() ** 4 if weighted else None
    mask = torch.rand(3, 4) < 0.6 if masked else None
    errors, solve = [], fit.best_coefficients

    def recording(quadratic, basis, start, mask=None):
        weight = torch.einsum("rjl,rkm->jklm", start, basis)
        swapped = quadratic.c.shape[0] != 4
        weight = (weight.permute(1, 0, 3, 2) if swapped else weight).reshape(OUT, IN)
        errors.append(ridge_error(covariances, weight, output_weights=d))
        return solve(quadratic, basis, start, mask)

    monkeypatch.setattr(fit, "best_coefficients", recording)
    monkeypatch.setattr(half_step, "_costs_less_by_rows", lambda *_: path == "by rows")
    factors = fit_factors(covariances, (4, 6), 3, output_weights=d, mask=mask, sweeps=10)
    errors.append(ridge_error(covariances, factors, output_weights=d))
    assert len(errors) == 21
    assert all(after <= before + 1e-12 for before, after in pairwise(errors))
    assert errors[-1] < 0.97 * errors[1]


def test_over_relaxation_and_the_start_earn_their_place(monkeypatch):
    ours, plain, nearest = [], [], []
    for _ in range(5):
        covariances = covariances_of(*correlated_rows(200, IN, OUT))
        start = nearest_kronecker(best_weight(covariances), (4, 6), 3)[:2]
        ours.append(output_error(covariances, fit_factors(covariances, (4, 6), 3)))
        nearest.append(output_error(covariances, fit_factors(covariances, (4, 6), 3, start=start, sweeps=1)))
        nearest[-1] -= output_error(covariances, fit_factors(covariances, (4, 6), 3, sweeps=1))
        with monkeypatch.context() as patch:
            patch.setattr(fit, "RELAXATION", 1.0)
            plain.append(output_error(covariances, fit_factors(covariances, (4, 6), 3)))
    assert sum(ours) < 0.99 * sum(plain)
    assert sum(nearest) > 0


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "output weights"])
@pytest.mark.parametrize("block", [(4, 6), (2, 3), (3, 1), (12, 6), (1, 6), *LOW_RANK], ids=str)
def test_at_full_rank_the_fit_is_the_least_squares_solution(covariances, block, weighted):
    d = torch.rand(OUT).double() + 0.1 if weighted else None
    rank = min(block[0] * block[1], OUT * IN // (block[0] * block[1]))
    factors = fit_factors(covariances, block, rank, output_weights=d)
    torch.testing.assert_close(dense(factors), best_weight(covariances), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [(4, 6), (6, 3), *LOW_RANK], ids=str)
def test_a_kronecker_sparse_layer_is_found(block):
    x, _ = correlated_rows(200, IN, OUT)
    a, b = torch.randn(2, OUT // block[0], IN // block[1]).double(), torch.randn(2, *block).double()
    covariances = covariances_of(x, x @ dense((a, b)).T + 3)
    factors = fit_factors(covariances, block, 2, ridge=1e-10, sweeps=60)
    assert output_error(covariances, factors) < 1e-8
    torch.testing.assert_close(fitted_bias(covariances, factors), torch.full((OUT,), 3.0).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("block", [*BLOCKS, *LOW_RANK], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 16], ids="rank {}".format)
def test_terms_are_balanced_and_no_worse_than_the_nearest_sum(covariances, block, rank):
    a, b = fit_factors(covariances, block, rank)
    assert a.shape == (rank, OUT // block[0], IN // block[1])
    assert b.shape == (rank, *block)
    assert a.dtype == b.dtype == torch.float64
    used = b.flatten(1).norm(dim=1) > 0
    torch.testing.assert_close(a.flatten(1).norm(dim=1)[used], b.flatten(1).norm(dim=1)[used])
    assert (a.flatten(1).norm(dim=1) > 0).all()
    start = nearest_kronecker(best_weight(covariances), block, rank)[:2]
    assert ridge_error(covariances, (a, b)) <= ridge_error(covariances, start) + 1e-12


def test_the_fit_is_deterministic_and_leaves_the_random_numbers_alone(covariances):
    state = torch.get_rng_state()
    first = fit_factors(covariances, (4, 6), 9)
    torch.rand(5)
    second = fit_factors(covariances, (4, 6), 9)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    torch.set_rng_state(state)
    fit_factors(covariances, (4, 24), 9)  # more terms than it takes: the spare ones are random
    assert torch.equal(torch.get_rng_state(), state)


def constant_layer():
    x, _ = correlated_rows(50, IN, OUT)
    return covariances_of(x, torch.full((50, OUT), 0.1))


def dead_inputs():
    x, t = correlated_rows(50, IN, OUT)
    x[:, 3:11] = 0
    return covariances_of(x, t)


SINGULAR = {
    "one row": lambda: covariances_of(*correlated_rows(1, IN, OUT)),
    "equal rows": lambda: covariances_of(*(each[:1].expand(20, -1) for each in correlated_rows(1, IN, OUT))),
    "few rows": lambda: covariances_of(*correlated_rows(9, IN, OUT)),
    "constant layer": constant_layer,
    "dead inputs": dead_inputs,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ridge", [1e-4, 0.0], ids="ridge {}".format)
@pytest.mark.parametrize("block", [(4, 6), (12, 24), *LOW_RANK], ids=str)
@pytest.mark.parametrize("name", SINGULAR)
def test_singular_covariances_give_finite_factors_that_can_be_trained(name, block, ridge, dtype):
    covariances = SINGULAR[name]().to(dtype=dtype)
    d = torch.rand(OUT)
    for mask in (None, torch.ones(OUT // block[0], IN // block[1], dtype=torch.bool)):
        a, b = fit_factors(covariances, block, 3, output_weights=d, ridge=ridge, mask=mask)
        assert a.isfinite().all()
        assert b.isfinite().all()
        assert output_error(covariances, (a, b), output_weights=d) < 1
        norms = a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)
        assert ((norms[0] > 0) | (norms[1] > 0)).all()
        if name in {"one row", "equal rows", "constant layer"}:
            assert not b.any()
            assert float(a.std()) == pytest.approx(balanced_std(3, 1 / (3 * IN)), rel=0.6) if a.numel() > 3 else True


@pytest.mark.parametrize("rank", [1, 3, 8], ids="rank {}".format)
@pytest.mark.parametrize("block", [(4, 6), (2, 12), *LOW_RANK], ids=str)
def test_dead_blocks_are_zero_in_every_term(covariances, block, rank):
    mask = torch.rand(OUT // block[0], IN // block[1]) < 0.4
    mask[0, 0], mask[-1, -1] = True, False
    a, b = fit_factors(covariances, block, rank, mask=mask)
    assert not a[:, ~mask].any()
    assert (a[:, mask] != 0).any(0).all()
    assert output_error(covariances, (a, b)) < 1


def test_a_mask_of_all_blocks_is_none(covariances):
    expected = fit_factors(covariances, (4, 6), 3)
    masked = fit_factors(covariances, (4, 6), 3, mask=torch.ones(3, 4, dtype=torch.bool))
    torch.testing.assert_close(dense(masked), dense(expected), rtol=1e-8, atol=1e-8)


def test_a_start_is_gone_on_from_and_may_have_fewer_terms(covariances):
    first = fit_factors(covariances, (4, 6), 2, sweeps=1)
    torch.testing.assert_close(dense(fit_factors(covariances, (4, 6), 2, start=first, sweeps=0)), dense(first))
    errors = [output_error(covariances, first)]
    for rank in (2, 4):
        factors = fit_factors(covariances, (4, 6), rank, start=first, sweeps=3)
        errors.append(output_error(covariances, factors))
    assert errors[0] > errors[1] > 1.05 * errors[2]


def test_output_weights_are_worth_their_outputs(covariances):
    """The fit for the weights is better by them than that without, and the other way round."""
    d = torch.logspace(0, -4, OUT).double()
    plain, weighted = fit_factors(covariances, (4, 6), 3), fit_factors(covariances, (4, 6), 3, output_weights=d)
    by_weights = [output_error(covariances, each, output_weights=d) for each in (weighted, plain)]
    assert by_weights[0] < 0.9 * by_weights[1]
    assert output_error(covariances, plain) < 0.9 * output_error(covariances, weighted)


def test_conjugate_gradients_fit_as_well_as_exact_half_steps(covariances, monkeypatch):
    d = torch.rand(OUT).double() ** 3
    exact = output_error(covariances, fit_factors(covariances, (4, 6), 4, output_weights=d), output_weights=d)
    monkeypatch.setattr(half_step, "_costs_less_by_rows", lambda *_: False)
    reached = output_error(covariances, fit_factors(covariances, (4, 6), 4, output_weights=d), output_weights=d)
    assert reached == pytest.approx(exact, rel=0.01)


def test_float32_fits_as_well_as_float64(covariances):
    wide, narrow = (fit_factors(covariances.to(dtype=dtype), (4, 6), 3) for dtype in (torch.float64, torch.float32))
    assert narrow[0].dtype == narrow[1].dtype == torch.float32
    assert output_error(covariances, narrow) == pytest.approx(output_error(covariances, wide), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": (5, 6)}, r"block_size \(5, 6\) must divide the layer, \(12, 24\)"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"output_weights": torch.ones(11)}, r"output_weights need the shape \(12,\), got \(11,\)"),
        ({"output_weights": torch.zeros(12)}, "not all zero"),
        ({"output_weights": -torch.ones(12)}, "not negative"),
        (
            {"mask": torch.ones(4, 3, dtype=torch.bool)},
            r"mask must be bool of shape \(3, 4\), got torch.bool of \(4, 3\)",
        ),
        ({"mask": torch.ones(3, 4)}, r"mask must be bool of shape \(3, 4\), got torch.float32"),
        ({"mask": torch.zeros(3, 4, dtype=torch.bool)}, "at least one block, got none"),
        ({"start": (torch.ones(3, 3, 4), torch.ones(3, 4, 6))}, "with r <= 2, got"),
        ({"start": (torch.ones(2, 3, 4), torch.ones(2, 6, 4))}, r"b \[r, 4, 6\].* got \(2, 3, 4\) and \(2, 6, 4\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(covariances, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_factors(covariances, **({"block_size": (4, 6), "rank": 2} | arguments))
