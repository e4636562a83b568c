"""Accuracy for `evaluate.load`, without the Hub."""

from typing import Any

# On separate lines, plainly: evaluate reads the imports of a metric script with a regular expression.
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: lists of class indices of the same length.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        hits = sum(int(predicted == true) for predicted, true in zip(predictions, references, strict=True))
        return {"accuracy": hits / len(references)}
