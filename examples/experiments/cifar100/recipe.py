"""The declared recipes of `recipes.yaml`, checked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["AugmentationSettings", "Method", "Model", "Recipes", "Training", "load_recipes"]

RECIPES = Path(__file__).with_name("recipes.yaml")
KINDS = ("dense", "baseline", "kron", "selection")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How all models are trained; learning rates are for `global_batch` images a step."""

    epochs: float
    warmup_epochs: float
    global_batch: int
    weight_decay: float
    max_grad_norm: float
    drop_path: float
    target_sparsity: float
    factor_lr: float


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """Arguments of `Augmentation`; pairs are ranges."""

    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    magnitude: float
    magnitude_std: float
    operations: int
    operation_probability: float
    erasing: float
    erasing_area: tuple[float, float]
    mixup: float
    cutmix: float
    switch: float
    label_smoothing: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("flip", "operation_probability", "erasing", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} is a probability, got {getattr(self, name)!r}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"augmentation.label_smoothing must be in [0, 1), got {self.label_smoothing!r}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A transformers model from its config alone."""

    model_type: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a model becomes sparse.

    Attributes:
        kind: "dense", "baseline" (a callback of `kron_hf.baselines` on the dense model), "kron" or "selection".
        learning_rate: At `Training.global_batch` images a step; with a rank, a rate for each.
        callback: Name of the baseline's callback.
        block_size: Of the blocks, `(out, in)` or one int.
        rank: Number of Kronecker terms.
        l1: Weight of the l1 penalty on S, instead of a target sparsity.
        block_sizes: Candidates of the selection.
        options: Further arguments of the callback.
    """

    kind: str
    learning_rate: float | dict[int, float]
    callback: str | None = None
    block_size: int | tuple[int, int] | None = None
    rank: int | None = None
    l1: float | None = None
    block_sizes: tuple[int | tuple[int, int], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")

    def rate(self, rank: int | None) -> float:
        """The declared learning rate.

        Raises:
            ValueError: None is declared for this rank.
        """
        if not isinstance(self.learning_rate, dict):
            return float(self.learning_rate)
        if rank not in self.learning_rate:
            declared = sorted(self.learning_rate)
            raise ValueError(f"no learning rate is declared for rank {rank}, only for {declared}; pass --learning-rate")
        return float(self.learning_rate[rank])


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """All that is declared."""

    training: Training
    augmentation: AugmentationSettings
    models: dict[str, Model]
    methods: dict[str, Method]


def load_recipes(path: Path = RECIPES) -> Recipes:
    """Reads a file of recipes.

    Raises:
        ValueError: A name or value in it is not known; the error says which.
    """
    declared = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return Recipes(
            training=Training(**declared["training"]),
            augmentation=AugmentationSettings(**_pairs(declared["augmentation"])),
            models={name: Model(**model) for name, model in declared["models"].items()},
            methods={name: Method(**_pairs(method)) for name, method in declared["methods"].items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _pairs(settings: dict[str, Any]) -> dict[str, Any]:
    """YAML has lists where Python has tuples."""
    return {name: _tuples(value) for name, value in settings.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
