"""`KronCandidates`: a linear layer that is the sum of Kronecker layers, one for each candidate block size and rank."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from kron_hf.layers import KronLinear
from kron_hf.sharding import local

__all__ = ["KronCandidates", "candidate_key"]


def candidate_key(block_size: tuple[int, int], rank: int) -> str:
    """The name of a candidate inside its layer, as in state dicts: `"4x16_rank2"`."""
    return f"{block_size[0]}x{block_size[1]}_rank{rank}"


class KronCandidates(nn.Module):
    r"""Linear layer `y = x (sum_k W^k)^T + bias` (paper, section on choosing the block size).

    Each candidate k has factors of its own, `W^k = sum_i (S^k * A^k_i) (x) B^k_i`. A selection drops candidates until
    one is left, which `chosen()` gives back as a plain `KronLinear`.

    A dropped candidate takes no part in the forward. Freed, its parameters hold no entries any more (they stay
    parameters, so that an optimizer keeps its groups) and are left out of the state dict. Else (under DDP or FSDP2,
    which know the parameters' shapes) they are zero and get a gradient of zero. A state dict without a candidate's
    tensors drops it.

    Args:
        in_features: As in `nn.Linear`.
        out_features: As in `nn.Linear`.
        candidates: `(block_size, rank)` of each candidate, as for `KronLinear`; at least one.
        bias: Whether the layer has a bias; it is shared by the candidates.
        device: As in `nn.Linear`.
        dtype: As in `nn.Linear`.

    Attributes:
        candidates: The `KronLinear` of each candidate, without bias, by `candidate_key`.
        bias: `[out_features]` or None.
        weight: An empty buffer, as in `KronLinear`.

    Raises:
        ValueError: No candidate, two that are equal in this layer, or one that does not fit it.

    Example:
        >>> layer = KronCandidates(8, 4, [((2, 4), 1), ((4, 4), 2)])
        >>> layer.alive
        ['2x4_rank1', '4x4_rank2']
        >>> layer.drop("2x4_rank1")
        >>> layer.chosen()
        KronLinear(in_features=8, out_features=4, block_size=(4, 4), rank=2, bias=True)
    """

    bias: nn.Parameter | None
    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        candidates: Sequence[tuple[int | tuple[int, int], int]],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not candidates:
            raise ValueError("KronCandidates needs at least one candidate, got none")
        self.in_features, self.out_features = in_features, out_features
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.candidates = nn.ModuleDict()
        for block_size, rank in candidates:
            layer = KronLinear(in_features, out_features, block_size, rank, bias=False, **where)
            key = candidate_key(layer.block_size, rank)
            if key in self.candidates:
                raise ValueError(
                    f"KronCandidates: two candidates are blocks of {layer.block_size} at rank {rank} in a weight of "
                    f"shape {(out_features, in_features)} (out, in)"
                )
            self.candidates[key] = layer
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, **where))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("weight", torch.empty(0, **where))
        self._dropped: set[str] = set()
        self._muted: str | None = None
        if not self.weight.is_meta:
            self.reset_parameters()

    def layer(self, key: str) -> KronLinear:
        """The Kronecker layer of a candidate."""
        return cast(KronLinear, self.candidates[key])

    @property
    def keys(self) -> list[str]:
        """The names of all candidates, dropped ones among them, in their order."""
        return list(self.candidates)

    @property
    def alive(self) -> list[str]:
        """The names of the candidates that are not dropped, in their order."""
        return [key for key in self.candidates if key not in self._dropped]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws factors that together give W the variance of `nn.Linear`, and a bias as there."""
        self.reset_factors(1 / (3 * self.in_features))
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def reset_factors(self, variance: float) -> None:
        """Draws the factors of the living candidates, each with its share of the variance that W shall have."""
        for key in self.alive:
            self.layer(key).reset_factors(variance / len(self.alive))

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` to `[..., out_features]`."""
        active = [key for key in self.alive if key != self._muted]
        y = self.layer(active[0])(x) if active else x.new_zeros(*x.shape[:-1], self.out_features)
        for key in active[1:]:
            y = y + self.layer(key)(x)
        if self.bias is not None:
            y = y + self.bias
        gated = [factor for key in self.keys if key in self._dropped for factor in self.layer(key).parameters()]
        return _Untouched.apply(y, *gated) if gated and torch.is_grad_enabled() else y

    def dense_weight(self) -> Tensor:
        """The weight it stands for, `[out_features, in_features]`, differentiable."""
        return torch.stack([self.layer(key).dense_weight() for key in self.alive]).sum(0)

    @contextmanager
    def without(self, key: str) -> Iterator[None]:
        """The layer as if a candidate were dropped, for as long as the context lasts."""
        self._check_alive(key)
        self._muted = key
        try:
            yield
        finally:
            self._muted = None

    @torch.no_grad()
    def drop(self, key: str, *, free: bool = True) -> None:
        """Takes a candidate out of the sum for good.

        Args:
            key: Its name.
            free: Whether its memory is given back; not where something relies on the parameters' shapes (DDP, FSDP2).

        Raises:
            ValueError: There is no such living candidate, or it is the last one.
        """
        self._check_alive(key)
        if len(self.alive) == 1:
            raise ValueError(f"KronCandidates: {key!r} is the last candidate and cannot be dropped")
        self._dropped.add(key)
        for factor in self.layer(key).parameters():
            factor.grad = None
            if free:
                _empty(factor)
            else:
                local(factor).zero_()

    def chosen(self) -> KronLinear:
        """The last candidate as a plain layer; its parameters are the same objects.

        Raises:
            ValueError: More than one is left.
        """
        if len(self.alive) != 1:
            raise ValueError(f"KronCandidates: {len(self.alive)} candidates are left, {self.alive}; one can be chosen")
        layer = self.layer(self.alive[0])
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def _check_alive(self, key: str) -> None:
        if key not in self.alive:
            raise ValueError(f"KronCandidates: {key!r} is not one of the candidates left, {self.alive}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._drop_missing(state_dict, prefix)

    def _drop_missing(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        stored = [key for key in self.keys if f"{prefix}candidates.{key}.s" in state_dict]
        if stored:
            for key in self.alive:
                if key not in stored:
                    self.drop(key)

    @classmethod
    def like(cls, linear: nn.Linear, candidates: Sequence[tuple[int | tuple[int, int], int]]) -> "KronCandidates":
        """A randomly initialised layer with the sizes, device, dtype, mode and bias (copied) of a dense one."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            candidates,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    def extra_repr(self) -> str:
        """The sizes, as `nn.Linear` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Untouched(torch.autograd.Function):
    """Gives its first argument back, and the others a gradient of zero: reducers wait for one of each parameter."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)
        return grads[0], *zeros


def _empty(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.new_empty(0)
