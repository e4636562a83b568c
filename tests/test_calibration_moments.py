import pytest
import torch

from kron_hf.calibration.moments import PANEL, ROWS, Moments


def naive(x, y, weights=None):
    """Means and centred second moments, term by term in float64."""
    x, y = x.double(), y.double()
    weights = torch.ones(len(x)).double() if weights is None else weights.double()
    share = weights / weights.sum()
    mean_x, mean_y = share @ x, share @ y
    x, y = x - mean_x, y - mean_y
    return {
        "mean_x": mean_x,
        "mean_y": mean_y,
        "c": torch.einsum("n,ni,nj->ij", share, x, x),
        "g": torch.einsum("n,no,ni->oi", share, y, x),
        "v": torch.einsum("n,no->o", share, y.square()),
    }


def data(rows=60, in_features=7, out_features=5, dtype=torch.float64, mean=0.0):
    x = torch.randn(rows, in_features, dtype=torch.float64) @ torch.randn(in_features, in_features).double() + mean
    y = x @ torch.randn(in_features, out_features).double() + torch.randn(rows, out_features).double()
    return x.to(dtype), y.to(dtype)


def accumulated(x, y, weights=None, sizes=None):
    moments = Moments(x.shape[1], y.shape[1])
    sizes = sizes or [len(x)]
    weights = [None] * len(sizes) if weights is None else weights.split(sizes)
    for part in zip(x.split(sizes), y.split(sizes), weights, strict=True):
        moments.update(*part)
    return moments


