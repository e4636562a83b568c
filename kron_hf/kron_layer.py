"""`KronLayer`: what all layers with a Kronecker-sparse weight have in common, their factors and the frozen mask."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from kron_hf.block_size import resolve_block_size
from kron_hf.factors import balanced_std, kron_flops, kron_weight, nearest_kronecker
from kron_hf.ops.autocast import without_autocast
from kron_hf.ops.folded import Folded
from kron_hf.sharding import gather, is_sharded, laid_out_as, local, shard_of

__all__ = ["KronLayer"]

DenseT = TypeVar("DenseT", nn.Linear, nn.Conv2d)


class KronLayer(nn.Module, ABC):
    r"""A layer with the weight `W = sum_i (S * A_i) (x) B_i` (paper, eq. 2) in place of a dense one.

    A zero of S makes a whole block of W zero. No dense weight is stored or trained.

    Args:
        weight_shape: Shape of W, `[out, in]` or `[out, in, kh, kw]`.
        block_size: `(bo, bi)`, or one int for square blocks; -1 in a pair is the whole dimension.
        rank: Number of Kronecker terms, r in the paper; at most `bo * bi`, times `kh * kw`.
        bias: Whether the layer has a bias.
        device: As in `nn.Linear`.
        dtype: As in `nn.Linear`.

    Attributes:
        weight_shape: Shape of W.
        block_size: `(bo, bi)`.
        rank: Number of Kronecker terms.
        out_blocks: O.
        in_blocks: I.
        s: Mask factor S, `[O, I]`.
        a: Factors A_i, `[rank, O, I]`.
        b: Block factors B_i, `[rank, bo, bi]` or `[rank, bo, bi, kh, kw]`.
        bias: `[out]` or None.
        weight: An empty buffer that follows the dtype and device of the layer. It serves code that reads
            `layer.weight.dtype`, and its shape makes loaders that do not know this layer fail; the weight itself is
            `dense_weight()`.
        dead_blocks: The frozen mask, bool `[O, I]`, True where a block must stay zero; None while no mask is frozen.
        folded: What evaluation computes with after `fold`; None otherwise.

    Raises:
        ValueError: The block does not divide the layer, or the rank is out of range.
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
        weight_shape: tuple[int, ...],
        block_size: int | tuple[int, int],
        rank: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        kind, (out_size, in_size, *kernel) = type(self).__name__, weight_shape
        if out_size < 1 or in_size < 1:
            raise ValueError(f"{kind}: it needs at least one input and one output, got {(out_size, in_size)} (out, in)")
        self.weight_shape = weight_shape
        self.block_size = resolve_block_size(block_size, out_size, in_size, kind)
        block_out, block_in = self.block_size
        largest = block_out * block_in * prod(kernel)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
            entries = "bo * bi * kh * kw" if kernel else "bo * bi"
            raise ValueError(f"{kind}: rank must be an int from 1 to {entries} = {largest}, got {rank!r}")
        self.rank = rank
        self.out_blocks, self.in_blocks = out_size // block_out, in_size // block_in
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, shape in self.factor_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **where)))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_size, **where)) if bias else None)
        self.register_buffer("weight", torch.empty(0, **where))
        # No buffer: it comes and goes in training, and code that pairs buffers (weight averaging) must not see that.
        self.dead_blocks = None
        if not self.s.is_meta:  # there it draws nothing, slowly
            self.reset_parameters()

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of S, A and B by their names, whatever has become of the parameters."""
        blocks = (self.out_blocks, self.in_blocks)
        return {"s": blocks, "a": (self.rank, *blocks), "b": (self.rank, *self.block_size, *self.weight_shape[2:])}

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """`(out, in, kernel entries, input positions)` of the dense layer, as `kron_flops` takes them."""
        out_size, in_size, *kernel = self.weight_shape
        return out_size, in_size, prod(kernel), self.input_positions

    @property
    def forward_flops(self) -> int:
        """Of the cheaper factored order, per token or position of the output; see `kron_flops`."""
        out_size, in_size, kernel, inputs = self.sizes
        return kron_flops(out_size, in_size, self.block_size, self.rank, kernel_entries=kernel, input_positions=inputs)

    @property
    def fan_in(self) -> int:
        """Inputs of one output, `in`, times `kh * kw`."""
        return prod(self.weight_shape[1:])

    @property
    @abstractmethod
    def input_positions(self) -> int:
        """Positions of the input for each one of the output: 1, or the product of a convolution's strides."""

    @abstractmethod
    def blank_dense(self, bias: bool, device: torch.device, dtype: torch.dtype) -> nn.Linear | nn.Conv2d:
        """A dense layer with the same sizes, not filled yet."""

    @abstractmethod
    def blank_twin(self, bias: bool) -> Self:
        """A layer with the same sizes on the meta device."""

    @classmethod
    @abstractmethod
    def like(
        cls,
        dense: Any,
        block_size: int | tuple[int, int],
        rank: int,
        *,
        bias: bool | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A randomly initialised layer with the sizes, dtype, mode and bias (copied) of a dense one.

        Args:
            dense: The dense layer.
            block_size: As for the class.
            rank: As for the class.
            bias: None is the dense layer's; False is none.
            device: None is the dense layer's.
        """

    @torch.no_grad()
    def take_from(self, dense: nn.Linear | nn.Conv2d) -> Self:
        """Takes the bias (a copy) and the mode of a dense layer; returns self."""
        if self.bias is not None and dense.bias is not None:
            self.bias.copy_(dense.bias)
        return self.train(dense.training)

    @abstractmethod
    def _fold(self, tokens: int, keep_weight: bool) -> Folded: ...

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws factors that give W the variance of the dense layer, `1 / (3 * fan_in)`, and a bias as there."""
        if self.s.is_meta:
            return  # nothing to draw, and torch takes milliseconds over it, which is most of loading a small model
        self.reset_factors(1 / (3 * self.fan_in))
        if self.bias is not None:
            bound = self.fan_in**-0.5
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

    def masked_s(self) -> Tensor:
        """S under the frozen mask: dead entries are zero and get no gradient."""
        return self.s if self.dead_blocks is None else self.s.masked_fill(laid_out_as(self.dead_blocks, self.s), 0.0)

    def dense_weight(self) -> Tensor:
        """The weight W it stands for, of shape `weight_shape`, differentiable; in its own dtype under autocast, too."""
        with without_autocast(self.s.device.type):
            return kron_weight(self.masked_s(), self.a, self.b)

    @abstractmethod
    def to_dense(self) -> nn.Linear | nn.Conv2d:
        """The dense layer with the same function, device and dtype; its weight is trainable if a factor is."""

    @torch.no_grad()
    def fill_dense(self, dense: DenseT) -> DenseT:
        """Gives a dense layer of the same sizes the weight, the bias, the mode and what is trained."""
        dense.weight.copy_(self.dense_weight())
        dense.weight.requires_grad_(any(factor.requires_grad for factor in (self.s, self.a, self.b)))
        if self.bias is not None and dense.bias is not None:
            dense.bias.copy_(self.bias)
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    @torch.no_grad()
    def fit_nearest(self, weight: Tensor) -> float:
        """Makes A and B those of the nearest weight in the Frobenius norm, with S = 1.

        Args:
            weight: `weight_shape`, finite.

        Returns:
            The retained energy, see `nearest_kronecker`.
        """
        a, b, retained = nearest_kronecker(weight, self.block_size, self.rank)
        self.dead_blocks = None
        nn.init.ones_(self.s)
        self.a.copy_(a)
        self.b.copy_(b)
        return retained

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
                f"{type(self).__name__}.freeze_mask: dead must be bool of shape {list(self.s.shape)}, got {dead.dtype} "
                f"of shape {list(dead.shape)}"
            )
        self.dead_blocks = dead.to(self.s.device, copy=True) if bool(dead.any()) else None
        self._zero_dead_blocks()

    def unfreeze_mask(self) -> None:
        """Lifts the frozen mask: zeros of S are ordinary values again, which training may move."""
        self._zero_dead_blocks()
        self.dead_blocks = None

    def fold(self, tokens: int = 4096, keep_weight: bool = False) -> Self:
        """Folds S into A for evaluation, without all-zero block rows and columns; see `fold_for_inference`.

        The same function where A and B are finite. Lifted by training mode, by writes, and by a call under autograd
        while a factor is trained.

        Raises:
            ValueError: The layer is in training mode, or its factors are sharded, on meta, or made in inference mode.
        """
        if self.training:
            raise ValueError(f"{type(self).__name__}.fold: the layer is in training mode; call eval() first")
        if self.s.is_meta or is_sharded(self.s):
            kind = type(self).__name__
            raise ValueError(f"{kind}.fold: its factors are on the meta device or sharded; gather them first")
        with without_autocast(self.s.device.type):
            self.folded = self._fold(tokens, keep_weight)
        return self

    def _usable_fold(self) -> Folded | None:
        """A compiled model would not see later changes of the factors; an exported one is a picture of them anyway."""
        folded = self.folded  # once: another thread may fold anew
        if folded is None or torch.compiler.is_dynamo_compiling():
            return None
        if torch.compiler.is_exporting():  # with other tensors in the places of the parameters
            return folded if folded.is_current() else None
        if torch.is_grad_enabled():
            if any(factor.requires_grad for factor in (self.s, self.a, self.b)):
                self.folded = None  # they may be trained, and torch does not notice the steps of fused optimizers
            return None
        if folded.is_of((self.s, self.a, self.b, self.dead_blocks)):
            return folded
        self.folded = None
        return None

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
        if self.dead_blocks is not None:  # it keeps its dtype, and from meta it has nothing to bring
            lost = self.dead_blocks.is_meta and not self.s.is_meta
            self.dead_blocks = None if lost else self.dead_blocks.to(self.s.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._zero_dead_blocks()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_sharded(self.s):  # Accelerate takes every entry of a sharded state dict for a DTensor
            del destination[f"{prefix}weight"]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.folded = None
        errors: list[str] = args[4]
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        missing_keys: list[str] = args[2]
        if f"{prefix}weight" in missing_keys:  # Accelerate's files leave it out, as empty tensors share an address
            missing_keys.remove(f"{prefix}weight")
            self.weight = local(self.s).new_empty(0)  # it may have been on meta
        if prefix + "s" in state_dict and not self.s.is_meta and len(errors) == before:
            self.dead_blocks = None  # the zeros of the loaded S alone
            self.freeze_mask()
