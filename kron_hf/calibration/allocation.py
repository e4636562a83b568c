"""Which option each layer becomes under a budget: a multiple-choice knapsack, by sensitivity times error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kron_hf.calibration.knapsack import Choices, cheapest_cost, least_loss
from kron_hf.calibration.menu import Option

__all__ = ["LayerChoices", "allocate", "predicted_loss"]


@dataclass(frozen=True)
class LayerChoices:
    """What a layer may become, and what that would do to it.

    Attributes:
        name: Name of the layer.
        options: Its options, dense among them.
        errors: Of each, the relative squared error of the layer's outputs on held-out data,
            `||y - yhat||^2 / ||y - mean(y)||^2`; 0 for dense.
        sensitivity: How much the model's output suffers per unit of that error.
    """

    name: str
    options: list[Option]
    errors: list[float]
    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        dense = sum(option.is_dense for option in self.options)
        if len(self.options) != len(self.errors) or dense != 1:
            raise ValueError(
                f"{self.name}: needs an error for each option and dense once among them, got {len(self.options)} "
                f"options, {dense} of them dense, and {len(self.errors)} errors"
            )
        for what, values in (("sensitivity", [self.sensitivity]), ("errors", self.errors)):
            for value in values:
                if not 0 <= value < math.inf:
                    raise ValueError(f"{self.name}: {what} must be finite and not negative, got {value}")

    @property
    def dense(self) -> Option:
        """The option to stay as it is."""
        return next(option for option in reversed(self.options) if option.is_dense)  # menus have it last


def allocate(
    layers: Sequence[LayerChoices],
    *,
    target_params: float | None = None,
    target_flops: float | None = None,
    max_error: float | None = None,
    flops_weight: float = 0.0,
) -> dict[str, Option]:
    """Chooses an option for every layer, by its name.

    With `target_params` or `target_flops`: the least `sum_l sensitivity_l * error_l` with a cost of at most that share
    of the dense cost, summed over the layers, as `knapsack.least_loss` finds it. A larger budget never gives a larger
    sum. With `max_error`: in every layer the cheapest option with `sqrt(error) <= max_error`.

    `flops_weight` w mixes the other cost in: `mixed = cost share + w * other share`, of the dense costs of all layers.
    Under a budget an option is offered only if none of the same layer with less of the mixture has as small an error;
    the budget itself always limits what it names. With `max_error` the mixture (of parameters, with w FLOPs) is the
    cost.

    Args:
        layers: The layers.
        target_params: Share in (0, 1] of the dense layers' parameters, biases included.
        target_flops: Share in (0, 1] of the dense layers' FLOPs.
        max_error: Largest relative error of a layer's outputs, the root of `LayerChoices.errors`.
        flops_weight: The weight w, at least 0.

    Raises:
        ValueError: Not exactly one of the three is given, or no choice meets the budget: names the smallest that can.
    """
    targets = {"target_params": target_params, "target_flops": target_flops, "max_error": max_error}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1 or not layers:
        raise ValueError(f"give layers and exactly one of {', '.join(targets)}, got {given} for {len(layers)} layers")
    with torch.device("cpu"):  # numbers of options: no work for what torch may default to
        chosen = _choose(layers, *given.popitem(), flops_weight)
    return {layer.name: layer.options[index] for layer, index in zip(layers, chosen, strict=True)}


def _choose(layers: Sequence[LayerChoices], name: str, share: float, flops_weight: float) -> list[int]:
    costs, mixed, total = _costs(layers, of_flops=name == "target_flops", weight=flops_weight)
    if name == "max_error":
        return [_cheapest_within(share, layer, cost) for layer, cost in zip(layers, mixed, strict=True)]
    choices = [_offered(*parts) for parts in zip(layers, costs, mixed, strict=True)]
    budget = math.floor(share * total * (1 + 1e-12))  # 0.29 * 100 is a little less than 29
    if (least := cheapest_cost(choices)) > budget:
        raise ValueError(
            f"{name}={share:g} is below the smallest that the options of the {len(layers)} layers can reach: "
            f"{_rounded_up(least / total)}"
        )
    return least_loss(choices, budget)


def predicted_loss(layers: Sequence[LayerChoices], chosen: dict[str, Option]) -> float:
    """`sum_l sensitivity_l * error_l` of a choice."""
    return math.fsum(layer.sensitivity * layer.errors[layer.options.index(chosen[layer.name])] for layer in layers)


def _costs(layers: Sequence[LayerChoices], of_flops: bool, weight: float) -> tuple[list[Tensor], list[Tensor], int]:
    """Of each layer's options what is limited and the mixture of its share with the other's; what all dense cost."""
    params = [torch.tensor([option.params for option in layer.options]) for layer in layers]
    flops = [torch.tensor([option.flops for option in layer.options]) for layer in layers]
    total, whole = sum(layer.dense.params for layer in layers), sum(layer.dense.flops for layer in layers)
    named, other = params, flops
    if of_flops:
        named, other, total, whole = flops, params, whole, total
    mixed = [a.double() / total + b.double() * (weight / whole) for a, b in zip(named, other, strict=True)]
    return named, mixed, total


def _cheapest_within(max_error: float, layer: LayerChoices, costs: Tensor) -> int:
    errors = torch.tensor(layer.errors, dtype=torch.float64).sqrt()
    return int(torch.where(errors <= max_error, costs, math.inf).argmin())


def _offered(layer: LayerChoices, costs: Tensor, mixed: Tensor) -> Choices:
    """Options that none with less of the mixture equals, and of those the ones that none with less cost equals."""
    losses = torch.tensor(layer.errors, dtype=torch.float64) * layer.sensitivity
    kept = _undominated(mixed, costs, losses)
    kept = kept[_undominated(costs[kept], mixed[kept], losses[kept])]
    return Choices(kept, costs[kept], losses[kept])


def _undominated(costs: Tensor, ties: Tensor, losses: Tensor) -> Tensor:
    """Indices, in the order of costs, of those with less loss than all that cost less; of equals the fewest `ties`."""
    order = torch.arange(len(costs))
    for key in (ties, losses, costs):  # each sort keeps the order of the one before among equals
        order = order[key[order].argsort(stable=True)]
    before = torch.cat([losses.new_full((1,), math.inf), losses[order].cummin(0).values[:-1]])
    return order[losses[order] < before]


def _rounded_up(share: float) -> str:
    """To four digits, upwards: a share that can be met."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 3)
    return f"{math.ceil(share / unit) * unit:.4g}"
