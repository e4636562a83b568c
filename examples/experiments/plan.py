"""The declared experiments. Changing a number here makes the runs that it touches anew; the old rows are ignored."""

from typing import Any

from examples.experiments.budget import sparsity_for
from examples.experiments.cases import Candidate, Case, Experiment, Recipe
from examples.experiments.methods import BASELINES

__all__ = ["EXPERIMENTS"]

Block = tuple[int, int]
SPARSITIES = (0.5, 0.8, 0.9)
SEEDS = (0, 1, 2)


def _kron(block: Block, rank: int, sparsity: float | None, **options: Any) -> Candidate:
    return Candidate(
        method="kron", block_size=block, rank=rank, target_sparsity=sparsity, options=tuple(options.items())
    )


def _at_sparsity(*candidates: Candidate) -> list[Case]:
    """A case each."""
    return [
        Case(table="sparsity", column=candidate.target_sparsity or 0.0, candidates=(candidate,))
        for candidate in candidates
    ]


def _baselines(blocks: list[Block], sparsities: tuple[float, ...]) -> list[Case]:
    return _at_sparsity(
        *(
            Candidate(method=method, block_size=block, target_sparsity=sparsity)
            for sparsity in sparsities
            for block in blocks
            for method in BASELINES
        )
    )


def _l1(candidates: list[tuple[Block, int]], strengths: tuple[float, ...]) -> list[Case]:
    return [
        Case(table="l1", column=l1, candidates=(_kron(block, rank, None, l1=l1),))
        for block, rank in candidates
        for l1 in strengths
    ]


def _at_nonzeros(
    model: str, budget: int, shapes: list[tuple[Block, int]], blocks: list[Block], table: str = "nonzeros"
) -> list[Case]:
    """A case for each method; its candidates are the shapes that can have so many nonzeros."""
    baselines = [[Candidate(method=method, block_size=block) for block in blocks] for method in BASELINES]
    menus = [[_kron(block, rank, None) for block, rank in shapes], *baselines]
    return [Case(table=table, column=budget, candidates=_meeting(budget, model, menu)) for menu in menus]


def _at_one_rate(model: str, budget: int, shapes: list[tuple[Block, int]]) -> Case:
    """The Kronecker case of `_at_nonzeros`, A and B at the rate of all other parameters."""
    menu = [_kron(block, rank, None, factor_lr=1.0) for block, rank in shapes]
    return Case(table="nonzeros", column=budget, candidates=_meeting(budget, model, menu))


def _meeting(budget: int, model: str, menu: list[Candidate]) -> tuple[Candidate, ...]:
    found = []
    for candidate in menu:
        sparsity = sparsity_for(budget, model, 28, 10, candidate)
        if sparsity is not None:
            found.append(Candidate(**{**vars(candidate), "target_sparsity": sparsity}))
    return tuple(found)


DENSE = _at_sparsity(Candidate(method="dense"))


def _linear(data: str, train_images: int | None, seconds: float) -> Experiment:
    """784 -> 10 with the paper's block sizes, (out, in)."""
    blocks: list[Block] = [(2, 2), (2, 4), (2, 8), (2, 16)]
    krons = [_kron(block, rank, sparsity) for sparsity in (0.5, 0.8) for block in blocks for rank in (1, 2)]
    return Experiment(
        recipe=Recipe(experiment=f"linear_{data}", data=data, model="linear", train_images=train_images),
        steps=1000,
        search_steps=1000,
        learning_rates=(1e-3, 2e-3, 4e-3),
        rate_limits=(2.5e-4, 3.2e-2),
        seeds=SEEDS,
        seconds=seconds,
        cases=(*DENSE, *_at_sparsity(*krons), *_baselines(blocks, (0.5, 0.8))),
        pictured=_kron((2, 2), 2, 0.5),
    )


def _lenet5(data: str, train_images: int | None, steps: int, seconds: float) -> Experiment:
    """The three fully connected layers, 400 -> 120 -> 84 -> 10; the last has blocks of (2, 4) always."""
    shapes: list[tuple[Block, int]] = [((4, 4), 2), ((4, 8), 4), ((12, 8), 4), ((4, 4), 1)]
    krons = [_kron(block, rank, sparsity) for sparsity in (0.5, 0.8) for block, rank in shapes]
    return Experiment(
        recipe=Recipe(experiment=f"lenet5_{data}", data=data, model="lenet5", train_images=train_images, batch_size=64),
        steps=steps,
        search_steps=steps,
        learning_rates=(1e-3, 2e-3, 4e-3),
        rate_limits=(2.5e-4, 1.6e-2),
        seeds=SEEDS,
        seconds=seconds,
        cases=(*DENSE, *_at_sparsity(*krons), *_baselines([(4, 4)], (0.5, 0.8))),
        pictured=_kron((4, 4), 2, 0.5),
    )