def assert_moments(covariances, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(getattr(covariances, name), value, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("sizes", [[60], [1, 59], [20, 1, 39]], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_batches_add_up_to_the_formula(sizes, weighted):
    x, y = data(mean=3.0)
    weights = torch.rand(60, dtype=torch.float64) if weighted else None
    covariances = accumulated(x, y, weights, sizes).result()
    assert_moments(covariances, naive(x, y, weights), rtol=1e-11, atol=1e-11)
    assert covariances.rows == 60
    assert covariances.weight == pytest.approx(60 if weights is None else float(weights.sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_data_are_summed_exactly_but_for_float32_products(dtype):
    x, y = data(dtype=dtype)
    assert_moments(accumulated(x, y, sizes=[20, 40]).result(), naive(x, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "mean", "rtol"), [(torch.float64, 1e8, 1e-6), (torch.float32, 1e4, 1e-5)], ids=str)
def test_a_large_mean_costs_no_digits(dtype, mean, rtol):
    x, y = data(rows=3000, mean=mean, dtype=dtype)
    covariances = accumulated(x, y, sizes=[500] * 6).result()
    expected = naive(x.double() - mean, y.double() - y.double().mean(0))
    for name in ("c", "g", "v"):
        torch.testing.assert_close(getattr(covariances, name), expected[name], rtol=rtol, atol=rtol)


def test_more_rows_and_columns_than_are_taken_at_a_time():
    x, y = data(rows=ROWS + 5, in_features=PANEL + 3, out_features=2, dtype=torch.float32)
    covariances = accumulated(x, y).result()
    expected = naive(x, y)
    scale = float(expected["c"].diagonal().mean())
    torch.testing.assert_close(covariances.c, expected["c"], rtol=0, atol=1e-6 * scale)
    assert torch.equal(covariances.c, covariances.c.T)


def test_a_weight_is_a_number_of_repetitions_and_zero_is_none():
    x, y = data()
    counts = torch.arange(60) % 4
    repeated = accumulated(x.repeat_interleave(counts, 0), y.repeat_interleave(counts, 0)).result()
    weighted = accumulated(x, y, counts.float(), sizes=[1, 59]).result()
    assert_moments(weighted, {name: getattr(repeated, name) for name in ("mean_x", "mean_y", "c", "g", "v")})
    assert weighted.weight == repeated.weight == int(counts.sum())
    assert weighted.rows == int((counts > 0).sum())


def test_rows_of_weight_zero_may_hold_anything():
    x, y = data()
    weights = (torch.arange(60) % 3 > 0).double()
    expected = accumulated(x, y, weights).result()
    x[::3], y[3] = torch.nan, torch.inf
    found = accumulated(x, y, weights, sizes=[1, 59]).result()
    assert_moments(found, {name: getattr(expected, name) for name in ("mean_x", "mean_y", "c", "g", "v")})
    x[1] = torch.nan
    with pytest.raises(ValueError, match=r"x must be finite, got 7 NaN and 0 infinite of 280 values"):
        accumulated(x, y, weights)


def test_the_order_of_the_batches_does_not_matter():
    x, y = data()
    x[:20] += 50  # batches of different means
    forward, backward = (
        accumulated(x[order], y[order], sizes=[20, 20, 20]) for order in (slice(None), range(59, -1, -1))
    )
    assert_moments(forward.result(), {n: getattr(backward.result(), n) for n in ("mean_x", "c", "g", "v")})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_constant_has_no_variance_at_all(dtype):
    x, y = data(dtype=dtype)
    x[:, 2], y[:, 1] = 0.1, 0.3
    covariances = accumulated(x, y, torch.rand(60), sizes=[7, 53]).result()
    assert not covariances.c[2].any()
    assert not covariances.c[:, 2].any()
    assert not covariances.g[:, 2].any()
    assert not covariances.g[1].any()
    assert covariances.v[1] == 0


def test_sums_do_not_grow_with_the_data():
    moments = Moments(7, 5)
    sizes = []
    for rows in (10, 1000):
        moments.update(*data(rows=rows))
        sizes.append(sum(each.numel() for each in vars(moments).values() if isinstance(each, torch.Tensor)))
    assert sizes == [7 * 7 + 5 * 7 + 7 + 2 * 5] * 2


def test_autocast_and_gradients_of_the_caller_change_nothing():
    x, y = data(dtype=torch.float32)
    expected = accumulated(x, y).result()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        covariances = accumulated(x.requires_grad_(), y).result()
    assert torch.equal(covariances.c, expected.c)
    assert torch.equal(covariances.g, expected.g)
    assert not covariances.c.requires_grad


@pytest.fixture
def lowered_precision():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("lowered_precision")
def test_a_lowered_precision_of_float32_products_is_not_used():
    x, y = data(dtype=torch.float32)
    assert_moments(accumulated(x, y).result(), naive(x, y), rtol=1e-11, atol=1e-11)


def test_huge_values_do_not_overflow():
    x, y = data(dtype=torch.float32)
    covariances = accumulated(x * 1e25, y).result()
    torch.testing.assert_close(covariances.c, naive(x * 1e25, y)["c"], rtol=1e-6, atol=0)


def test_a_result_is_not_changed_by_later_updates():
    x, y = data()
    moments = accumulated(x, y)
    covariances = moments.result()
    moments.update(x + 5, y)
    assert_moments(covariances, naive(x, y), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, y, w: (x.index_fill(1, torch.tensor([0]), torch.nan), y, w),
            "x must be finite, got 60 NaN and 0 inf",
        ),
        (lambda x, y, w: (x, y.masked_fill(y == y.max(), -torch.inf), w), "y must be finite, got 0 NaN and 1 infinite"),
        (lambda x, y, w: (x, y, w / 0), "weights must be finite"),
        (lambda x, y, w: (x, y, w - 1.5), "weights must not be negative, got 60 of 60"),
        (lambda x, y, w: (x[:, 1:], y, w), r"x must have the shape \(60, 7\), got \(60, 6\)"),
        (lambda x, y, w: (x, y[1:], w), r"y must have the shape \(60, 5\), got \(59, 5\)"),
        (lambda x, y, w: (x, y, w[1:]), r"weights must have the shape \(60,\), got \(59,\)"),
        (lambda x, y, w: (x, None, w), r"y must have the shape \(60, 5\), got \(60, 0\)"),
    ],
)
def test_bad_data_are_refused_and_nothing_is_added(change, message):
    x, y = data()
    moments = accumulated(x, y)
    before = moments.result()
    with pytest.raises(ValueError, match=message):
        moments.update(*change(x, y, torch.ones(60)))
    assert torch.equal(moments.result().c, before.c)
    assert moments.rows == 60


def test_no_rows_no_result():
    moments = Moments(3, 2)
    moments.update(torch.ones(0, 3), torch.ones(0, 2))
    moments.update(torch.ones(4, 3), torch.ones(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="at least one row of positive weight, got none"):
        moments.result()


def test_a_device_without_float64_leaves_the_sums_on_the_cpu():
    assert Moments(3, 2, device="mps").device == torch.device("cpu")
    assert Moments(3, 2, device="meta").mean_x.device == torch.device("meta")


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_targets_of_a_linear_layer_follow_from_the_inputs(biased):
    x, _ = data()
    weight, bias = torch.randn(5, 7).double(), torch.randn(5).double() if biased else None
    moments = Moments(7)
    moments.update(x)
    covariances = moments.result().linear(weight, bias)
    expected = naive(x, torch.nn.functional.linear(x, weight, bias))
    assert_moments(covariances, expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match=r"weight needs 7 input features, got \(5, 6\)"):
        covariances.linear(weight[:, 1:])


def test_layers_that_read_the_same_inputs_share_c():
    x, y = data()
    parts = accumulated(x, y).result().split([3, 2])
    for part, columns in zip(parts, (slice(0, 3), slice(3, 5)), strict=True):
        assert_moments(part, naive(x, y[:, columns]), rtol=1e-11, atol=1e-11)
    assert parts[0].c is parts[1].c
    with pytest.raises(ValueError, match=r"must add up to 5, got \[3, 3\]"):
        accumulated(x, y).result().split([3, 3])


def test_to_changes_the_dtype_of_every_tensor():
    x, y = data()
    narrow = accumulated(x, y).result().to(dtype=torch.float32)
    assert {each.dtype for each in (narrow.mean_x, narrow.mean_y, narrow.c, narrow.g, narrow.v)} == {torch.float32}
    assert_moments(narrow, {name: value.float() for name, value in naive(x, y).items()})
