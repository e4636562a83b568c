"""Which runs a case needs next: the search over learning rates, the choice on validation, then all seeds.

Every candidate gets the same grid of rates. While its best rate is the lowest or highest one tried, the grid grows
there by a factor of 2. Then the candidate and rate of the best validation accuracy run once for each seed.
"""

from dataclasses import dataclass
from typing import Any

from examples.experiments.cases import Candidate, Case, Experiment, Run
from examples.experiments.results import Rows

__all__ = ["Answer", "answer", "cost", "next_runs"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the rows say of a case.

    Attributes:
        missing: The runs that can start now. The choice may depend on them, so that there are more after them.
        chosen: Candidate and rate, once the search is complete.
        searched: The best searching run of each candidate with its validation accuracy, once the search is complete.
        finals: The rows of the seeds that have run, in the order of the seeds.
    """

    missing: tuple[Run, ...]
    chosen: tuple[Candidate, float] | None = None
    searched: tuple[tuple[float, Run], ...] = ()
    finals: tuple[dict[str, Any], ...] = ()


def answer(experiment: Experiment, case: Case, rows: Rows) -> Answer:
    """Looks up what has been run for a case."""
    searches = [_search(experiment, candidate, rows) for candidate in case.candidates]
    missing = tuple(run for runs, _ in searches for run in runs)
    if missing:
        return Answer(missing=missing)
    searched = tuple(found for _, found in searches if found is not None)
    _, best = max(searched, key=lambda found: found[0])
    finals = [
        Run(
            recipe=experiment.recipe,
            candidate=best.candidate,
            phase="final",
            steps=experiment.steps,
            learning_rate=best.learning_rate,
            seed=seed,
        )
        for seed in experiment.seeds
    ]
    return Answer(
        missing=tuple(run for run in finals if run not in rows),
        chosen=(best.candidate, best.learning_rate),
        searched=searched,
        finals=tuple(rows[run] for run in finals if run in rows),
    )


def next_runs(experiment: Experiment, rows: Rows) -> list[Run]:
    """All runs that can start now, in the order of the cases, each once."""
    return list(dict.fromkeys(run for case in experiment.cases for run in answer(experiment, case, rows).missing))


def cost(experiment: Experiment) -> tuple[int, float]:
    """Runs that the whole experiment takes if no grid grows, and their minutes on one core, both approximate."""
    candidates = {candidate for case in experiment.cases for candidate in case.candidates}
    searches = len(candidates) * len(experiment.learning_rates)
    finals = len(experiment.cases) * len(experiment.seeds)
    share = experiment.search_steps / experiment.steps
    return searches + finals, (searches * share + finals) * experiment.seconds / 60


def _search(experiment: Experiment, candidate: Candidate, rows: Rows) -> tuple[list[Run], tuple[float, Run] | None]:
    """The searching runs to do now, or the best validation accuracy and its run."""
    rates, (low, high) = list(experiment.learning_rates), experiment.rate_limits
    while True:
        runs = [_search_run(experiment, candidate, rate) for rate in rates]
        missing = [run for run in runs if run not in rows]
        if missing:
            return missing, None
        # The lower rate wins ties, so that a run that learns nothing anywhere does not climb.
        score, best = max(((rows[run]["validation_accuracy"], run) for run in runs), key=lambda pair: pair[0])
        if best.learning_rate == rates[0] and rates[0] / 2 >= low:
            rates.insert(0, rates[0] / 2)
        elif best.learning_rate == rates[-1] and rates[-1] * 2 <= high:
            rates.append(rates[-1] * 2)
        else:
            return [], (score, best)


def _search_run(experiment: Experiment, candidate: Candidate, rate: float) -> Run:
    return Run(
        recipe=experiment.recipe,
        candidate=candidate,
        phase="search",
        steps=experiment.search_steps,
        learning_rate=rate,
        seed=experiment.seeds[0],
    )