def _mlp() -> Experiment:
    """784 -> 256 -> 128 -> 10, its first two layers compared."""
    shapes: list[tuple[Block, int]] = [((8, 8), 2), ((4, 4), 4), ((8, 8), 4), ((8, 8), 1), ((4, 4), 2), ((4, 4), 1)]
    krons = [_kron(block, rank, sparsity) for block, rank in shapes for sparsity in (0.0, *SPARSITIES)]
    straight = [_kron(*shape, sparsity, regrowth="straight_through") for shape in shapes[:2] for sparsity in SPARSITIES]
    grouped = [_kron((8, 8), 2, sparsity, group_penalty=0.5, groups="both") for sparsity in SPARSITIES]
    grouped += [_kron((8, 8), 2, 0.8, group_penalty=0.75, groups="rows")]
    one_rate = [_kron(*shape, sparsity, factor_lr=1.0) for shape in shapes[:2] for sparsity in SPARSITIES]
    squares: list[tuple[Block, int]] = [((8, 8), 1), ((8, 8), 2), ((8, 8), 4)]
    menu: list[tuple[Block, int]] = [*squares[1:], ((4, 8), 2), ((8, 56), 4)]
    budgets = []
    for budget in (5000, 2400, 11500):
        budgets += _at_nonzeros("mlp", budget, menu, [(8, 8), (2, 4), (2, 2)])
        budgets += _at_nonzeros("mlp", budget, squares, [(8, 8)], "same_block")
    return Experiment(
        recipe=Recipe(experiment="mlp_fashion_mnist", data="fashion_mnist", model="mlp", train_images=20_000),
        steps=1500,
        search_steps=1500,
        learning_rates=(1e-3, 2e-3, 4e-3),
        rate_limits=(2.5e-4, 1.6e-2),
        seeds=SEEDS,
        seconds=4.5,
        cases=(
            *DENSE,
            *_at_sparsity(*krons),
            *budgets,
            *_baselines([(8, 8), (4, 4)], SPARSITIES),
            *_at_sparsity(*straight, *grouped, *one_rate),
            *_l1([((8, 8), 2), ((4, 4), 4)], (3.0, 10.0, 30.0)),
        ),
        pictured=_kron((8, 8), 2, 0.8),
    )


def _vit() -> Experiment:
    """4 layers of width 128, every attention and MLP projection compared."""
    krons = [_kron((4, 8), 4, sparsity) for sparsity in SPARSITIES]
    shapes: list[tuple[Block, int]] = [((4, 8), 4), ((8, 8), 4), ((4, 16), 8)]
    return Experiment(
        recipe=Recipe(experiment="vit_fashion_mnist", data="fashion_mnist", model="vit", train_images=20_000),
        steps=1248,
        search_steps=416,
        learning_rates=(1e-3, 2e-3, 4e-3),
        rate_limits=(2.5e-4, 8e-3),
        seeds=SEEDS,
        seconds=130.0,
        cases=(
            *DENSE,
            *_at_sparsity(*krons[:1]),
            # What 50 % of (4, 8) at rank 4 come to; three shapes for each method.
            *_at_nonzeros("vit", 47_600, shapes, [(4, 8), (2, 4), (2, 2)]),
            _at_one_rate("vit", 47_600, shapes),
            *_baselines([(4, 8)], SPARSITIES[:1]),
            *_at_sparsity(*krons[1:]),
        ),
        pictured=_kron((4, 8), 4, 0.5),
    )


EXPERIMENTS = {
    experiment.recipe.experiment: experiment
    for experiment in (
        _mlp(),
        _lenet5("mnist", None, 2000, 15.0),
        _lenet5("fashion_mnist", 20_000, 1200, 10.0),
        _linear("mnist", None, 1.0),
        _linear("fashion_mnist", 20_000, 1.5),
        _vit(),
    )
}
