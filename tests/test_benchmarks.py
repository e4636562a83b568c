"""The benchmarks: what is declared, every method on tiny sizes, what is measured, the report."""

import gc
import json
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from examples.benchmarks import calibrate, few_tokens, libraries, measuring, report, run, shared_input, sparsity_speed
from examples.benchmarks.cases import Case, Conditions
from examples.benchmarks.measuring import Measured, alternate, memory
from examples.benchmarks.methods import CONVOLUTION_WAYS, METHODS, PATHS
from examples.benchmarks.plots import draw_over_sizes, draw_roofline
from examples.benchmarks.registry import CHOICES, GRID, LIMITS, SUITES, limit
from examples.benchmarks.subjects import MODELS, Subject, build_subject
from kron_hf.factors import kron_weight
from kron_hf.ops import paths
from kron_hf.ops.backend import forced_backend
from kron_hf.ops.cpu_costs import cpu_costs

CONDITIONS = Conditions(device="cpu", dtype="float32", tokens=16, batch=2, threads=1, machine="here")
WIDE = replace(CONDITIONS, dtype="float64", tokens=5)
TRAINED = ("dense", "kron", "vec-parallel", "lora", "lokr")
FACTORS = 16 * 8 * 3 + 2 * 16  # S, A and B of 32 -> 64 in blocks of 4 at rank 2


def layer(method, **changes):
    sizes = {} if method == "dense" else {"block_size": (4, 4), "rank": 2}
    return Case(**{"subject": "layer", "features": (32, 64), "method": method, **sizes} | changes)


def conv(method):
    return replace(layer(method), subject="conv", features=(8, 16), kernel=3, stride=2, image=6)


def tiny_vit(method):
    return replace(layer(method), subject="tiny-vit", features=None)


