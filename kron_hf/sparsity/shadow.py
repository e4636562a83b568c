"""Straight-through regrowth: what S would be without its mask, kept while the mask hides it.

The straight-through estimator (Bengio, Leonard, Courville, 2013, arXiv 1308.3432, for sparse weights: Lin et al., 2020,
arXiv 2006.07253) trains a dense S~ with the gradient at the masked S: forward with `S = mask * S~`, then
`S~ <- S~ - step(dL/dS)`. Here S is always the masked one, so that whatever reads the model (evaluation, checkpoints,
averages, other processes) sees what the forward computes, and no layer knows of it. S at zero gets the very gradient
dL/dS; what the optimizer adds to a masked entry moves into the shadow, `shadow <- shadow + S`, `S <- 0`. That is S~
for every optimizer whose step does not depend on the value, so Adam and SGD; weight decay passes masked entries by.

The shadow lies in the optimizer's state of S, as float32 master weights do: so it is sharded as S is, and saved and
loaded wherever the optimizer is. A mask hides S alone: the gradient of A is zero there, and A waits.
"""

import warnings

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from kron_hf.kron_layer import KronLayer
from kron_hf.sharding import is_sharded, local, scatter_from_first, shard_of
from kron_hf.sparsity.optimizer_state import group_of

__all__ = ["Shadow"]

KEY = "kron_shadow"


class Shadow:
    """The shadow of each S under one mask.

    Args:
        masks: A loaded state: of each layer the blocks it hides, whole on each process, bool `[O, I]`; None for none.
    """

    def __init__(self, masks: list[Tensor] | None = None) -> None:
        self.masks = masks or []
        self._to_check = masks is not None

    def collect(self, layers: list[KronLayer], optimizer: Optimizer) -> None:
        """After an optimizer step: moves what it added to masked entries of S into the shadow."""
        if self._to_check:
            self._to_check = False
            _spread(layers, optimizer)
            self._warn_if_lost(layers, optimizer)
        for layer, mask in zip(layers, self.masks, strict=False):
            s, hidden = local(layer.s), shard_of(mask, layer.s)
            if _may_keep(optimizer, layer.s):
                _shadow(optimizer, layer.s).add_(s.masked_fill(~hidden, 0.0))
            s.masked_fill_(hidden, 0.0)

    def reveal(self, layers: list[KronLayer], optimizer: Optimizer) -> None:
        """Puts S~ into S and forgets the masks."""
        for layer in layers:
            if KEY in optimizer.state.get(layer.s, {}):
                local(layer.s).add_(_shadow(optimizer, layer.s))
                del optimizer.state[layer.s][KEY]
        self.masks = []

    def hide(self, layers: list[KronLayer], masks: list[Tensor], optimizer: Optimizer) -> None:
        """Zeroes masked entries of S and keeps them.

        Raises:
            ValueError: The optimizer does not hold an S.
        """
        for layer in layers:
            group_of(optimizer, layer.s)
        self.masks = masks
        self.collect(layers, optimizer)

    def _warn_if_lost(self, layers: list[KronLayer], optimizer: Optimizer) -> None:
        pairs = zip(layers, self.masks, strict=False)
        if any(bool(mask.any()) and KEY not in optimizer.state.get(layer.s, {}) for layer, mask in pairs):
            warnings.warn(
                f"the state that the optimizer was loaded with has no {KEY!r}: masked blocks go on from zero, so this "
                "training does not repeat the one that it continues (FSDP2 loads none from a SHARDED_STATE_DICT)",
                stacklevel=2,
            )


def _spread(layers: list[KronLayer], optimizer: Optimizer) -> None:
    """After loading: torch loads FULL_STATE_DICTs of FSDP2 on the first process, and spreads what Adam itself makes."""
    for s in [layer.s for layer in layers if is_sharded(layer.s)]:
        state = optimizer.state[s]
        if KEY not in state or not is_sharded(state[KEY]):
            spread = scatter_from_first(state.get(KEY), s)
            if spread is not None:
                state[KEY] = spread


def _may_keep(optimizer: Optimizer, s: Tensor) -> bool:
    """Not before the first step of an S under Adam and its kin: they take any state for one that they have made."""
    return bool(optimizer.state.get(s)) or isinstance(optimizer, SGD)


def _shadow(optimizer: Optimizer, s: Tensor) -> Tensor:
    state = optimizer.state[s]
    if KEY not in state:
        state[KEY] = torch.zeros_like(s.detach())
    return local(state[KEY])
