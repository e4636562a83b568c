"""Which parts a distillation loss has, and their weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PARTS", "DistillationConfig"]

PARTS = ("logits", "tokens", "cls", "hidden", "task")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Weights of the parts of a `DistillationLoss`, and their options.

    A weight of None is 1 where both models give the part, and leaves it out where one does not. A number asks for the
    part: a model that cannot give it is an error. 0 leaves it out.

    AdamW with a learning rate of about 1e-5 and gradients clipped to norm 1 (what `TrainingArguments` do) suits a
    student that was calibrated, as it suits the fine-tuning of a trained model: DINOv2 loses what was fitted from 3e-5
    on, a small text encoder from 1e-3 on. A student with random or nearest weights takes the rates of any training from
    scratch. The teacher's head must be trained where `logits` count: pass `logits=0` with the fresh head of an
    `AutoModelFor...` on a backbone's checkpoint.

    Args:
        logits: Weight of T^2 KL(softmax(teacher / T) || softmax(student / T)). Not for regression and several labels
            at once, where the softmax means nothing.
        tokens: Weight of the relative squared error of the final tokens, after the last norm.
        cls: Weight of the cosine distance of the final class token. For text it must be asked for: the first token.
        hidden: Weight of the relative squared error of the hidden layers, their mean.
        task: Weight of the student's own loss, where the batch has labels.
        temperature: T.
        hidden_layers: Indices into `hidden_states`, 0 for the embeddings; None for all.

    Raises:
        ValueError: An option is out of range, or nothing is left.
    """

    logits: float | None = None
    tokens: float | None = None
    cls: float | None = None
    hidden: float | None = None
    task: float | None = None
    temperature: float = 2.0
    hidden_layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for part in PARTS:
            weight = getattr(self, part)
            if weight is not None and not (_is_number(weight) and 0 <= float(weight) < math.inf):
                raise ValueError(f"{part} must be a finite number that is not negative, or None, got {weight!r}")
        if not any(self.wants(part) for part in PARTS if part != "task"):
            raise ValueError("logits, tokens, cls and hidden are all 0: nothing is distilled")
        if not (_is_number(self.temperature) and 0 < float(self.temperature) < math.inf):
            raise ValueError(f"temperature must be a finite number above 0, got {self.temperature!r}")
        layers = self.hidden_layers
        if layers is None:
            return
        if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(type(each) is int for each in layers):
            raise ValueError(f"hidden_layers must be a list of ints, got {layers!r}")
        if not layers:
            raise ValueError("hidden_layers is empty; pass hidden=0 to leave the hidden layers out")
        if self.hidden == 0:
            raise ValueError(f"hidden_layers={layers!r} but hidden=0")

    def weight(self, part: str) -> float:
        """The weight of a part, if it can be given."""
        weight = getattr(self, part)
        return 1.0 if weight is None else float(weight)

    def wants(self, part: str) -> bool:
        """Whether the part is to be there where it can be given."""
        return self.weight(part) > 0

    def requires(self, part: str) -> bool:
        """Whether it is an error if the part cannot be given."""
        return getattr(self, part) is not None and self.wants(part)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
