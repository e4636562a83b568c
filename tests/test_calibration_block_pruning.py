import pytest
import torch
from calibration_rows import correlated_rows, covariances_of

from kron_hf.calibration.block_pruning import block_saliency, prune_gradually, prune_layers, refit
from kron_hf.calibration.fit import fit_factors, output_error
from kron_hf.factors import kron_weight

OUT, IN, BLOCK = 12, 24, (3, 4)


def prune_blocks(saliency, target_sparsity):
    """Of one layer."""
    return prune_layers([saliency], [1], target_sparsity)[0]


@pytest.fixture
def rows():
    return correlated_rows(200, IN, OUT)


@pytest.fixture
def covariances(rows):
    return covariances_of(*rows)


@pytest.mark.parametrize("scaled", [False, True], ids=["S one", "S any"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "output weights"])
def test_saliency_is_the_variance_that_a_block_alone_makes(rows, covariances, weighted, scaled):
    x, t = rows
    a, b = fit_factors(covariances, BLOCK, 3)
    d = torch.rand(OUT).double() if weighted else torch.ones(OUT).double()
    s = torch.randn(4, 6).double() if scaled else None
    saliency = block_saliency(covariances, s, a, b, d if weighted else None)
    weight = kron_weight(torch.ones(4, 6).double() if s is None else s, a, b)
    total = float((t.var(0, correction=0) * d).sum())
    for p in range(4):
        for q in range(6):
            made = x[:, 4 * q : 4 * q + 4] @ weight[3 * p : 3 * p + 3, 4 * q : 4 * q + 4].T
            expected = float((made.var(0, correction=0) * d[3 * p : 3 * p + 3]).sum()) / total
            assert float(saliency[p, q]) == pytest.approx(expected, rel=1e-9)


def test_saliency_is_what_leaving_out_the_block_costs_a_fitted_layer(covariances):
    a, b = fit_factors(covariances, BLOCK, 12, ridge=0.0)
    saliency, error = block_saliency(covariances, None, a, b), output_error(covariances, (a, b))
    for p, q in ((0, 0), (2, 3), (3, 5)):
        without = a.clone()
        without[:, p, q] = 0
        assert output_error(covariances, (without, b)) - error == pytest.approx(float(saliency[p, q]), rel=1e-6)


def test_zero_blocks_and_constant_outputs_have_defined_saliencies(covariances):
    a, b = fit_factors(covariances, BLOCK, 3)
    s = torch.ones(4, 6)
    s[1, 2] = 0
    saliency = block_saliency(covariances, s, a, b)
    assert (saliency == 0).nonzero().tolist() == [[1, 2]]
    constant = covariances_of(torch.randn(30, IN), torch.ones(30, OUT))
    assert block_saliency(constant, None, a, b).isfinite().all()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_target_is_met_over_all_layers_and_none_is_emptied(sparsity, scope):
    shapes, entries = [(4, 6), (3, 3), (5, 2)], [12, 4, 100]
    saliencies = [torch.rand(shape) * scale for shape, scale in zip(shapes, (1, 1e-6, 10), strict=True)]
    masks = prune_layers(saliencies, entries, sparsity, scope)
    total = sum(n * each.numel() for n, each in zip(entries, saliencies, strict=True))
    dead = sum(n * int((~mask).sum()) for n, mask in zip(entries, masks, strict=True))
    assert [mask.dtype for mask in masks] == [torch.bool] * 3
    assert all(mask.any() for mask in masks)
    if sparsity < 0.9:
        assert sparsity * total <= dead < sparsity * total + max(entries)
    else:
        assert [int(mask.sum()) for mask in masks] == [1, 1, 1]
    for mask, saliency in zip(masks, saliencies, strict=True):
        if mask.all():
            continue
        assert saliency[~mask].max() < saliency[mask].min()


def test_one_layer_keeps_its_most_salient_blocks():
    saliency = torch.tensor([[3.0, 1.0], [4.0, 2.0]])
    assert prune_blocks(saliency, 0.5).tolist() == [[True, False], [True, False]]
    assert prune_blocks(saliency, 0.51).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0,), "target_sparsity must be at least 0 and below 1, got 1.0"),
        ((-0.1,), "got -0.1"),
        ((0.5, "model"), r"scope must be one of \('global', 'layer'\), got 'model'"),
    ],
)
def test_bad_targets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_layers([torch.rand(2, 2)], [4], *arguments)
    with pytest.raises(ValueError, match="NaN"):
        prune_layers([torch.tensor([[torch.nan, 1.0]])], [4], 0.5)


def test_refit_recovers_part_of_the_loss_and_keeps_the_zeros(covariances):
    a, b = fit_factors(covariances, BLOCK, 4)
    mask = prune_blocks(block_saliency(covariances, None, a, b), 0.5)
    dropped = output_error(covariances, (a * mask, b))
    refitted = refit(covariances, mask, a, b)
    assert not refitted[0][:, ~mask].any()
    assert output_error(covariances, (a, b)) < output_error(covariances, refitted) < 0.9 * dropped


def test_salient_blocks_are_better_than_others_and_rounds_better_than_one():
    errors = {"rounds": 0.0, "one": 0.0, "any": 0.0}
    for _ in range(5):
        covariances = covariances_of(*correlated_rows(200, IN, OUT))
        a, b = fit_factors(covariances, BLOCK, 4)
        for name, rounds in (("rounds", 4), ("one", 1)):
            mask, *factors = prune_gradually(covariances, a, b, 14, rounds=rounds)
            assert int((~mask).sum()) == 14
            assert not factors[0][:, ~mask].any()
            errors[name] += output_error(covariances, tuple(factors))
        mask = prune_blocks(torch.rand(4, 6), 14 / 24)
        errors["any"] += output_error(covariances, refit(covariances, mask, a, b))
    assert errors["rounds"] < errors["one"] < 0.95 * errors["any"]


@pytest.mark.parametrize(("dead", "rounds"), [(24, 4), (-1, 4), (3, 0)])
def test_pruning_all_blocks_is_refused(covariances, dead, rounds):
    a, b = fit_factors(covariances, BLOCK, 2)
    with pytest.raises(ValueError, match=f"dead_blocks must be at least 0 and below 24.* got {dead} and {rounds}"):
        prune_gradually(covariances, a, b, dead, rounds=rounds)
