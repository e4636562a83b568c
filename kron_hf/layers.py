"""`KronLinear`: a linear layer whose weight is Kronecker-sparse."""

from typing import Self

import torch
from torch import Tensor, nn

from kron_hf.block_size import resolve_block_size
from kron_hf.kron_layer import KronLayer
from kron_hf.ops import kron_linear
from kron_hf.ops.folded import Folded, fold

__all__ = ["KronLinear", "resolve_block_size"]


class KronLinear(KronLayer):
    r"""Linear layer `y = x W^T + bias` with `W = sum_i (S * A_i) (x) B_i` (paper, eq. 2).

    A zero of S makes a whole `bo x bi` block of W zero. No dense weight is stored or trained.

    Args:
        in_features: Size of each input sample, `I * bi`.
        out_features: Size of each output sample, `O * bo`.
        block_size: `(bo, bi)`, or one int for square blocks; -1 in a pair is the whole dimension, so `(1, -1)` is a
            plain low-rank layer.
        rank: Number of Kronecker terms, r in the paper; at most `bo * bi`.
        bias: Whether the layer has a bias.
        device: As in `nn.Linear`.
        dtype: As in `nn.Linear`.

    Attributes:
        s: Mask factor S, `[O, I]`.
        a: Factors A_i, `[rank, O, I]`.
        b: Block factors B_i, `[rank, bo, bi]`.
        bias: `[out_features]` or None.
        weight: An empty buffer that follows the dtype and device of the layer. It serves code that reads
            `layer.weight.dtype`, and its shape makes loaders that do not know this layer fail; the weight itself is
            `dense_weight()`.
        dead_blocks: The frozen mask, bool `[O, I]`, True where a block must stay zero; None while no mask is frozen.
        folded: What evaluation computes with after `fold`; None otherwise.

    Raises:
        ValueError: The block does not divide the layer, or the rank is outside `[1, bo * bi]`.

    Example:
        >>> import torch
        >>> layer = KronLinear(8, 4, block_size=(2, 4), rank=2)
        >>> layer(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
        >>> layer.dense_weight().shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: int | tuple[int, int],
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), block_size, rank, bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @property
    def input_positions(self) -> int:  # noqa: D102
        return 1

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` to `[..., out_features]`."""
        folded = self._usable_fold() if self.folded is not None else None
        if folded is not None and x.shape[-1:] == (self.in_features,):
            return folded(x, self.b, self.bias)
        return kron_linear(x, self.masked_s(), self.a, self.b, self.bias)

    def _fold(self, tokens: int, keep_weight: bool) -> Folded:
        return fold(self.s, self.a, self.b, self.dead_blocks, tokens=tokens, keep_weight=keep_weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int | tuple[int, int], rank: int) -> Self:
        """The nearest Kronecker layer to a dense one in the Frobenius norm; exact at full rank. S starts at one.

        Raises:
            ValueError: The weight holds NaN or infinite values.
        """
        if not bool(torch.isfinite(linear.weight).all()):
            raise ValueError("KronLinear.from_linear: the weight holds NaN or infinite values")
        layer = cls.like(linear, block_size, rank)
        layer.fit_nearest(linear.weight)
        return layer

    @classmethod
    def like(  # noqa: D102
        cls,
        dense: nn.Linear,
        block_size: int | tuple[int, int],
        rank: int,
        *,
        bias: bool | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        layer = cls(
            dense.in_features,
            dense.out_features,
            block_size,
            rank,
            bias=dense.bias is not None if bias is None else bias,
            device=dense.weight.device if device is None else device,
            dtype=dense.weight.dtype,
        )
        return layer.take_from(dense)

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same function, device and dtype; its weight is trainable if a factor is."""
        return self.to_dense()

    def to_dense(self) -> nn.Linear:  # noqa: D102
        return self.fill_dense(self.blank_dense(self.bias is not None, self.s.device, self.s.dtype))

    def blank_dense(self, bias: bool, device: torch.device, dtype: torch.dtype) -> nn.Linear:  # noqa: D102
        return nn.Linear(self.in_features, self.out_features, bias=bias, device=device, dtype=dtype)

    def blank_twin(self, bias: bool) -> "KronLinear":  # noqa: D102
        return KronLinear(self.in_features, self.out_features, self.block_size, self.rank, bias, device="meta")

    def extra_repr(self) -> str:
        """The sizes, as `nn.Linear` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
