"""What a model gives in the end, and how far another one is from that."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kron_hf.calibration.batches import Batch
from kron_hf.calibration.passes import Finish, all_tensors, hooked, run
from kron_hf.calibration.token_weights import TokenWeights

__all__ = ["Features", "model_features"]


def model_features(model: nn.Module, batch: Batch, module: nn.Module | None) -> list[Tensor]:
    """The floating point tensors that a module in a model gives for a batch; the model, if it does not call it."""
    found: list[Any] = []

    def see(output: Any) -> None:
        found.append(output)
        raise Finish

    with hooked(after={} if module is None else {module: see}):
        output = run(model, batch)
    tensors = all_tensors(found[0] if found else output)
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.ndim]


class Features:
    """The features of the first batches, to compare others with.

    Args:
        module: The module whose output tensors are the features, such as the backbone of a classifier. What changes
            the first of them is judged by that one, else by the next: layers of a second tower, for instance.
        model: The model around it, which takes the batches.
        batches: They.
        token_weights: How much each token counts.

    Raises:
        ValueError: The output holds no floating point tensor.
    """

    def __init__(
        self, model: nn.Module, module: nn.Module, batches: Sequence[Batch], token_weights: TokenWeights
    ) -> None:
        self.model, self.module, self.batches, self.token_weights = model, module, batches, token_weights
        self.wanted = [self._features(batch) for batch in batches]
        if not all(self.wanted):
            raise ValueError(
                f"{type(model).__name__}: its output holds no floating point tensor, so nothing tells how much an "
                "error matters; give block_size and rank in place of a budget"
            )
        self.variances = [
            [self._variance(batch, features) for features in wanted]
            for batch, wanted in zip(batches, self.wanted, strict=True)
        ]

    def relative_error(self, index: int) -> float:
        """`sum w ||f - f_dense||^2` of the model as it is now on batch number `index`, over the variance of f_dense."""
        batch = self.batches[index]
        found = zip(self._features(batch), self.wanted[index], self.variances[index], strict=True)
        for features, wanted, variance in found:
            error = float(self._weighted(batch, features, (features - wanted).square().sum(-1))) / variance
            if error != 0:
                return error
        return 0.0

    def _features(self, batch: Batch) -> list[Tensor]:
        tensors = model_features(self.model, batch, self.module)
        return [(tensor if tensor.ndim > 1 else tensor[:, None]).double() for tensor in tensors]

    def _variance(self, batch: Batch, features: Tensor) -> float:
        mean = features.flatten(0, -2).mean(0)
        return float(self._weighted(batch, features, (features - mean).square().sum(-1))) or 1.0

    def _weighted(self, batch: Batch, features: Tensor, each: Tensor) -> Tensor:
        weights = self.token_weights(batch, features)
        return each.sum() if weights is None else (each.flatten() * weights.to(each)).sum()
