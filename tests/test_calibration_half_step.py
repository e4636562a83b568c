import pytest
import torch

from kron_hf.calibration import half_step
from kron_hf.calibration.half_step import Quadratic, best_coefficients

SHAPES = [  # (out_blocks, in_blocks, block_out, block_in, rank)
    pytest.param((3, 2, 2, 4, 3), id="rectangular"),
    pytest.param((2, 3, 3, 2, 2), id="bo > bi"),
    pytest.param((1, 4, 3, 2, 2), id="O = 1"),
    pytest.param((4, 1, 2, 3, 3), id="I = 1"),
    pytest.param((3, 2, 2, 2, 1), id="rank 1"),
    pytest.param((3, 3, 2, 2, 4), id="full rank"),
    pytest.param((4, 2, 1, 3, 2), id="rows"),
]
WEIGHTS = ["none", "by row", "product", "any"]


def problem(shape, weights):
    """The error as a Quadratic, and as rows: inputs x and targets t whose residuals, weighted by d, are summed."""
    out_blocks, in_blocks, block_out, block_in, rank = shape
    out_features, in_features = out_blocks * block_out, in_blocks * block_in
    x = torch.randn(40, in_features).double() @ torch.randn(in_features, in_features).double()
    t = x @ torch.randn(in_features, out_features).double() + torch.randn(40, out_features).double()
    d = {
        "none": torch.ones(out_blocks, block_out).double(),
        "by row": torch.rand(out_blocks, 1).double().expand(-1, block_out),
        "product": torch.rand(out_blocks, 1).double() * torch.rand(block_out).double(),
        "any": torch.rand(out_blocks, block_out).double() ** 3 + 1e-3,
    }[weights]
    c = (x.T @ x).view(in_blocks, block_in, in_blocks, block_in)
    g = (t.T @ x).view(out_blocks, block_out, in_blocks, block_in)
    basis = torch.linalg.qr(torch.randn(block_out * block_in, rank).double())[0].T.reshape(rank, block_out, block_in)
    start = torch.randn(rank, out_blocks, in_blocks).double()
    return Quadratic(c, g, d.contiguous()), x, t, basis, start


def brute_force(quadratic, x, t, basis, mask):
    """Least squares on the rows themselves, one design matrix for all coefficients."""
    out_blocks, block_out, in_blocks, block_in = quadratic.g.shape
    x = x.view(-1, in_blocks, block_in)
    units = torch.eye(out_blocks).double()
    design = torch.einsum("jk,rkm,nlm,jJ->njkrJl", quadratic.d.sqrt(), basis, x, units)
    design = design.flatten(3).flatten(0, 2)  # [N * out, r * O * I]
    target = (t.view(-1, out_blocks, block_out) * quadratic.d.sqrt()).flatten()
    alive = mask.expand(len(basis), -1, -1).flatten()
    solution = torch.zeros(len(alive)).double()
    solution[alive] = torch.linalg.lstsq(design[:, alive], target).solution
    return solution.view(len(basis), out_blocks, in_blocks)


@pytest.fixture(params=["cheapest", "by rows", "by weights", "conjugate gradients"])
def path(request, monkeypatch):
    """Forces one way to solve where the rows do not share their system."""
    if request.param == "by weights":
        monkeypatch.setattr(half_step, "ENTRIES", 0)
    if request.param != "cheapest":
        by_rows = request.param != "conjugate gradients"
        monkeypatch.setattr(half_step, "_costs_less_by_rows", lambda *_: by_rows)
    monkeypatch.setattr(half_step, "ITERATIONS", 100)
    monkeypatch.setattr(half_step, "TOLERANCE", 1e-24)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("masked", [False, True], ids=["all blocks", "masked"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_half_step_is_the_least_squares_solution_on_the_rows(shape, weights, masked):
    quadratic, x, t, basis, start = problem(shape, weights)
    mask = torch.rand(start.shape[1:]) < 0.6 if masked else torch.ones(start.shape[1:], dtype=torch.bool)
    solved = best_coefficients(quadratic, basis, start * mask, mask if masked else None)
    torch.testing.assert_close(solved, brute_force(quadratic, x, t, basis, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_other_half_step_is_the_same_with_the_roles_swapped(shape, weights):
    quadratic, x, t, _, a = problem(shape, weights)
    out_blocks, block_out, in_blocks, block_in = quadratic.g.shape
    rank = min(len(a), out_blocks * in_blocks)
    a = torch.linalg.qr(a[:rank].flatten(1).T)[0].T.reshape(rank, out_blocks, in_blocks)
    b = best_coefficients(quadratic.swapped(), a, torch.zeros(rank, block_out, block_in).double())
    units = torch.eye(block_out).double()
    x = x.view(-1, in_blocks, block_in)
    design = torch.einsum("jk,rjl,nlm,kK->njkrKm", quadratic.d.sqrt(), a, x, units).flatten(3).flatten(0, 2)
    target = (t.view(-1, out_blocks, block_out) * quadratic.d.sqrt()).flatten()
    expected = torch.linalg.lstsq(design, target).solution.view_as(b)
    torch.testing.assert_close(b, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_one_system_serves_all_rows_exactly_where_the_weights_are_a_product(weights):
    quadratic = problem((3, 2, 2, 4, 3), weights)[0]
    assert quadratic.separable == quadratic.swapped().separable == (weights != "any")


def test_rows_without_weight_are_fitted_like_the_rest():
    quadratic, _, _, basis, start = problem((3, 2, 2, 4, 3), "none")
    expected = best_coefficients(quadratic, basis, start)
    d = quadratic.d.clone()
    d[1] = 0
    torch.testing.assert_close(best_coefficients(Quadratic(quadratic.c, quadratic.g, d), basis, start), expected)


def test_what_costs_more_than_ten_products_with_c_is_solved_by_conjugate_gradients():
    def costs_less_by_rows(out_features, in_features, block, rank, mask=None):
        blocks = out_features // block[0], block[0], in_features // block[1], block[1]
        g = torch.empty(1).expand(blocks)
        d = torch.rand(blocks[0], blocks[1]) if mask is None else torch.ones(blocks[0], blocks[1])
        return half_step._costs_less_by_rows(Quadratic(g, g, d), rank, mask)

    assert costs_less_by_rows(384, 1536, (4, 64), 8)
    assert costs_less_by_rows(384, 1536, (16, 16), 4)
    assert not costs_less_by_rows(768, 3072, (8, 8), 16)
    assert costs_less_by_rows(768, 3072, (8, 8), 16, torch.arange(96 * 384).view(96, 384) % 16 == 0)


def test_each_conjugate_gradient_step_lowers_the_error(monkeypatch):
    quadratic, x, t, basis, start = problem((3, 4, 2, 3, 3), "any")
    monkeypatch.setattr(half_step, "_costs_less_by_rows", lambda *_: False)

    def error(a):
        weight = torch.einsum("rjl,rkm->jklm", a, basis).flatten(0, 1).flatten(1)
        return float(((t - x @ weight.T).square() * quadratic.d.flatten()).sum())

    best = error(brute_force(quadratic, x, t, basis, torch.ones(3, 4, dtype=torch.bool)))
    errors = [error(start)]
    for iterations in range(1, 11):
        monkeypatch.setattr(half_step, "ITERATIONS", iterations)
        errors.append(error(best_coefficients(quadratic, basis, start)))
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 11
    assert 0 <= errors[-1] - best < 1e-3 * (errors[0] - best)
