"""What a model gives in the end, and how far another one is from that."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kron_hf.calibration.batches import Batch
from kron_hf.calibration.passes import Finish, first_tensor, hooked, run
from kron_hf.calibration.token_weights import TokenWeights

__all__ = ["Features"]


class Features:
    """The features of the first batches, to compare others with.

    Args:
        module: The module whose first output tensor is the features, such as the backbone of a classifier.
        model: The model around it, which takes the batches.
        batches: They.
        token_weights: How much each token counts.
    """

    def __init__(
        self, model: nn.Module, module: nn.Module, batches: Sequence[Batch], token_weights: TokenWeights
    ) -> None:
        self.model, self.module, self.batches, self.token_weights = model, module, batches, token_weights
        self.wanted = [self._features(batch) for batch in batches]
        self.variance = self._variance()

    def relative_error(self, index: int) -> float:
        """`sum w ||f - f_dense||^2` of the model as it is now on batch number `index`, over the variance of f_dense."""
        batch, wanted = self.batches[index], self.wanted[index]
        difference = (self._features(batch) - wanted).square().sum(-1)
        return float(self._weighted(batch, wanted, difference)) / self.variance[index]

    def _features(self, batch: Batch) -> Tensor:
        found: list[Tensor] = []

        def see(output: Any) -> None:
            tensor = first_tensor(output)
            assert tensor is not None
            found.append(tensor.double())
            raise Finish

        with hooked(after={self.module: see}):
            run(self.model, batch)
        return found[0]

    def _variance(self) -> list[float]:
        result: list[float] = []
        for batch, features in zip(self.batches, self.wanted, strict=True):
            mean = features.flatten(0, -2).mean(0)
            spread = float(self._weighted(batch, features, (features - mean).square().sum(-1)))
            result.append(spread or 1.0)
        return result

    def _weighted(self, batch: Batch, features: Tensor, each: Tensor) -> Tensor:
        weights = self.token_weights(batch, features)
        return each.sum() if weights is None else (each.flatten() * weights.to(each)).sum()
