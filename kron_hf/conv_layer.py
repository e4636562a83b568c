"""`KronConv2d`: a convolution whose weight is Kronecker-sparse over channels."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from kron_hf.kron_layer import KronLayer
from kron_hf.ops.convolution import kron_conv2d
from kron_hf.ops.folded_convolution import FoldedConvolution, fold_convolution
from kron_hf.ops.geometry import Convolution
from kron_hf.sharding import is_sharded

__all__ = ["KronConv2d", "refuse_groups"]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def refuse_groups(groups: int, channels: tuple[int, int], name: str = "KronConv2d") -> None:
    """Raises a ValueError that calls a depthwise or grouped convolution `name`.

    Its weight is block diagonal already: it couples few channels or none, and has few entries to save.

    Args:
        groups: As in `nn.Conv2d`.
        channels: `(out, in)`.
        name: What the error calls it.
    """
    if groups != 1:
        kind = "depthwise" if groups == channels[1] else "grouped"
        raise ValueError(
            f"{name}: groups must be 1, since blocks are of channels that are all connected; this {kind} convolution "
            f"has groups={groups} for {channels} channels (out, in)"
        )


class KronConv2d(KronLayer):
    r"""Convolution with the weight `W = sum_i (S * A_i) (x) B_i` over channels (paper, eq. 2), in place of `nn.Conv2d`.

    S and A_i are over the blocks of channels, B_i is a kernel for the channels of one block:
    `W[j*bo + k, l*bi + m] = sum_i s[j, l] * a[i, j, l] * b[i, k, m]`, each side `[kh, kw]`. A zero of S makes the
    kernels between `bo` output and `bi` input channels zero. No dense weight is stored or trained. The forward works
    from the factors where that is to take less time, and keeps its input alone for backward; what lies between the two
    steps, `rank * bo / bi` or `rank * O / I` times the input, is there for the moment. Else it builds W for the moment.

    Args:
        in_channels: Channels of the input, `I * bi`.
        out_channels: Channels of the output, `O * bo`.
        kernel_size: As in `nn.Conv2d`.
        block_size: `(bo, bi)` channels, or one int for both; -1 in a pair is all channels.
        rank: Number of Kronecker terms, r in the paper; at most `bo * bi * kh * kw`.
        stride: As in `nn.Conv2d`.
        padding: As in `nn.Conv2d`, "same" and "valid" among them.
        dilation: As in `nn.Conv2d`.
        groups: 1; nothing else is possible.
        bias: Whether the layer has a bias.
        padding_mode: As in `nn.Conv2d`.
        device: As in `nn.Conv2d`.
        dtype: As in `nn.Conv2d`.

    Attributes:
        s: Mask factor S, `[O, I]`.
        a: Factors A_i, `[rank, O, I]`.
        b: Block factors B_i, `[rank, bo, bi, kh, kw]`.
        bias: `[out_channels]` or None.
        weight: An empty buffer, as in `KronLinear`; the weight itself is `dense_weight()`.
        dead_blocks: The frozen mask, bool `[O, I]`, as in `KronLinear`.

    Raises:
        ValueError: The block does not divide the channels, the rank is out of range, the geometry is none of
            `nn.Conv2d`, or the convolution is depthwise or grouped.

    Example:
        >>> layer = KronConv2d(8, 16, 3, block_size=(4, 2), rank=2, padding=1)
        >>> layer(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 16, 5, 5])
        >>> layer.dense_weight().shape
        torch.Size([16, 8, 3, 3])
    """

    groups = 1
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        block_size: int | tuple[int, int],
        rank: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        refuse_groups(groups, (out_channels, in_channels))
        geometry = Convolution(
            _pair("kernel_size", kernel_size, 1),
            _pair("stride", stride, 1),
            padding if isinstance(padding, str) else _pair("padding", padding, 0),
            _pair("dilation", dilation, 1),
            padding_mode,
        )
        _check(geometry)
        super().__init__((out_channels, in_channels, *geometry.kernel_size), block_size, rank, bias, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode = geometry

    @property
    def _geometry(self) -> Convolution:
        return Convolution(self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode)

    @property
    def input_positions(self) -> int:  # noqa: D102
        return self._geometry.input_positions

    def forward(self, x: Tensor) -> Tensor:
        """`x [N, in_channels, H, W]`, or without N, to `[N, out_channels, H', W']`."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"KronConv2d: x must have {self.in_channels} channels, [N, {self.in_channels}, H, W] or "
                f"[{self.in_channels}, H, W], got shape {list(x.shape)}"
            )
        images = x.unsqueeze(0) if x.dim() == 3 else x
        folded = self._usable_fold() if self.folded is not None else None
        if folded is not None:
            y = folded(images, self.b, self.bias)
        else:
            y = kron_conv2d(images, self.masked_s() * self.a, self.b, self.bias, self._geometry)
        return y.squeeze(0) if x.dim() == 3 else y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Shows B with four dimensions, since `to(memory_format=torch.channels_last)` takes no other."""

        def of_images(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5 or is_sharded(tensor):
                return fn(tensor)
            return fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])

        return super()._apply(of_images, recurse)

    def _fold(self, tokens: int, keep_weight: bool) -> FoldedConvolution:
        factors = (self.s, self.a, self.b, self.dead_blocks)
        return fold_convolution(*factors, self._geometry, keep_weight=keep_weight)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, block_size: int | tuple[int, int], rank: int) -> Self:
        """The nearest Kronecker layer to a dense one in the Frobenius norm; exact at full rank. S starts at one.

        Raises:
            ValueError: The weight holds NaN or infinite values, or the convolution is depthwise or grouped.
        """
        refuse_groups(conv.groups, (conv.out_channels, conv.in_channels), "KronConv2d.from_conv")
        if not bool(torch.isfinite(conv.weight).all()):
            raise ValueError("KronConv2d.from_conv: the weight holds NaN or infinite values")
        layer = cls.like(conv, block_size, rank)
        layer.fit_nearest(conv.weight)
        return layer

    @classmethod
    def like(  # noqa: D102
        cls,
        dense: nn.Conv2d,
        block_size: int | tuple[int, int],
        rank: int,
        *,
        bias: bool | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        sizes: Any = (dense.in_channels, dense.out_channels, dense.kernel_size, block_size, rank)
        geometry: Any = (dense.stride, dense.padding, dense.dilation, dense.groups)
        layer = cls(
            *sizes,
            *geometry,
            bias=dense.bias is not None if bias is None else bias,
            padding_mode=dense.padding_mode,
            device=dense.weight.device if device is None else device,
            dtype=dense.weight.dtype,
        )
        return layer.take_from(dense)

    def to_conv(self) -> nn.Conv2d:
        """The dense layer with the same function, device and dtype; its weight is trainable if a factor is."""
        return self.to_dense()

    def to_dense(self) -> nn.Conv2d:  # noqa: D102
        return self.fill_dense(self.blank_dense(self.bias is not None, self.s.device, self.s.dtype))

    def blank_dense(self, bias: bool, device: torch.device, dtype: torch.dtype) -> nn.Conv2d:  # noqa: D102
        geometry: Any = (self.stride, self.padding, self.dilation)
        where: Any = {"padding_mode": self.padding_mode, "device": device, "dtype": dtype}
        return nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, *geometry, bias=bias, **where)

    def blank_twin(self, bias: bool) -> "KronConv2d":  # noqa: D102
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.block_size, self.rank)
        geometry = (self.stride, self.padding, self.dilation)
        return KronConv2d(*sizes, *geometry, bias=bias, padding_mode=self.padding_mode, device="meta")

    def extra_repr(self) -> str:
        """The sizes, as `nn.Conv2d` shows them."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        usual = {"padding": (0, 0), "dilation": (1, 1), "padding_mode": "zeros"}
        others = [f", {name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        kron = f"block_size={self.block_size}, rank={self.rank}, bias={self.bias is not None}"
        return f"{sizes}{''.join(others)}, {kron}"


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(type(n) is int and n >= least for n in pair):
        raise ValueError(f"KronConv2d: {name} must be an int or a pair of ints of at least {least}, got {value!r}")
    return pair[0], pair[1]


def _check(geometry: Convolution) -> None:
    if isinstance(geometry.padding, str) and geometry.padding not in ("same", "valid"):
        raise ValueError(
            f"KronConv2d: padding must be 'same', 'valid', an int or a pair of ints, got {geometry.padding!r}"
        )
    if geometry.padding == "same" and geometry.stride != (1, 1):
        raise ValueError(f"KronConv2d: padding='same' needs stride 1, got stride={geometry.stride}")
    if geometry.padding_mode not in PADDING_MODES:
        modes = ", ".join(map(repr, PADDING_MODES))
        raise ValueError(f"KronConv2d: padding_mode must be one of {modes}, got {geometry.padding_mode!r}")
