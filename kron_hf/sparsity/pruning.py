"""Which blocks to prune: importance, the cubic schedule, and the choice over all layers.

The schedule is that of Zhu and Gupta, "To prune, or not to prune" (2017), arXiv 1710.01878. The importance of block
(j, l) is the root mean square of its n entries, `|s_jl| * || sum_i a_i,jl B_i ||_F / sqrt(n)`: unlike `|s_jl|` it does
not change when S is rescaled against A, and blocks of different sizes, of linears and of convolutions, compare.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor, nn

from kron_hf.factors import block_norms
from kron_hf.kron_layer import KronLayer
from kron_hf.sharding import gather

__all__ = [
    "SCOPES",
    "Regroup",
    "block_entries",
    "block_masks",
    "check_reachable",
    "choose_blocks",
    "choose_dead",
    "cubic_sparsity",
    "gather_factors",
    "importance",
    "kron_layers",
    "layer_quotas",
    "model_sparsity",
    "required_entries",
    "share_of_entries",
]

SCOPES = ("global", "layer")

Regroup = Callable[[Tensor], Tensor]


def kron_layers(model: nn.Module) -> list[KronLayer]:
    """The Kronecker layers of a model in module order, each once, also inside DDP or `torch.compile`."""
    return [module for module in model.modules() if isinstance(module, KronLayer)]


def block_masks(layers: list[KronLayer]) -> list[Tensor]:
    """`block_mask` of each layer. If layers are sharded (FSDP2): one all-gather, all processes must call."""
    alive = [s != 0 for s in gather([layer.s for layer in layers])]
    return [
        mask if layer.dead_blocks is None else mask & ~layer.dead_blocks.to(mask.device)
        for layer, mask in zip(layers, alive, strict=True)
    ]


def gather_factors(layers: list[KronLayer]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """S, A and B of each layer, whole. If layers are sharded (FSDP2): one all-gather, all processes must call."""
    flat = gather([factor for layer in layers for factor in (layer.s, layer.a, layer.b)])
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def model_sparsity(model: nn.Module) -> float:
    """Share of the entries of all Kronecker weights that lie in blocks which are exactly zero, in [0, 1].

    If layers are sharded (FSDP2), all processes must call it.
    """
    layers = kron_layers(model)
    return share_of_entries(layers, [~alive for alive in block_masks(layers)])


def share_of_entries(layers: list[KronLayer], masks: Sequence[Tensor | None]) -> float:
    """Share of the entries of all weights that lie in the blocks `[O, I]` of the masks, None for no block."""
    total = sum(layer.s.numel() * block_entries(layer) for layer in layers)
    pairs = zip(layers, masks, strict=True)
    masked = sum(int(mask.sum()) * block_entries(layer) for layer, mask in pairs if mask is not None)
    return masked / total if total else 0.0


def cubic_sparsity(step: int, *, start_step: int, end_step: int, final: float, initial: float = 0.0) -> float:
    """Sparsity wanted after `step` optimizer steps: `final + (initial - final) * (1 - t) ** 3`.

    `t = (step - start_step) / (end_step - start_step)`, clamped to [0, 1] (Zhu and Gupta, 2017, eq. 1).
    """
    progress = min(max((step - start_step) / (end_step - start_step), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3


def layer_quotas(sizes: list[int], entries: list[int], dead: list[int], required: int) -> list[int]:
    """How many blocks of each layer shall be dead so that all layers lose the same share.

    Args:
        sizes: Blocks of each layer.
        entries: Entries of one block of each layer.
        dead: Blocks of each layer that are dead already and stay so.
        required: Entries that shall be dead over all layers.

    Returns:
        Counts with `dead <= count <= max(size - 1, dead)` whose entries reach `required` by less than one block
        (or stay at `dead` where that is more, and end with one block left in each layer where that is not enough).
        Rounding goes to the layers with the lowest share, earlier ones first.
    """
    caps = [max(size - 1, gone) for size, gone in zip(sizes, dead, strict=True)]

    def at(share: float) -> list[int]:
        return [min(max(int(share * n), gone), cap) for n, gone, cap in zip(sizes, dead, caps, strict=True)]

    def missing(counts: list[int]) -> int:
        return required - sum(count * each for count, each in zip(counts, entries, strict=True))

    low, high = 0.0, 1.0
    for _ in range(60):  # beyond the resolution of a float
        middle = (low + high) / 2
        low, high = (middle, high) if missing(at(middle)) >= 0 else (low, middle)
    counts = at(low)
    while missing(counts) > 0 and counts != caps:
        open_layers = [i for i, count in enumerate(counts) if count < caps[i]]
        counts[min(open_layers, key=lambda i: counts[i] / sizes[i])] += 1
    return counts


def check_reachable(sparsity: float, total: int, kept: int, layers: int) -> None:
    """Refuses a target that would take the last block of a layer.

    Args:
        sparsity: The target.
        total: Entries of all layers.
        kept: Entries of one block of each layer that has a living one.
        layers: Number of layers.

    Raises:
        ValueError: It would.
    """
    required = required_entries(sparsity, total)
    if required > total - kept:
        raise ValueError(
            f"target_sparsity={sparsity} needs {required} of {total} entries in zero blocks, "
            f"but with one block kept in each of the {layers} layers at most {total - kept} can be "
            f"(sparsity {(total - kept) / total:.4f})"
        )


def choose_dead(
    layers: list[KronLayer],
    always: list[Tensor | None],
    sparsity: float,
    scope: str,
    regroup: Regroup | None = None,
) -> list[Tensor]:
    """Masks `[O, I]` of the least important blocks, those of `always` first, that make up `sparsity`.

    `regroup` changes the importance `[O, I]` of a layer before the choice.

    Zeros of S beyond that are in the masks, too. If layers are sharded (FSDP2), all processes must call it; the masks
    are whole and the same on each of them.
    """
    factors = gather_factors(layers)
    scores = [importance(*each, mask) for each, mask in zip(factors, always, strict=True)]
    scores = scores if regroup is None else [regroup(score) for score in scores]
    chosen = choose_blocks(scores, [block_entries(layer) for layer in layers], sparsity, scope)
    return [mask.to(s.device) | (s == 0) for mask, (s, _, _) in zip(chosen, factors, strict=True)]


def choose_blocks(scores: list[Tensor], entries: list[int], sparsity: float, scope: str) -> list[Tensor]:
    """Masks of the blocks of lowest score that make up `sparsity`, within one block and without emptying a layer.

    Args:
        scores: Of the blocks of each layer, any shape, without NaN; -inf where a block is dead for good. Ties go by
            layer order and index.
        entries: Entries of one block of each layer.
        sparsity: Share of the entries of all layers that shall lie in chosen blocks.
        scope: One of `SCOPES`.

    Returns:
        Bool masks of the shapes of `scores`, on the device of the first.
    """
    flat = [score.flatten().to(scores[0].device) for score in scores]
    required = required_entries(sparsity, sum(n * len(score) for n, score in zip(entries, flat, strict=True)))
    choose = _choose_globally if scope == "global" else _choose_by_layer
    return [mask.view(score.shape) for mask, score in zip(choose(flat, entries, required), scores, strict=True)]


def _choose_globally(scores: list[Tensor], entries: list[int], required: int) -> list[Tensor]:
    flat, sizes = torch.cat(scores), [len(score) for score in scores]
    order = flat.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    best = torch.zeros_like(flat, dtype=torch.bool)
    for start, part in zip(accumulate([0, *sizes[:-1]]), rank.split(sizes), strict=True):
        best[start + int(part.argmax())] = True
    best &= flat > -math.inf
    order = order[~best[order]]  # the best living block of each layer is out of reach
    each = torch.tensor(entries, device=flat.device).repeat_interleave(torch.tensor(sizes, device=flat.device))
    before = each[order].cumsum(0) - each[order]  # entries dead once all blocks before this one are
    dead = torch.zeros_like(best)
    dead[order] = (before < required) | (flat[order] == -math.inf)
    return list(dead.split(sizes))


def _choose_by_layer(scores: list[Tensor], entries: list[int], required: int) -> list[Tensor]:
    already = [int((score == -math.inf).sum()) for score in scores]
    quotas = layer_quotas([len(score) for score in scores], entries, already, required)
    masks = [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    for mask, score, quota in zip(masks, scores, quotas, strict=True):
        mask[score.argsort(stable=True)[:quota]] = True
    return masks


def importance(s: Tensor, a: Tensor, b: Tensor, always_dead: Tensor | None) -> Tensor:
    """Root mean square of each block, `[O, I]`; -inf where it is dead for good, -1 where S happens to be zero.

    Zeros of S freeze with the rest at the end, so they must be the first to be chosen, also among ties.
    """
    rms = block_norms(s, a, b) / math.sqrt(b[0].numel())
    rms = rms.nan_to_num(nan=torch.finfo(rms.dtype).max).masked_fill(s == 0, -1.0)
    return rms if always_dead is None else rms.masked_fill(always_dead.to(rms.device), -math.inf)


def required_entries(sparsity: float, total: int) -> int:
    """Smallest number of entries that is at least the share `sparsity`, without rounding errors such as .57 * 100."""
    return math.ceil(Fraction(repr(float(sparsity))) * total)


def block_entries(layer: KronLayer) -> int:
    """Entries of one block of the weight, `bo * bi`; of a convolution times `kh * kw`."""
    return math.prod(layer.factor_shapes["b"][1:])