def made_up(case, ratio, **more):
    times = {"forward_ms": ratio, "both_ms": ratio, "step_ms": ratio, "peak_bytes": int(100 * ratio)}
    dense = {f"dense_{what}": 100 if what == "peak_bytes" else 1.0 for what in times}
    counts = {"forward_flops": 10**6, "dense_forward_flops": 10**7, "trained_params": 100, "dense_trained_params": 1000}
    return run.to_row(case, CONDITIONS) | times | dense | counts | {"about": {"torch": "2"}, **more}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One row for each method on a layer, and some on a model, by subject and method."""
    cases = [case for case in SUITES["tiny"] if case.features or case.method in ("kron", "vec-parallel", "lora")]
    path = tmp_path_factory.mktemp("benchmarks") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("examples.benchmarks.measuring.ROOF_SIZES", {"cpu": (64, 64)})
        found = run.complete(cases, CONDITIONS, 1, path)
    assert run.read_rows(path)[0]["roof"].keys() == {"flops_per_second", "bytes_per_second"}
    return {(row["subject"], row["method"]): row for row in found}


# What is declared


def test_every_method_and_path_is_measured_somewhere():
    named = {case.method for cases in SUITES.values() for case in cases}
    assert named == set(METHODS)
    assert {"build-w", "fused", "token-major-b-first", "token-last-m-first"} < set(PATHS)
    assert {case.subject for case in SUITES["models"]} == {"vit-s/16", "vit-b/16", "swin-t"}
    assert {f"kron-{path}" for path in PATHS} < {case.method for case in SUITES["models"]}


def test_the_grid_is_whole_and_cases_are_declared_once():
    assert len(GRID) == 4 * (5 * 8 + 4)  # 2 x 2 blocks have rank 4 at most
    assert {case.features[0] for case in GRID} == {192, 384, 768, 1024}
    for cases in SUITES.values():
        assert len(set(cases)) == len(cases)


@pytest.mark.parametrize(
    ("name", "hidden", "layers"), [("vit-s/16", 384, 12), ("vit-b/16", 768, 12), ("swin-t", 768, 12)]
)
def test_models_are_those_of_the_papers(name, hidden, layers):
    with torch.device("meta"):
        model = MODELS[name]()
    assert model.classifier.in_features == hidden
    assert sum(module.endswith("fc1") for module, _ in model.named_modules()) == layers
    assert model.config.image_size == 224


def test_where_limits_hold():
    case = next(iter(LIMITS))
    there = replace(CONDITIONS, tokens=4096, batch=8)
    assert limit(case, there) == LIMITS[case]
    for change in ({"tokens": 1}, {"batch": 1}, {"dtype": "bfloat16"}, {"device": "cuda"}):
        assert limit(case, replace(there, **change)) is None


# What methods compute


@pytest.mark.parametrize(
    ("place", "method"),
    [
        *((layer, name) for name in ("vec-parallel", *(f"kron-{path}" for path in PATHS if path != "fused"))),
        *((conv, f"conv-{way}".replace("_", "-")) for way in CONVOLUTION_WAYS),
    ],
)
def test_the_same_layer_whatever_the_way(place, method):
    out = {}
    for name in ("kron", method):
        subject = build_subject(place(name), WIDE)
        torch.manual_seed(1)
        model = METHODS[name].build(subject.model, place(name), subject.modules)
        with METHODS[name].forcing():
            y = subject.run(model)
            subject.backward(y)
        out[name] = (y, subject.inputs.grad, *(parameter.grad for _, parameter in sorted(model.named_parameters())))
    torch.testing.assert_close(out[method], out["kron"])


@pytest.mark.parametrize("method", ["bsr", "kron-folded"])
def test_zero_blocks(method):
    case = layer(method, sparsity=0.5)
    subject = build_subject(case, WIDE)
    torch.manual_seed(1)
    kron = METHODS["kron"].build(subject.model, case, subject.modules).fc
    assert kron.sparsity == pytest.approx(0.5, abs=1 / kron.s.numel())
    assert (~kron.block_mask).all(1).sum() == 4  # a quarter of the rows
    twin = build_subject(case, WIDE)
    torch.manual_seed(1)
    with torch.no_grad(), pytest.warns(UserWarning, match="BSR") if method == "bsr" else METHODS["kron"].forcing():
        model = METHODS[method].build(twin.model, case, twin.modules)
        weight = kron_weight(kron.masked_s(), kron.a, kron.b)
        torch.testing.assert_close(model(twin.inputs), twin.inputs @ weight.T + kron.bias)


def test_paths_are_forced():
    for path in PATHS:
        with METHODS[f"kron-{path}"].forcing():
            assert forced_backend() == path
    assert forced_backend() is None


# What is measured


def test_every_method_is_measured(rows):
    assert [row["error"] for row in rows.values() if "error" in row] == []
    for row in rows.values():
        trained = not METHODS[row["method"]].forward_only
        assert ("step_ms" in row, row["peak_bytes"] is not None) == (trained, trained)
        if trained:
            assert row["step_ms"] > row["both_ms"] > 0
        assert Case.from_row(json.loads(json.dumps(row))) == Case.from_row(row)


def test_kronecker_layers_save_what_dense_ones_save(rows):
    for (subject, method), row in rows.items():
        if row["saved_bytes"] is not None:
            masked = 4 * 2 * 2 * 4 if subject == "conv" and method != "dense" else 0  # S * A of 8 -> 8, blocks 4 x 2
            assert row["saved_bytes"] == row["dense_saved_bytes"] + masked or method in ("vec-parallel", "lora", "lokr")
            assert row["saved_bytes"] > row["dense_saved_bytes"] or method != "vec-parallel"
    assert rows["layer", "dense"]["saved_bytes"] == 16 * 32 * 4


@pytest.mark.parametrize("method", TRAINED)
def test_optimizer_state_is_two_floats_a_parameter(rows, method):
    row = rows["layer", method]
    steps = {"dense": 2, "kron": 4, "vec-parallel": 4}.get(method, 2)
    assert row["optimizer_bytes"] in range(8 * row["trained_params"], 8 * row["trained_params"] + 4 * steps + 9)


def test_adapters_train_as_many_parameters_as_the_factors_have(rows):
    assert rows["layer", "kron"]["trained_params"] == FACTORS + 64
    for method in ("lora", "lokr"):
        assert rows["layer", method]["trained_params"] == pytest.approx(FACTORS, rel=0.15)


def test_memory_of_a_known_layer():
    subject = build_subject(layer("dense"), CONDITIONS)
    measured = Measured.of(subject.model, subject, trained=True)
    measured.step()
    found = memory(measured)
    assert found == memory(measured)
    weights, x = 4 * (32 * 64 + 64), 4 * 16 * 32
    assert found["saved_bytes"] == x
    assert found["optimizer_bytes"] == 2 * weights + 2 * 4
    at_rest = 3 * weights + 2 * 4 + x
    assert at_rest + weights + x <= found["peak_bytes"] <= at_rest + weights + x + 4 * 16 * 64 + 1024  # gradients, y


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_as_on_a_gpu_the_layer_of_the_authors_takes_no_more_memory_than_dense(monkeypatch, rank):
    """What an accelerator's chunks hold, counted where torch allocates on the CPU."""
    as_here = paths.Shape.of
    like_cuda = SimpleNamespace(of=lambda *sizes: as_here(*sizes)._replace(device_type="cuda", threads=1))
    monkeypatch.setattr(paths, "Shape", like_cuda)
    case = Case(subject="layer", features=(1024, 1024), method="kron", block_size=(8, 8), rank=rank)
    conditions = Conditions(device="cpu", dtype="float32", tokens=1280, batch=1, threads=1, machine="")
    peaks = {}
    for method in ("dense", "kron"):
        subject = build_subject(case, conditions)
        measured = Measured.of(METHODS[method].build(subject.model, case, subject.modules), subject, trained=True)
        measured.step()
        peaks[method] = memory(measured)["peak_bytes"]
    assert peaks["kron"] < peaks["dense"]


