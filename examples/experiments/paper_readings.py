"""Published counts of the paper (Table 3), and what one may have to count to get them.

The paper does not say how it counts. A reading is one way of counting, applied to the same architectures; it fits if it
gives the published figure to its last printed digit. Many are tried, so that a fit to a figure of two digits says
little, one to four digits more, and one way that fits several figures most.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from kron_hf.factors import kron_flops

__all__ = ["PUBLISHED", "Published", "Reading", "Trace", "fits", "readings", "trace"]

UNITS = {"M": 1e6, "G": 1e9}


class Published(NamedTuple):
    """A figure of the paper, as it is printed there."""

    model: str
    what: str
    printed: str


PUBLISHED = [
    Published("ViT-tiny", "dense parameters", "5.5M"),
    Published("ViT-tiny", "dense training FLOPs", "2.16G"),
    Published("ViT-tiny", "trained parameters", "0.16M"),
    Published("ViT-tiny", "training FLOPs", "65.37M"),
    Published("Swin-tiny", "dense parameters", "27.6M"),
    Published("Swin-tiny", "dense training FLOPs", "26.18G"),
    Published("Swin-tiny", "trained parameters", "5.3M"),
    Published("Swin-tiny", "training FLOPs", "167.33M"),
    Published("ViT-base", "dense parameters", "87.34M"),
    Published("ViT-base", "trained parameters", "11.58M"),
]


class Reading(NamedTuple):
    """One way of counting, in words, and what it gives."""

    words: str
    count: int


class Linear(NamedTuple):
    """An `nn.Linear` in a forward: sizes, tokens that pass through it, and whether our defaults convert it."""

    out_features: int
    in_features: int
    bias: int
    tokens: int
    is_projection: bool


@dataclass
class Trace:
    """What happens in the forward of a dense model for one image; FLOPs with 2 a multiply-add, or entries.

    Attributes:
        labels: Classes of its head, and how many heads there are.
        parameters: Entries of all parameters.
        known_parameters: Entries of the parameters of convolutions and layer norms.
        linears: All of them.
        attention: FLOPs of queries with keys and of their softmax with values.
        convolution: FLOPs.
        convolution_bias: Entries that a bias is added to.
        norm: Entries that are normalised.
        gelu: Entries.
        softmax: Entries.
        pooling: Entries that are averaged.
    """

    labels: str
    parameters: int = 0
    known_parameters: int = 0
    linears: list[Linear] = field(default_factory=list)
    attention: int = 0
    convolution: int = 0
    convolution_bias: int = 0
    norm: int = 0
    gelu: int = 0
    softmax: int = 0
    pooling: int = 0

    def chosen(self, every_linear: bool) -> list[Linear]:
        """The linears that become Kronecker layers."""
        return [linear for linear in self.linears if every_linear or linear.is_projection]

    @property
    def linear_flops(self) -> int:
        """Of all linears, dense."""
        return sum(2 * linear.tokens * linear.out_features * linear.in_features for linear in self.linears)

    def by_modules(self, linears: int) -> int:
        """Forward FLOPs as thop 0.1 counts them: modules that it knows, 4 multiply-adds an entry of a layer norm."""
        return self.convolution + linears + 2 * 4 * self.norm

    def by_functions(self, linears: int) -> int:
        """Forward FLOPs as calflops and DeepSpeed count them: functions that they know, 5 an entry of a layer norm."""
        elementwise = self.convolution_bias + 5 * self.norm + self.gelu + self.softmax + self.pooling
        return self.convolution + linears + elementwise


def fits(published: Published, count: int) -> bool:
    """Whether the count, rounded as the figure is printed, is the figure."""
    number, unit = published.printed[:-1], published.printed[-1]
    decimals = len(number.partition(".")[2])
    return f"{count / UNITS[unit]:.{decimals}f}" == number


def trace(model: PreTrainedModel, labels: str, projections: set[str]) -> Trace:
    """Follows one forward of a dense model on the meta device; needs `attn_implementation="eager"`."""
    seen = Trace(labels, parameters=sum(parameter.numel() for parameter in model.parameters()))
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.LayerNorm):
            seen.known_parameters += sum(parameter.numel() for parameter in module.parameters())
        hook = _hook(seen, module, is_projection=name in projections)
        handles.append(module.register_forward_hook(hook))
    config: Any = model.config
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, config.image_size, config.image_size, device="meta"))
    for handle in handles:
        handle.remove()
    return seen


def _hook(seen: Trace, module: nn.Module, is_projection: bool) -> Any:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        if isinstance(module, nn.Linear):
            bias = 0 if module.bias is None else module.bias.numel()
            tokens = inputs[0].numel() // module.in_features
            seen.linears.append(Linear(module.out_features, module.in_features, bias, tokens, is_projection))
        elif isinstance(module, nn.Conv2d):
            seen.convolution += 2 * output.numel() * module.weight[0].numel()
            seen.convolution_bias += output.numel()
        elif isinstance(module, nn.LayerNorm):
            seen.norm += output.numel()
        elif isinstance(module, nn.AdaptiveAvgPool1d):
            seen.pooling += inputs[0].numel()
        elif type(module).__name__ == "GELUActivation":
            seen.gelu += output.numel()
        elif hasattr(module, "q_proj"):
            context, softmax = output  # [..., tokens, heads * head_size], [..., heads, tokens, tokens]
            seen.softmax += softmax.numel()
            seen.attention += 2 * 2 * softmax.numel() * context.shape[-1] // softmax.shape[1]

    return hook


def readings(what: str, traces: list[Trace]) -> list[Reading]:
    """All ways of counting that are tried for a figure."""
    ways = {
        "dense parameters": _dense_parameters,
        "dense training FLOPs": _dense_flops,
        "trained parameters": _trained_parameters,
        "training FLOPs": _flops,
    }
    return [Reading(f"{words}; {seen.labels}", count) for seen in traces for words, count in ways[what](seen)]


def _dense_parameters(seen: Trace) -> Iterator[Reading]:
    linears = sum(linear.out_features * linear.in_features + linear.bias for linear in seen.linears)
    yield Reading("all parameters", seen.parameters)
    yield Reading("what module counters know: convolutions, layer norms, linears", seen.known_parameters + linears)


def _dense_flops(seen: Trace) -> Iterator[Reading]:
    linears = seen.linear_flops
    yield from _times("by modules, without attention's products", seen.by_modules(linears))
    yield from _times("by functions, without attention's products", seen.by_functions(linears))
    yield from _times("linears and convolution", linears + seen.convolution)
    yield from _times("linears, convolution and attention", linears + seen.convolution + seen.attention)


def _flops(seen: Trace) -> Iterator[Reading]:
    yield from _times("by modules, no Kronecker layer seen, every linear being one", seen.by_modules(0))
    yield from _times("by functions, no Kronecker layer seen, every linear being one", seen.by_functions(0))
    for every_linear, block, rank in product([False, True], [2, 4, 8], [1, 2, 4]):
        chosen = seen.chosen(every_linear)
        setting = f"{_chosen_words(every_linear)}, {block} x {block}, rank {rank}"
        each = [
            (linear.tokens, kron_flops(linear.out_features, linear.in_features, (block, block), rank))
            for linear in chosen
        ]
        converted = sum(tokens * flops for tokens, flops in each)
        dense = sum(2 * linear.tokens * linear.out_features * linear.in_features for linear in chosen)
        yield from _times(f"Kronecker layers alone, an image: {setting}", converted)
        yield from _times(f"Kronecker layers alone, a token: {setting}", sum(flops for _, flops in each))
        whole = converted + seen.linear_flops - dense + seen.convolution
        yield from _times(f"all but attention's products: {setting}", whole)
        yield from _times(f"all: {setting}", whole + seen.attention)


def _trained_parameters(seen: Trace) -> Iterator[Reading]:
    yield Reading("what module counters know, every linear being a Kronecker layer", seen.known_parameters)
    for every_linear, block, rank in product([False, True], [2, 4, 8], [1, 2, 4]):
        chosen = seen.chosen(every_linear)
        setting = f"{_chosen_words(every_linear)}, {block} x {block}, rank {rank}"
        dense = sum(linear.out_features * linear.in_features for linear in chosen)
        s, b = dense // block**2, rank * block**2 * len(chosen)
        others = seen.parameters - dense
        yield Reading(f"all parameters: {setting}", others + (1 + rank) * s + b)
        yield Reading(f"all parameters, S folded into A: {setting}", others + rank * s + b)
        yield Reading(f"S, A and B alone: {setting}", (1 + rank) * s + b)
        yield Reading(f"A and B alone: {setting}", rank * s + b)
        yield Reading(f"half of S and A (50 % sparsity), and B: {setting}", (1 + rank) * s // 2 + b)
        yield Reading(f"half of A (50 % sparsity), and B: {setting}", rank * s // 2 + b)


def _times(words: str, forward: int) -> Iterator[Reading]:
    """Multiply-adds or FLOPs, of a forward or of a training step."""
    yield Reading(f"forward multiply-adds, {words}", forward // 2)
    yield Reading(f"forward FLOPs, {words}", forward)
    yield Reading(f"3 x forward multiply-adds, {words}", 3 * forward // 2)
    yield Reading(f"3 x forward FLOPs, {words}", 3 * forward)


def _chosen_words(every_linear: bool) -> str:
    return "every linear" if every_linear else "attention and MLP projections"
