"""What is compared: recipes, candidates, cases, and the single runs that they come to."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

__all__ = ["TRAINED_METHODS", "Candidate", "Case", "Experiment", "Recipe", "Run"]

TRAINED_METHODS = {
    "dense": "dense",
    "group_lasso": "group LASSO",
    "elastic_group_lasso": "elastic group LASSO",
    "block_rigl": "block RigL",
    "iterative_pruning": "iterative pruning",
    "gradual_pruning": "gradual pruning",
    "kron": "Kronecker",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all runs of an experiment have in common.

    Attributes:
        experiment: Its name, and that of its file of results.
        data: `"mnist"`, `"fashion_mnist"` or `"digits"`.
        model: `"linear"`, `"lenet5"`, `"mlp"` or `"vit"`.
        train_images: How many of the first training images are used; None is all of them.
        batch_size: Images a step.
        weight_decay: AdamW's, but for S, biases and norms.
    """

    experiment: str
    data: str
    model: str
    train_images: int | None = None
    batch_size: int = 128
    weight_decay: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train the model, but for the learning rate.

    Attributes:
        method: A key of `TRAINED_METHODS`.
        block_size: `(out, in)`; None for dense.
        rank: Of Kronecker layers.
        target_sparsity: Share of entries in zero blocks to end with; None where `options` hold an `l1`.
        options: Further arguments of the method's class, by name, or the `factor_lr` of `kron_param_groups`.
    """

    method: str
    block_size: tuple[int, int] | None = None
    rank: int | None = None
    target_sparsity: float | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """The method in words, with its options."""
        options = ", ".join(_in_words(name, value) for name, value in self.options)
        return TRAINED_METHODS[self.method] + (f" ({options})" if options else "")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A cell of a table. Its candidates compete on the validation images, each at its best learning rate.

    Attributes:
        table: `"sparsity"` (equal block sparsity), `"nonzeros"` (equal nonzeros), `"same_block"` (equal nonzeros, with
            one block size for all) or `"l1"`.
        column: The sparsity, the nonzeros or the l1 that stand over the cell.
        candidates: Most cases have one; those at equal nonzeros choose among block sizes, too.
    """

    table: str
    column: float
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A recipe and all cases that it shall answer.

    Attributes:
        recipe: What all runs share.
        steps: Optimizer steps of a final run.
        search_steps: Of a run of the search.
        learning_rates: The grid of everyone's search; it grows by factors of 2 while the best rate is at its edge.
        rate_limits: The lowest and the highest rate that it may grow to.
        seeds: Of the final runs; the search uses the first.
        seconds: Expected seconds of one final run on one core, for `--list`.
        cases: The most important first.
        pictured: The candidate whose masks the first seed's row keeps.
    """

    recipe: Recipe
    steps: int
    search_steps: int
    learning_rates: tuple[float, ...]
    rate_limits: tuple[float, float]
    seeds: tuple[int, ...]
    seconds: float
    cases: tuple[Case, ...]
    pictured: Candidate | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: what a line of a file of results stands for.

    Attributes:
        recipe: What it shares with the others.
        candidate: What is trained.
        phase: `"search"` reads validation images alone; `"final"` reads the test images, once.
        steps: Optimizer steps.
        learning_rate: Base rate; A and B of Kronecker layers get four times as much, or `factor_lr` times.
        seed: Of weights and order of images.
    """

    recipe: Recipe
    candidate: Candidate
    phase: str
    steps: int
    learning_rate: float
    seed: int

    def to_row(self) -> dict[str, Any]:
        """Its fields as one flat JSON object."""
        own = {item.name: getattr(self, item.name) for item in fields(self)[2:]}
        block_size = self.candidate.block_size
        plain = {"block_size": block_size and list(block_size), "options": dict(self.candidate.options)}
        candidate = asdict(self.candidate) | plain
        return {**asdict(self.recipe), **candidate, **own}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """The run that a row of results is of."""
        pick = {kind: {item.name: row[item.name] for item in fields(kind)} for kind in (Recipe, Candidate)}
        candidate = pick[Candidate]
        candidate["options"] = tuple(candidate["options"].items())
        if candidate["block_size"] is not None:
            candidate["block_size"] = tuple(candidate["block_size"])
        own = {item.name: row[item.name] for item in fields(cls)[2:]}
        return cls(recipe=Recipe(**pick[Recipe]), candidate=Candidate(**candidate), **own)


def _in_words(name: str, value: Any) -> str:
    """An option for people: `straight-through`, `group penalty 0.5`, `l1 3.0`."""
    return str(value).replace("_", "-") if name in ("regrowth", "groups") else f"{name.replace('_', ' ')} {value}"
