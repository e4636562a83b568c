"""`KronCandidates`: a layer that is the sum of Kronecker layers, one for each candidate block size and rank."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kron_hf.kron_kinds import kron_kind
from kron_hf.kron_layer import KronLayer
from kron_hf.layers import KronLinear
from kron_hf.selection.stored_candidates import CANDIDATES, adapt_state_dict
from kron_hf.sharding import is_sharded, local

__all__ = ["KronCandidates", "candidate_key", "candidate_name", "converted_layers"]


def candidate_key(block_size: tuple[int, int], rank: int) -> str:
    """The name of a candidate inside its layer, as in state dicts: `"4x16_rank2"`."""
    return f"{block_size[0]}x{block_size[1]}_rank{rank}"


def candidate_name(layer_name: str, block_size: tuple[int, int], rank: int) -> str:
    """The name in the model of a candidate's Kronecker layer."""
    return f"{layer_name}.{CANDIDATES}.{candidate_key(block_size, rank)}"


class KronCandidates(nn.Module):
    r"""Linear layer `y = x (sum_k W^k)^T + bias` (paper, section on choosing the block size).

    Each candidate k has factors of its own, `W^k = sum_i (S^k * A^k_i) (x) B^k_i`. A selection drops candidates until
    one is left, which `chosen()` gives back as a plain `KronLinear`. `like` makes one for a convolution, too, the sum
    of `KronConv2d`s.

    A dropped candidate takes no part in the forward and is left out of the state dict. In one process it is freed: its
    parameters hold no entries any more and need no gradient, so that an optimizer made later has the groups of a model
    without it. Under DDP and FSDP2, which know the parameters' shapes, they become zero and get gradients of zero.

    A state dict says which candidates live: those without tensors in it are dropped, dropped ones come back. That of
    a plain `KronLinear`, which the layer was once before, leaves the candidate with its shapes.

    Args:
        in_features: As in `nn.Linear`.
        out_features: As in `nn.Linear`.
        candidates: `(block_size, rank)` of each candidate, as for `KronLinear`; at least one.
        bias: Whether the layer has a bias; it is shared by the candidates.
        device: As in `nn.Linear`.
        dtype: As in `nn.Linear`.

    Attributes:
        candidates: The `KronLinear` (or `KronConv2d`) of each candidate, without bias, by `candidate_key`.
        weight_shape: Shape of W, `[out, in]` or `[out, in, kh, kw]`.
        bias: `[out]` or None.
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
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        features = (in_features, out_features)
        self._hold([KronLinear(*features, size, rank, bias=False, **where) for size, rank in candidates], bias)

    def _hold(self, layers: Sequence[KronLayer], bias: bool) -> None:
        if not layers:
            raise ValueError("KronCandidates needs at least one candidate, got none")
        self.weight_shape = shape = layers[0].weight_shape
        out_name, in_name = ("out_channels", "in_channels") if shape[2:] else ("out_features", "in_features")
        setattr(self, out_name, shape[0])  # other code may read them of the layer that was there
        setattr(self, in_name, shape[1])
        self.candidates = nn.ModuleDict()
        for layer in layers:
            key = candidate_key(layer.block_size, layer.rank)
            if key in self.candidates:
                raise ValueError(
                    f"KronCandidates: two candidates are blocks of {layer.block_size} at rank {layer.rank} in a weight "
                    f"of shape {shape[:2]} (out, in)"
                )
            self.candidates[key] = layer
        self.register_parameter("bias", nn.Parameter(layers[0].s.new_zeros(shape[0])) if bias else None)
        self.register_buffer("weight", layers[0].weight.clone())
        self._dropped: set[str] = set()
        self._muted: set[str] = set()
        self.register_state_dict_post_hook(_leave_out_dropped)
        if not self.weight.is_meta:
            self.reset_parameters()

    def layer(self, key: str) -> KronLayer:
        """The Kronecker layer of a candidate."""
        return cast(KronLayer, self.candidates[key])

    def size(self, key: str) -> tuple[tuple[int, int], int]:
        """Block size and rank of a candidate."""
        return self.layer(key).block_size, self.layer(key).rank

    @property
    def shape_entry(self) -> list[int]:
        """`[out, in]`; of a convolution `[out, in, kernel entries, input positions]`, see `KronLayer.sizes`."""
        sizes = self.layer(self.keys[0]).sizes
        return list(sizes[: len(self.weight_shape)])

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
        fan_in = prod(self.weight_shape[1:])
        self.reset_factors(1 / (3 * fan_in))
        if self.bias is not None:
            bound = fan_in**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def reset_factors(self, variance: float) -> None:
        """Draws the factors of the living candidates, each with its share of the variance that W shall have."""
        for key in self.alive:
            self.layer(key).reset_factors(variance / len(self.alive))

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` to `[..., out_features]`; of a convolution as `KronConv2d`."""
        first, *others = self._active()
        y = self.layer(first)(x)
        for key in others:
            y = y + self.layer(key)(x)
        bias, untouched = self.bias, self._untouched()
        if untouched:
            zero = torch.stack([factor.flatten()[:0].sum() for factor in untouched]).sum()
            bias = zero if bias is None else bias + zero
        if bias is None:
            return y
        if bias.dim():  # no zero alone
            bias = bias.view(-1, *[1] * (len(self.weight_shape) - 2))
        return y + bias.to(y.dtype)  # autocast would make y a float32 here, nn.Linear does not

    def dense_weight(self) -> Tensor:
        """The weight it stands for, of shape `weight_shape`, differentiable."""
        first, *others = self._active()
        weight = self.layer(first).dense_weight()
        for key in others:
            weight = weight + self.layer(key).dense_weight()
        return weight

    def _active(self) -> list[str]:
        return [key for key in self.alive if key not in self._muted]

    def _untouched(self) -> list[nn.Parameter]:
        """Parameters of dropped candidates; reducers wait for a gradient of each."""
        if not torch.is_grad_enabled():
            return []
        factors = [factor for key in self.keys if key in self._dropped for factor in self.layer(key).parameters()]
        return [factor for factor in factors if factor.requires_grad and (factor.numel() or not _is_alone())]

    @contextmanager
    def without(self, key: str) -> Iterator[None]:
        """The layer as if a candidate were dropped, for as long as the context lasts.

        Raises:
            ValueError: There is no such living candidate, or no other.
        """
        self._check_droppable(key, self._active())
        self._muted.add(key)
        try:
            yield
        finally:
            self._muted.remove(key)

    @torch.no_grad()
    def drop(self, key: str, *, free: bool | None = None) -> None:
        """Takes a candidate out of the sum for good.

        Args:
            key: Its name.
            free: Whether its memory is given back; not where something relies on the parameters' shapes (DDP, FSDP2).
                None: if this is the only process.

        Raises:
            ValueError: There is no such living candidate, or it is the last one.
        """
        self._check_droppable(key, self.alive)
        self._dropped.add(key)
        self.layer(key).dead_blocks = None
        for factor in self.layer(key).parameters():
            factor.grad = None
            if free or (free is None and _is_alone() and not is_sharded(factor)):
                _resize(factor, (0,))
                factor.requires_grad_(False)  # so that an optimizer made later leaves it out
            else:
                local(factor).zero_()

    def restore(self, key: str) -> None:
        """Takes a dropped candidate back, its factors yet to be filled; nothing happens to one that lives."""
        if key in self._dropped:
            self._dropped.remove(key)
            self.layer(key).requires_grad_(True)
        for name, factor in self.layer(key).named_parameters():
            if factor.shape != (shape := self.layer(key).factor_shapes[name]):
                _resize(factor, shape)

    def chosen(self) -> KronLayer:
        """The last candidate as a plain layer; its parameters are the same objects.

        Raises:
            ValueError: More than one is left.
        """
        if len(self.alive) != 1:
            raise ValueError(f"KronCandidates: {len(self.alive)} candidates are left, {self.alive}; one can be chosen")
        last = self.layer(self.alive[0])
        layer = last.blank_twin(self.bias is not None)
        layer.s, layer.a, layer.b, layer.bias = last.s, last.a, last.b, self.bias
        layer.weight, layer.dead_blocks = self.weight, last.dead_blocks
        return layer.train(self.training)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear | nn.Conv2d:
        """The dense layer with the same function, device and dtype; its weight is trainable if a factor is."""
        factors = [factor for key in self.alive for factor in self.layer(key).parameters()]
        first = self.layer(self.alive[0])
        dense = first.blank_dense(self.bias is not None, factors[0].device, factors[0].dtype)
        dense.weight.copy_(self.dense_weight())
        dense.weight.requires_grad_(any(factor.requires_grad for factor in factors))
        if self.bias is not None and dense.bias is not None:
            dense.bias.copy_(self.bias)
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    def to_linear(self) -> nn.Linear:
        """`to_dense` of a layer that stands for a linear."""
        return cast(nn.Linear, self.to_dense())

    def _check_droppable(self, key: str, left: list[str]) -> None:
        if key not in left:
            raise ValueError(f"KronCandidates: {key!r} is not one of the candidates left, {left}")
        if len(left) == 1:
            raise ValueError(f"KronCandidates: {key!r} is the last candidate and cannot be dropped")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        missing_keys: list[str] = args[2]
        errors: list[str] = args[4]
        shapes = {key: self.layer(key).factor_shapes for key in self.keys}
        stored, error = adapt_state_dict(state_dict, prefix, shapes)
        if error:
            errors.append(error)
        for key in stored:
            self.restore(key)
        for key in self.alive if stored else []:
            if key not in stored:
                self.drop(key)
                self.layer(key).requires_grad_(False)  # DDP, which wraps models after loading, then ignores it
        for key in self._dropped:  # torch would miss their tensors
            state_dict.update(self.layer(key).state_dict(prefix=f"{prefix}{CANDIDATES}.{key}."))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}weight" in missing_keys:  # as in KronLinear
            missing_keys.remove(f"{prefix}weight")
            self.weight = local(self.layer(self.alive[0]).s).new_empty(0)

    @classmethod
    def like(
        cls,
        dense: nn.Linear | nn.Conv2d,
        candidates: Sequence[tuple[int | tuple[int, int], int]],
        *,
        device: torch.device | str | None = None,
    ) -> Self:
        """A randomly initialised layer with the sizes, device, dtype, mode and bias (copied) of a dense one.

        Args:
            dense: The dense layer, a convolution too.
            candidates: As for the class.
            device: None is the dense layer's.
        """
        kind = kron_kind(dense, cls.__name__)
        layer = cls.__new__(cls)  # __init__ takes the sizes of a linear
        nn.Module.__init__(layer)
        made = [kind.like(dense, size, rank, bias=False, device=device) for size, rank in candidates]
        layer._hold(made, dense.bias is not None)
        if layer.bias is not None and dense.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(dense.bias)
        return layer.train(dense.training)

    def extra_repr(self) -> str:
        """The sizes, as the dense layer shows them."""
        dropped = f", dropped={sorted(self._dropped)}" if self._dropped else ""
        out_size, in_size, *kernel = self.weight_shape
        sizes = f"in_channels={in_size}, out_channels={out_size}, kernel_size={tuple(kernel)}"
        if not kernel:
            sizes = f"in_features={in_size}, out_features={out_size}"
        return f"{sizes}, bias={self.bias is not None}{dropped}"


def converted_layers(model: nn.Module, remove_duplicate: bool = True) -> dict[str, KronLayer | KronCandidates]:
    """The layers of a model that stand in the place of dense ones, by their names; not the candidates inside of one."""
    named = model.named_modules(remove_duplicate=remove_duplicate)
    found = {name: module for name, module in named if isinstance(module, KronLayer | KronCandidates)}
    inner = {id(layer) for module in found.values() if isinstance(module, KronCandidates) for layer in module.modules()}
    return {
        name: module for name, module in found.items() if isinstance(module, KronCandidates) or id(module) not in inner
    }


def _leave_out_dropped(layer: KronCandidates, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    gone = tuple(f"{prefix}{CANDIDATES}.{key}." for key in layer.keys if key not in layer.alive)
    for name in [name for name in state_dict if name.startswith(gone)]:
        del state_dict[name]
    if is_sharded(layer.layer(layer.alive[0]).s):  # as in KronLinear
        state_dict.pop(f"{prefix}weight", None)


def _is_alone() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def _resize(parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
    parameter.data = parameter.data.new_empty(shape)