def test_runs_alternate_and_the_median_without_the_first_two_counts(monkeypatch):
    log, clock, seconds = [], [0.0], {"a": iter([9, 9, 1, 3, 2]), "b": iter([9, 9, 5, 4, 6])}

    def subject(name):
        def step(model):
            log.append(name)
            clock[0] += next(seconds[name])

        return Subject(torch.nn.Identity(), None, step, lambda out: None, torch.ones(1))

    monkeypatch.setattr("examples.benchmarks.measuring.time.perf_counter", lambda: clock[0])
    runs = {name: Measured(torch.nn.Identity(), subject(name), None) for name in ("a", "b")}
    assert alternate(runs, 3) == {"a": {"forward_ms": 2000.0}, "b": {"forward_ms": 5000.0}}
    assert log == ["a", "b"] * 5


# The runner


def test_it_goes_on_where_it_was(tmp_path, monkeypatch):
    path, cases, measured = tmp_path / "rows.jsonl", [layer("dense"), layer("kron"), tiny_vit("kron")], []
    monkeypatch.setattr(run, "roof", lambda *_: {"flops_per_second": 1.0, "bytes_per_second": 1.0})
    monkeypatch.setattr(run, "measure", lambda case, *_: (measured.append(case), made_up(case, 1.0))[1])
    run.complete(cases[:2], CONDITIONS, 1, path)
    with path.open("a") as file:
        file.write('{"cut off')
    rows = run.complete(cases, CONDITIONS, 1, path)
    assert [Case.from_row(row) for row in rows] == measured == cases
    assert len(run.read_rows(path)) == 4
    run.complete(cases, replace(CONDITIONS, batch=4), 1, path)  # the layers get tokens, whatever the batch is
    assert measured[3:] == cases[2:]
    run.complete(cases, replace(CONDITIONS, threads=2), 1, path)
    assert measured[4:] == cases
    run.complete([conv("kron")], CONDITIONS, 1, path)
    run.complete([conv("kron")], replace(CONDITIONS, tokens=1), 1, path)
    run.complete([conv("kron")], replace(CONDITIONS, batch=4), 1, path)  # images are a convolution's input
    assert measured[7:] == [conv("kron")] * 2


def test_a_case_that_fails_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "roof", lambda *_: {})
    cases = [layer("kron", block_size=(5, 5)), layer("dense")]
    failed, done = run.complete(cases, CONDITIONS, 1, tmp_path / "rows.jsonl")
    assert "does not divide" in failed["error"]
    assert "both_ms" in done
    assert "does not divide" in list(report.table([failed]))[-1]


def test_a_case_above_its_limit_is_measured_again_and_the_lowest_counts(monkeypatch):
    ratios = iter([0.9, 0.7, 0.8])

    def times(runs, repeats):
        both = {"forward_ms": 1.0, "step_ms": 1.0}
        return {"dense_": both | {"both_ms": 1.0}, "": both | {"both_ms": next(ratios)}}

    monkeypatch.setattr(run, "alternate", times)
    monkeypatch.setattr(run, "memory", lambda *_, **__: {})
    monkeypatch.setattr(run, "limit", lambda *_: 0.5)
    row = run.measure(layer("kron"), CONDITIONS, 1)
    assert (row["both_ms"], row["attempts"]) == (0.7, 3)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.SUITES, "tiny", [layer("kron"), tiny_vit("kron")])
    monkeypatch.setattr(run, "limit", lambda case, _: 0.5 if case.features else 3.5)
    monkeypatch.setattr(run, "roof", lambda *_: {})
    monkeypatch.setattr(run, "measure", lambda case, *_: made_up(case, 2.0))
    assert run.main(["tiny", "--output", str(tmp_path / "rows.jsonl"), "--tokens", "16", "--batch", "2"]) == 1
    assert "limits missed: 32 -> 64, blocks (4, 4), rank 2: 2.00 > 0.5\n" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        run.main(["tiny", "--device", "cuda"])


