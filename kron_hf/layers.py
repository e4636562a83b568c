"""`KronLinear`: a linear layer whose weight is Kronecker-sparse."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from kron_hf.factors import balanced_std, kron_weight, nearest_kronecker
from kron_hf.ops import kron_linear
from kron_hf.ops.folded import Folded, fold
from kron_hf.sharding import gather, is_sharded, laid_out_as, local, shard_of

__all__ = ["KronLinear", "resolve_block_size"]


def resolve_block_size(
    block_size: int | tuple[int, int], out_features: int, in_features: int, name: str = "KronLinear"
) -> tuple[int, int]:
    """The block size `(bo, bi)` of one layer: an int is a square block, -1 in a pair is the whole dimension.

    Raises:
        ValueError: The block does not divide the layer, or is no block size at all; names `name` and both numbers.
    """
    pair = (block_size, block_size) if isinstance(block_size, int) else block_size
    if (
        not isinstance(pair, tuple | list)
        or len(pair) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) or n < -1 or n == 0 for n in pair)
    ):
        raise ValueError(
            f"{name}: block_size must be a positive int or a pair (out, in) of positive ints (-1 in a pair = the "
            f"whole dimension), got {block_size!r}"
        )
    if block_size == -1:
        raise ValueError(f"{name}: block_size=-1 is only allowed inside a pair, as in (1, -1)")
    block_out, block_in = (out_features if pair[0] == -1 else pair[0], in_features if pair[1] == -1 else pair[1])
    if out_features % block_out or in_features % block_in:
        raise ValueError(
            f"{name}: block_size {(block_out, block_in)} does not divide its weight of shape "
            f"{(out_features, in_features)} (out, in)"
        )
    return block_out, block_in


class KronLinear(nn.Module):
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

    s: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    bias: nn.Parameter | None
    weight: Tensor
    dead_blocks: Tensor | None
    folded: Folded | None = None

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
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size = resolve_block_size(block_size, out_features, in_features)
        block_out, block_in = self.block_size
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= block_out * block_in:
            raise ValueError(
                f"KronLinear: rank must be an int from 1 to bo * bi = {block_out * block_in}, got {rank!r}"
            )
        self.rank = rank
        self.out_blocks, self.in_blocks = out_features // block_out, in_features // block_in
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.s = nn.Parameter(torch.empty(self.out_blocks, self.in_blocks, **where))
        self.a = nn.Parameter(torch.empty(rank, self.out_blocks, self.in_blocks, **where))
        self.b = nn.Parameter(torch.empty(rank, block_out, block_in, **where))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **where))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("weight", torch.empty(0, **where))
        # No buffer: it comes and goes in training, and code that pairs buffers (weight averaging) must not see that.
        self.dead_blocks = None
        if not self.s.is_meta:  # there it draws nothing, slowly
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws factors that give W the variance of `nn.Linear`, `1 / (3 * in_features)`, and a bias as there."""
        if self.s.is_meta:
            return  # nothing to draw, and torch takes milliseconds over it, which is most of loading a small model
        self.reset_factors(1 / (3 * self.in_features))
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def reset_factors(self, variance: float) -> None:
        """Draws a "balanced" random start: S = 1 and `std(A) = std(B) = (variance / rank) ** (1/4)`.

        Args:
            variance: Wanted variance of the entries of W.
        """
        std = balanced_std(self.rank, variance)
        self.dead_blocks = None
        nn.init.ones_(self.s)
        nn.init.normal_(self.a, std=std)
        nn.init.normal_(self.b, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` to `[..., out_features]`."""
        if self.folded is not None and x.shape[-1:] == (self.in_features,) and self._may_use_fold():
            return self.folded(x, self.b, self.bias)
        return kron_linear(x, self.masked_s(), self.a, self.b, self.bias)

    def masked_s(self) -> Tensor:
        """S under the frozen mask: dead entries are zero and get no gradient."""
        return self.s if self.dead_blocks is None else self.s.masked_fill(laid_out_as(self.dead_blocks, self.s), 0.0)

    def dense_weight(self) -> Tensor:
        """The weight W it stands for, `[out_features, in_features]`, differentiable."""
        return kron_weight(self.masked_s(), self.a, self.b)

    @property
    def block_mask(self) -> Tensor:
        """Which blocks of W are alive, bool `[O, I]`. If S is sharded (FSDP2) all processes must ask."""
        alive = gather([self.s])[0] != 0
        return alive if self.dead_blocks is None else alive & ~self.dead_blocks.to(alive.device)

    @property
    def sparsity(self) -> float:
        """Share of zero blocks, in [0, 1]."""
        return 1.0 - self.block_mask.float().mean().item()

    @torch.no_grad()
    def freeze_mask(self, dead: Tensor | None = None) -> None:
        """Makes zeros of S permanent: masked in the forward, without gradient, zero in what is saved.

        Args:
            dead: bool `[O, I]`, True where S becomes zero and stays so. None is every present zero, those of a mask
                frozen before among them; if S is sharded (FSDP2), all processes must then call this together.

        Raises:
            ValueError: `dead` has another shape or dtype.
        """
        if dead is None:
            dead = ~self.block_mask
        elif dead.shape != self.s.shape or dead.dtype != torch.bool:
            raise ValueError(
                f"KronLinear.freeze_mask: dead must be bool of shape {list(self.s.shape)}, got {dead.dtype} of shape "
                f"{list(dead.shape)}"
            )
        self.dead_blocks = dead.to(self.s.device, copy=True) if bool(dead.any()) else None
        self._zero_dead_blocks()

    def unfreeze_mask(self) -> None:
        """Lifts the frozen mask: zeros of S are ordinary values again, which training may move."""
        self._zero_dead_blocks()
        self.dead_blocks = None

    def fold(self, tokens: int = 4096, keep_weight: bool = False) -> Self:
        """Folds S into A for evaluation, without all-zero block rows and columns; see `fold_for_inference`.

        Raises:
            ValueError: The layer is in training mode, or its factors are sharded, on meta, or made in inference mode.
        """
        if self.training:
            raise ValueError("KronLinear.fold: the layer is in training mode; call eval() first")
        if self.s.is_meta or is_sharded(self.s):
            raise ValueError("KronLinear.fold: its factors are on the meta device or sharded; gather them first")
        self.folded = fold(self.s, self.a, self.b, self.dead_blocks, tokens=tokens, keep_weight=keep_weight)
        return self

    def _may_use_fold(self) -> bool:
        """A compiled model would not see later changes of the factors; an exported one is a picture of them anyway."""
        if self.folded is None or torch.compiler.is_dynamo_compiling():
            return False
        if torch.compiler.is_exporting():  # with other tensors in the places of the parameters
            return self.folded.is_current()
        if torch.is_grad_enabled():
            return False
        if not self.folded.is_of((self.s, self.a, self.b, self.dead_blocks)):
            self.folded = None
        return self.folded is not None

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; training lifts what `fold` did."""
        if mode:
            self.folded = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are not folded: a fold belongs to the very tensors that it was made from."""
        return {key: value for key, value in self.__dict__.items() if key != "folded"}

    @torch.no_grad()
    def _zero_dead_blocks(self) -> None:
        """Puts dead entries of S back to zero should an optimizer's momentum or noise have moved them."""
        if self.dead_blocks is None or self.s.is_meta:
            return
        s, dead = local(self.s), shard_of(self.dead_blocks, self.s)
        if bool((s[dead] != 0).any()):
            s.masked_fill_(dead, 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.folded = None
        super()._apply(fn, recurse)
        if self.dead_blocks is not None:
            self.dead_blocks = fn(self.dead_blocks)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._zero_dead_blocks()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_sharded(self.s):  # Accelerate takes every entry of a sharded state dict for a DTensor
            del destination[f"{prefix}weight"]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.folded = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        missing_keys: list[str] = args[2]
        if f"{prefix}weight" in missing_keys:  # Accelerate's files leave it out, as empty tensors share an address
            missing_keys.remove(f"{prefix}weight")
            self.weight = local(self.s).new_empty(0)  # it may have been on meta
        if prefix + "s" in state_dict and not self.s.is_meta:
            self.dead_blocks = None  # the zeros of the loaded S alone
            self.freeze_mask()

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int | tuple[int, int], rank: int) -> Self:
        """The nearest Kronecker layer to a dense one in the Frobenius norm; exact at full rank. S starts at one.

        Raises:
            ValueError: The weight holds NaN or infinite values.
        """
        if not bool(torch.isfinite(linear.weight).all()):
            raise ValueError("KronLinear.from_linear: the weight holds NaN or infinite values")
        layer = cls.like(linear, block_size, rank)
        with torch.no_grad():
            a, b, _ = nearest_kronecker(linear.weight, layer.block_size, rank)
            layer.a.copy_(a)
            layer.b.copy_(b)
        return layer

    @classmethod
    def like(cls, linear: nn.Linear, block_size: int | tuple[int, int], rank: int) -> Self:
        """A randomly initialised layer with the sizes, device, dtype, mode and bias (copied) of a dense one."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            block_size,
            rank,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer with the same function, device and dtype; its weight is trainable if a factor is."""
        where: dict[str, Any] = {"device": self.s.device, "dtype": self.s.dtype}
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, **where)
        linear.weight.copy_(self.dense_weight())
        linear.weight.requires_grad_(any(factor.requires_grad for factor in (self.s, self.a, self.b)))
        if self.bias is not None:
            linear.bias.copy_(self.bias)
            linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """The sizes, as `nn.Linear` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
