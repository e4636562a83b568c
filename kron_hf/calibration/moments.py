"""Streaming second moments of a layer's inputs and wanted outputs: all that the calibrated fit needs of the data.

For inputs x `[in]` and targets t `[out]` with token weights w >= 0, means `mx`, `mt` and expectations weighted by w:
`C = E[(x - mx)(x - mx)^T]`, `G = E[(t - mt)(x - mx)^T]`, `v = E[(t - mt)^2]`. Batches are merged by the update of Chan,
Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979), so that a mean
that is large beside the deviations costs no digits.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Covariances", "Moments"]

ROWS = 4096  # taken at a time, so that the memory does not grow with the batch
PANEL = 512  # columns of C computed at a time: its upper triangle is not computed twice


@dataclass(frozen=True, eq=False)
class Covariances:
    """Means and centred second moments of the inputs x and the wanted outputs t of a layer.

    Attributes:
        weight: Sum of the token weights.
        rows: Number of rows of positive weight.
        mean_x: `[in]`.
        mean_y: `[out]`.
        c: Covariance of x, `[in, in]`.
        g: Cross-covariance of t and x, `[out, in]`.
        v: Variance of each output, `[out]`.
    """

    weight: float
    rows: int
    mean_x: Tensor
    mean_y: Tensor
    c: Tensor
    g: Tensor
    v: Tensor

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> "Covariances":
        """The covariances for the targets `t = W x + bias`, which follow from those of x alone.

        `G = W C`, `v = diag(W C W^T)`, `mean_y = W mx + bias`.

        Args:
            weight: W, `[out, in]`.
            bias: `[out]`, or None for zero.
        """
        if weight.shape[1] != len(self.c):
            raise ValueError(f"weight needs {len(self.c)} input features, got {tuple(weight.shape)}")
        weight = weight.to(self.c)
        g = weight @ self.c
        mean = weight @ self.mean_x
        return replace(
            self, mean_y=mean if bias is None else mean + bias.to(mean), g=g, v=(g * weight).sum(1).clamp_min(0)
        )

    def about_zero(self) -> "Covariances":
        """Second moments about zero: for a layer without a bias, whose weight has to fit the mean, too."""
        return replace(
            self,
            c=self.c + torch.outer(self.mean_x, self.mean_x),
            g=self.g + torch.outer(self.mean_y, self.mean_x),
            v=self.v + self.mean_y.square(),
            mean_x=torch.zeros_like(self.mean_x),
            mean_y=torch.zeros_like(self.mean_y),
        )

    def split(self, out_features: list[int]) -> list["Covariances"]:
        """Parts with so many outputs each, for layers that read the same x (q, k, v): they share C and its memory."""
        if sum(out_features) != len(self.v):
            raise ValueError(f"out_features must add up to {len(self.v)}, got {out_features}")
        parts = zip(
            self.mean_y.split(out_features), self.g.split(out_features), self.v.split(out_features), strict=True
        )
        return [replace(self, mean_y=mean, g=g, v=v) for mean, g, v in parts]

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Covariances":
        """The same in another dtype (the fit computes in it) or on another device."""
        moved = {
            name: getattr(self, name).to(dtype=dtype, device=device) for name in ("mean_x", "mean_y", "c", "g", "v")
        }
        return replace(self, **moved)


class Moments:
    """Accumulates the moments of x and t batch by batch.

    The sums are kept in float64 and take `in * in + out * in` numbers, however many rows there are. On a CPU the
    products within a batch of float32 (or narrower) data are computed in float32 after the batch has been centred in
    float64, unless that could overflow or the caller has lowered the precision of float32 products; elsewhere in
    float64.

    Args:
        in_features: Size of x.
        out_features: Size of t; 0 where only the inputs matter (see `Covariances.linear`). For layers that read the
            same x: the sum of their sizes (see `Covariances.split`).
        device: Where the sums are kept; the CPU in place of a device without float64 (mps).
    """

    def __init__(self, in_features: int, out_features: int = 0, *, device: torch.device | str | None = None):
        device = torch.get_default_device() if device is None else torch.device(device)
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.weight, self.rows = 0.0, 0
        self.mean_x, self.mean_y, self._v = (self._zeros(n) for n in (in_features, out_features, out_features))
        self._c, self._g = self._zeros(in_features, in_features), self._zeros(out_features, in_features)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Adds a batch; after an error nothing of it has been added.

        Args:
            x: Inputs, `[N, in]`, of any floating dtype and device.
            y: Wanted outputs, `[N, out]`; may be left out if `out_features` is 0.
            weights: Token weights, `[N]`, not negative; None for ones. A row of weight zero may hold anything.

        Raises:
            ValueError: If a shape does not fit or a value is NaN, infinite or, in `weights`, negative.
        """
        y = x.new_zeros(len(x), 0) if y is None else y
        weights = x.new_ones(len(x)) if weights is None else weights
        wanted = [(len(x), len(self.mean_x)), (len(x), len(self.mean_y)), (len(x),)]
        for name, value, shape in zip(("x", "y", "weights"), (x, y, weights), wanted, strict=True):
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {tuple(value.shape)}")
        _check_finite("weights", weights)
        if bool((weights < 0).any()):
            raise ValueError(f"weights must not be negative, got {int((weights < 0).sum())} of {len(weights)} that are")
        used = weights > 0
        if not bool(used.all()):
            x, y, weights = x[used.to(x.device)], y[used.to(y.device)], weights[used]
        if not len(weights):
            return
        for name, value in (("x", x), ("y", y)):
            _check_finite(name, value)
        parts = (value.detach().to(self.device).split(ROWS) for value in (x, y, weights))
        with torch.autocast(self.device.type, enabled=False):  # it would round the products to 8 or 11 bits
            for part in zip(*parts, strict=True):
                self._add(*part)

    def _add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        weights = weights.double()
        total = float(weights.sum())
        mean_x, x = _centred(x, weights)
        mean_y, y = _centred(y, weights)
        self._merge(total, len(weights), mean_x, mean_y, x, y)

    def _merge(self, total: float, rows: int, mean_x: Tensor, mean_y: Tensor, x: Tensor, y: Tensor) -> None:
        """Adds data given by its means and by rows x, y whose products are its centred sums."""
        share = total / (self.weight + total)
        shift_x, shift_y = mean_x - self.mean_x, mean_y - self.mean_y
        # The distance of the two means is one more row (Chan et al., eq. 2.1).
        root = (self.weight * share) ** 0.5
        x, y = (torch.cat([z, root * shift.to(z)[None]]) for z, shift in ((x, shift_x), (y, shift_y)))
        for start in range(0, x.shape[1], PANEL):
            self._c[start:, start : start + PANEL] += x[:, start:].T @ x[:, start : start + PANEL]
        self._g += y.T.to(x) @ x
        self._v += y.double().square().sum(0)
        self.mean_x += share * shift_x
        self.mean_y += share * shift_y
        self.weight += total
        self.rows += rows

    def result(self) -> Covariances:
        """The covariances of the rows so far; later updates do not change them.

        Raises:
            ValueError: If there was no row of positive weight.
        """
        if not self.weight:
            raise ValueError("covariances need at least one row of positive weight, got none")
        c = self._c.tril()
        c = (c + c.tril(-1).T) / self.weight
        return Covariances(
            weight=self.weight,
            rows=self.rows,
            mean_x=self.mean_x.clone(),
            mean_y=self.mean_y.clone(),
            c=c,
            g=self._g / self.weight,
            v=self._v / self.weight,
        )


def _centred(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the rows `sqrt(w) * (x - mean)`, in float32 where that is precise enough.

    What float32 rounds off `x - x_first` is small beside that difference, and smaller than what x was rounded by.
    """
    narrow = values.device.type == "cpu" and values.dtype != torch.float64
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    narrow = narrow and precision not in {"bf16", "tf32"}
    narrow = narrow and bool((values.abs().amax(0) < 1e15).all())  # their squares fit into float32
    first = values[:1].double()
    values = values.float() - first.float() if narrow else values.double() - first  # a constant column: exactly zero
    mean = (weights.to(values) @ values).double()[None] / weights.sum()
    values = (values - mean.to(values)) * weights.sqrt().to(values)[:, None]
    return (first + mean)[0], values


def _check_finite(name: str, value: Tensor) -> None:
    finite = value.isfinite()
    if not bool(finite.all()):
        nan, size = int(value.isnan().sum()), value.numel()
        infinite = size - int(finite.sum()) - nan
        raise ValueError(f"{name} must be finite, got {nan} NaN and {infinite} infinite of {size} values")