# The report


def test_tables(rows):
    lines = list(report.table(list(rows.values())))
    assert len(lines) == len(rows) + 2
    assert {line.count("|") for line in lines[2:]} == {12}
    case = next(iter(LIMITS))
    (line,) = list(report.table([made_up(case, 0.5) | {"tokens": 4096, "batch": 8}]))[2:]
    assert line.startswith("| 768 -> 768 | kron | 16 x 16, 1 | 0.50 | 0.50 | 0.50 |")
    assert f"limit {LIMITS[case]}: missed" in line
    (line,) = list(report.table([made_up(conv("kron"), 0.5)]))[2:]
    assert line.startswith("| 8 -> 16, 3 x 3 / 2 of 6 x 6 | kron | 4 x 4, 2 | 0.50 | 0.50 | 0.50 |")


def test_counting_saved_bytes_keeps_no_activations():
    x, model, outputs = torch.randn(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh()), []

    def forward(model):
        out = model(x)  # tanh saves it
        outputs.append(weakref.ref(out))
        return out

    measured = SimpleNamespace(model=model, subject=SimpleNamespace(run=forward))
    assert measuring._saved_bytes(measured) == x.nbytes + 3 * 5 * 4
    gc.collect()
    assert outputs[0]() is None


def test_the_whole_grid_in_a_line():
    some = [made_up(case, ratio) for case, ratio in zip(GRID, [0.5] * 19 + [2.0], strict=False)]
    line = report.grid_line([*some, made_up(tiny_vit("kron"), 100)])
    assert f"20 of {len(GRID)} cases" in line
    assert "geometric mean 0.536" in line
    assert "95th percentile 0.575" in line
    assert report.grid_line(some[:1]) is None
    wide = [made_up(case, ratio) for case, ratio in zip(GRID[-3:], (0.5, 1.0, 2.0), strict=True)]
    larger = sum(case.features[0] >= 384 for case in GRID)
    assert report.grid_line(some + wide, smallest=384).startswith(
        f"grid from 384 features on, 3 of {larger} cases, forward + backward over dense: geometric mean 1.000"
    )


def test_choices_against_the_best_way():
    first = [case for case in CHOICES if (case.features, case.block_size, case.rank) == ((192, 192), (4, 4), 1)]
    second = [replace(case, rank=2) for case in first]
    rows = [made_up(case, 1.0 if case.method == "kron" else 1.1) for case in first]
    rows += [made_up(case, 0.5 if case.method == "kron-build-w" else 1.0) for case in second]
    summary, *far = report.choice_lines(rows, CHOICES)
    assert "2 shapes" in summary
    assert "1.414 (geometric mean)" in summary
    assert far == ["  192 -> 192, blocks (4, 4), rank 2: 2.00 of kron, build-w"]


def test_the_report_of_a_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"roof": {"flops_per_second": 1.0, "bytes_per_second": 1.0}, **vars(CONDITIONS)}]
    rows += [made_up(layer("kron"), 0.5), made_up(layer("kron"), 0.5) | {"tokens": 1}]
    rows += [made_up(case, 0.5) for case in GRID[:3]]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["report", "--input", str(path)])
    report.main()
    out = capsys.readouterr().out
    assert "here, cpu, float32, threads: 1, tokens of a layer: 16, images of others: 2, torch 2\n" in out
    assert "tokens of a layer: 1, images of others: 2, torch 2\n" in out
    assert out.count("| 32 -> 64 | kron |") == 2
    assert f"grid, 3 of {len(GRID)} cases" in out
    assert "grid: nothing measured" in out


def test_plots(tmp_path):
    rows = [made_up(case, 0.5 + case.rank / 10) for case in GRID if case.features == (768, 768)]
    draw_over_sizes(rows, tmp_path / "sizes.png")
    draw_roofline(rows, {"flops_per_second": 1e11, "bytes_per_second": 1e10}, tmp_path / "roofline.png")
    assert {path.read_bytes()[:4] for path in tmp_path.iterdir()} == {b"\x89PNG"}
    draw_over_sizes([], tmp_path / "none.png")
    draw_roofline([], {}, tmp_path / "none.png")
    assert len(list(tmp_path.iterdir())) == 2


# The calibration


