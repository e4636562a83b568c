"""Linear probes: what the features of a backbone are good for.

`refit` is a new probe on the converted model's features, `kept` the dense model's own probe, unchanged.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

__all__ = ["Probe", "cls_features"]

Split = tuple[Tensor, Tensor]


class Probe:
    """A probe on the features of a dense model, to hold others against.

    Args:
        dense: The dense model.
        train: Images and labels to fit probes on.
        test: Images and labels to score them on.
    """

    def __init__(self, dense: nn.Module, train: Split, test: Split) -> None:
        self.train, self.test = train, test
        self.wanted = cls_features(dense, test[0])
        self.probe = _fit(cls_features(dense, train[0]), train[1])
        self.score = self.probe.score(self.wanted, test[1])

    def measure(self, model: nn.Module) -> "Kept":
        """What another model keeps."""
        features = cls_features(model, self.test[0])
        refit = _fit(cls_features(model, self.train[0]), self.train[1])
        spread = (self.wanted - self.wanted.mean(0)).square().sum()
        return Kept(
            refit=refit.score(features, self.test[1]),
            kept=self.probe.score(features, self.test[1]),
            feature_error=float(((features - self.wanted).square().sum() / spread).sqrt()),
        )


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Accuracies of the two probes, and the relative error of the CLS features."""

    refit: float
    kept: float
    feature_error: float


@torch.no_grad()
def cls_features(model: nn.Module, images: Tensor) -> Tensor:
    """Features of the first token, `[N, width]`."""
    model.eval()
    return torch.cat([model(pixel_values=part).last_hidden_state[:, 0].float() for part in images.split(100)])


def _fit(features: Tensor, labels: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 iterations are part of what is measured
        return LogisticRegression(C=0.05, max_iter=300).fit(features.numpy(), labels.numpy())