def test_a_fit_finds_what_rows_were_made_of():
    rows = [(x, y, 2 * x + 3 * y) for x, y in ((1.0, 5.0), (2.0, 1.0), (7.0, 4.0))]
    assert calibrate.fit(rows) == pytest.approx((2, 3))
    assert calibrate.fit([(1.0, 1.0, 1.0), (2.0, 1.0, 3.0)]) == pytest.approx((15 / 13, 0))
    assert calibrate.fit([(1.0, 1.0, -1.0)]) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_cost_is_measured(dtype):
    costs = calibrate.measure(dtype, calibrate.Measurement(tokens=16, repeats=1, widths=(64,)))
    values = [value for part in costs for value in (part if isinstance(part, tuple) else (part,))]
    assert len(values) == 2 * 4 + len(costs) - 2
    assert all(0 <= value < float("inf") for value in values)
    assert min(costs.build, costs.weight_gradient, costs.gather, costs.fill, costs.call) > 0
    assert costs.onednn == 1  # such a product is torch's own
    assert calibrate.line(costs).startswith(f"CpuCosts(Rates({costs.token_major.forward:.3g}, ")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_libraries_are_compared_and_the_times_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(libraries, "PRODUCTS", (libraries.Operands(5, 3, 2),))
    libraries.main(["--repeats", "3", "--json", str(tmp_path / "libraries.json")])
    stored = json.loads((tmp_path / "libraries.json").read_text())
    (row,) = stored["measured"]
    assert (row["tokens"], row["in_features"], row["out_features"]) == (5, 3, 2)
    assert min(row["torch_ms"], row["onednn_ms"]) > 0
    assert f"5 tokens,    3 to    2 features:   {row['torch_ms']:.3f} ms, oneDNN" in capsys.readouterr().out
    assert stored["machine"]["torch"] == torch.__version__


def test_what_q_k_and_v_could_share_is_printed_and_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared_input, "LAYERS", (shared_input.Layers(5, 6, 2, 1),))
    shared_input.main(["--repeats", "3", "--json", str(tmp_path / "shared.json")])
    (row,) = json.loads((tmp_path / "shared.json").read_text())["measured"]
    times = {name: row[f"{name}_ms"] for name in ("step", "apart", "together", "adding")}
    assert min(times.values()) > 0
    assert row["share"] == shared_input.share(times)
    assert "3 x 6 features, 5 tokens, blocks of 2, rank 1: " in capsys.readouterr().out
    assert shared_input.share({"step": 10.0, "apart": 3.0, "together": 2.0, "adding": 1.0}) == pytest.approx(0.3)


def test_calls_of_few_tokens_are_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(few_tokens, "CALLS", (few_tokens.Call(1, 2, 16, 32),))
    few_tokens.main(["--repeats", "3", "--json", str(tmp_path / "few.json")])
    (row,) = json.loads((tmp_path / "few.json").read_text())["measured"]
    assert min(row["kron"], row["folded"], row["keep_weight"]) > 0
    assert f"16 -> 32      {row['kron']:5.2f}" in capsys.readouterr().out


def test_what_zeros_of_s_save_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sparsity_speed, "FEATURES", 32)
    monkeypatch.setattr(sparsity_speed, "BLOCK", 4)
    monkeypatch.setattr(sparsity_speed, "SETTINGS", (sparsity_speed.Setting(1.0, "rows"),))
    how = ["--seeds", "2", "--steps", "40", "--tokens", "8", "--repeats", "2"]
    sparsity_speed.main([*how, "--json", str(tmp_path / "sparsity.json")])
    (row,) = json.loads((tmp_path / "sparsity.json").read_text())["measured"]
    assert row["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert row["rows"] > 0.5
    assert 0 < row["accuracy"] <= 1
    assert sparsity_speed.describe(row) in capsys.readouterr().out


def test_the_calibration_is_printed_and_stored(tmp_path, monkeypatch, capsys):
    made = cpu_costs(torch.float32, 1)
    monkeypatch.setattr(calibrate, "measure", lambda dtype, how: made._replace(wake=float(torch.get_num_threads())))
    before, path = torch.get_num_threads(), tmp_path / "costs.json"
    try:
        calibrate.main(["--threads", "1", "2", "--dtype", "bfloat16", "--json", str(path)])
    finally:
        torch.set_num_threads(before)
    line = "bfloat16, 2 threads: CpuCosts(Rates(1.25, 11, 1.45, 14), Rates(1.05, 32, 1.4, 38), build="
    assert line in capsys.readouterr().out
    stored = json.loads(path.read_text())["measured"]
    assert [(each["dtype"], each["threads"], each["costs"]["wake"]) for each in stored] == [
        ("bfloat16", 1, 1.0),
        ("bfloat16", 2, 2.0),
    ]
