"""`kron-hf bench`: what is chosen for the layers of a model, and how it is measured."""

import json
import re

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, get_kron_model
from kron_hf.bench import timing
from kron_hf.bench.choice import SPEED_UP, Choice, choose, total_ratio
from kron_hf.bench.layers import ModelLayer, model_layers
from kron_hf.cli import main
from kron_hf.ops import backend, cost, gemm


def tiny_vit():
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    tiny_vit().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def kron_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kron")
    config = KronConfig(block_size=4, rank=2, block_size_pattern={"fc1": (8, 4)})
    get_kron_model(tiny_vit(), config).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def without_weights(kron_dir, dense_dir, monkeypatch):
    """No file of weights may be opened."""
    monkeypatch.setattr("safetensors.safe_open", lambda *args, **kwargs: pytest.fail("weights were read"))


def printed(capsys, *words):
    assert main(["bench", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def layer(features=768, block=16, rank=2, names=("fc",), out_features=None):
    return ModelLayer(features, out_features or features, (block, block), rank, True, names)


def choice(*, training=False, device_type="cpu", tokens=4096, **sizes):
    return choose(layer(**sizes), device_type=device_type, dtype=torch.float32, tokens=tokens, training=training)


# The layers of a model


def test_layers_of_a_converted_model(kron_dir, without_weights, capsys):
    content = json.loads(printed(capsys, "--model", kron_dir, "--choose", "--json"))
    found = {
        (entry["layer"]["in_features"], entry["layer"]["out_features"]): entry["layer"] for entry in content["layers"]
    }
    assert {size: (each["block_size"], each["rank"], len(each["names"])) for size, each in found.items()} == {
        (32, 32): ([4, 4], 2, 8),
        (32, 64): ([8, 4], 2, 2),
        (64, 32): ([4, 4], 2, 2),
    }
    assert "vit.layers.0.mlp.fc1" in found[32, 64]["names"]


def test_layers_that_a_dense_model_would_have(dense_dir, without_weights, capsys):
    words = ("--model", dense_dir, "--choose", "--json", "--block-size", "2", "8", "--rank", "3")
    content = json.loads(printed(capsys, *words, "--target-modules", "fc1", "fc2"))
    sizes = [
        (entry["layer"]["in_features"], entry["layer"]["block_size"], entry["layer"]["rank"])
        for entry in content["layers"]
    ]
    assert sizes == [(32, [2, 8], 3), (64, [2, 8], 3)]


def test_every_candidate_is_a_layer():
    model = get_kron_model(tiny_vit(), KronConfig(candidate_block_sizes=[2, 4], rank=1, target_modules=["fc1"]))
    model.config.architectures = ["ViTForImageClassification"]  # as a saved model's names it
    layers = model_layers("model", model.config, {})
    assert [(each.block_size, each.rank, len(each.names)) for each in layers] == [((2, 2), 1, 2), ((4, 4), 1, 2)]


# What is chosen


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(("block", "rank"), [(16, 1), (8, 2), (4, 8)])
def test_a_choice_is_what_the_operator_does(block, rank, training):
    chosen = choice(block=block, rank=rank, training=training)
    shape = chosen.layer.shape("cpu", torch.float32, 4096)
    assert backend.path_name(backend.forward_path(shape)) == chosen.chosen.split(" + ")[0]
    if training:
        assert backend.path_name(backend.backward_path(shape)) == chosen.chosen.split(" + ")[-1]
    assert chosen.costs.keys() == {"build-w", *map(backend.path_name, cost.candidates(shape))}
    if chosen.chosen != "build-w" and " + " not in chosen.chosen:
        assert chosen.ratio == chosen.costs[chosen.chosen]


def test_building_w_in_both_directions_is_never_faster_than_dense(without_onednn):
    assert choice(training=True).costs["build-w"] > 1
    assert choice(training=True).ratio < 0.5


@pytest.mark.parametrize("faster", [False, True])
def test_it_says_that_another_library_is_why_building_w_is_faster(without_onednn, monkeypatch, faster):
    monkeypatch.setattr(gemm, "_faster", lambda: faster)
    remark = "products with W by oneDNN, where nn.Linear takes MKL"
    assert (remark in str(choice(block=4, rank=8))) == faster
    assert remark not in str(choice(rank=2))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        pytest.param({"rank": 2}, None, id="faster"),
        pytest.param(
            {"block": 4, "rank": 8}, r"the factors need 2.\d\d of its multiply-adds, and run less well", id="rank"
        ),
        pytest.param({"tokens": 1, "features": 192}, "1 tokens are too few to outweigh the calls", id="one-token"),
        pytest.param({"features": 64, "rank": 1}, "but moving data outweighs that at this size", id="small"),
    ],
)
def test_it_says_where_no_speed_up_is_expected_and_why(without_onednn, given, reason):
    chosen = choice(**given)
    if reason is None:
        assert chosen.ratio < 0.95
        assert "no speed-up" not in str(chosen)
    else:
        assert chosen.ratio >= 0.95
        assert re.search(f"no speed-up expected here: .*{reason}", str(chosen))


def test_the_total_is_weighted_by_the_dense_work():
    one, other = layer(features=8, block=2, names=("a", "b", "c")), layer(features=16, block=2, names=("d",))
    choices = [Choice(one, {}, "", 0.5, None), Choice(other, {}, "", 1.0, "slow")]
    assert total_ratio(choices) == (0.5 * 3 * 64 + 1.0 * 256) / (3 * 64 + 256)


def test_choices_for_people(kron_dir, capsys):
    out = printed(capsys, "--model", kron_dir, "--choose", "--training", "--tokens", "64")
    assert "cpu, float32, 64 tokens, forward and backward; predicted time over nn.Linear" in out
    assert "8 x 32 -> 32, blocks 4 x 4, rank 2 (vit.layers.0." in out
    assert re.search(r"build-w \d+\.\d\d, token-last-b-first \d+\.\d\d", out)
    assert "token-major" not in out  # no choice for blocks of 4
    assert out.count("chosen: ") == 3
    assert re.search(
        r"All 12 layers together: predicted time \d+\.\d\d of dense; no speed-up expected for this mo", out
    )


def test_choices_for_a_device_that_is_not_here(kron_dir, capsys):
    out = printed(capsys, "--model", kron_dir, "--choose", "--device", "cuda")
    assert "Nothing was measured on devices other than CPUs: this is arithmetic for one of the H200's class" in out
    assert out.count("of dense by arithmetic") == 4
    assert re.search(r"build-w \d+\.\d\d, token-last-b-first \d+\.\d\d, token-last-m-first \d+\.\d\d, fused \d", out)


def test_fused_kernels_that_promise_more_than_what_is_taken_are_named():
    layer = ModelLayer(768, 768, (16, 16), 2, True, ("a",))
    choice = choose(layer, device_type="cuda", dtype=torch.bfloat16, tokens=4096, training=False)
    assert choice.costs["fused"] < SPEED_UP <= choice.ratio
    assert "until they have been measured on a GPU they are taken for large products alone" in str(choice)
    large = choose(layer, device_type="cuda", dtype=torch.bfloat16, tokens=16384, training=False)
    assert (large.chosen, large.reason) == ("fused", None)


# What is measured


class Recorder(nn.Module):
    """Writes down that it ran, and takes the seconds it is told by a clock that it moves."""

    def __init__(self, name, log, clock, seconds):
        super().__init__()
        self.name, self.log, self.clock, self.seconds = name, log, clock, seconds

    def forward(self, x):
        self.log.append(self.name)
        self.clock[0] += next(self.seconds)
        return x * 1


def test_layers_run_in_turn_and_medians_without_the_first_run_count(monkeypatch):
    log, clock = [], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    layers = [
        Recorder("a", log, clock, iter([100, 1, 2, 30])),
        Recorder("b", log, clock, iter([100, 5, 4, 60])),
    ]
    x = torch.ones(1, requires_grad=True)
    results = timing.alternate(layers, x, torch.ones(1), repeats=3)
    assert log == ["a", "b"] * 4
    assert results == [(2000.0, 2000.0), (5000.0, 5000.0)]


def test_ratios_are_over_linear():
    times = timing.Comparison(2.0, 8.0, 1.0, 2.0)
    assert (times.forward_ratio, times.ratio) == (0.5, 0.25)


def test_measuring_prints_a_row_for_each_layer(kron_dir, capsys):
    out = printed(capsys, "--model", kron_dir, "--tokens", "8", "--repeats", "1")
    assert re.search(r"cpu: .*, threads: \d+, .*torch: 2\..*baseline: nn.Linear", out)
    rows = re.findall(r"^\| (\d+) \| (\d+ -> \d+) \| (\d+ x \d+) \| 2 \|", out, re.MULTILINE)
    assert sorted(rows) == [("2", "32 -> 64", "8 x 4"), ("2", "64 -> 32", "4 x 4"), ("8", "32 -> 32", "4 x 4")]
    assert re.search(r"All 12 layers: forward \d+\.\d\d, forward \+ backward \d+\.\d\d of nn.Linear", out)


def test_measurements_as_json(kron_dir, capsys):
    content = json.loads(printed(capsys, "--model", kron_dir, "--tokens", "8", "--repeats", "1", "--json"))
    assert content["machine"]["torch"] == torch.__version__
    kron = sum(len(row["names"]) * row["kron_both_ms"] for row in content["layers"])
    linear = sum(len(row["names"]) * row["linear_both_ms"] for row in content["layers"])
    assert content["ratio"] == pytest.approx(kron / linear)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--model", "KRON", "--rank", "2"], "has Kronecker layers already: --rank only", id="converted"),
        pytest.param(["--model", "KRON", "--training"], "--training goes with --choose", id="training"),
        pytest.param(["--model", "DENSE", "--block-size", "5"], "(5, 5) does not divide", id="block"),
        pytest.param(["--model", "DENSE", "--block-size", "1", "2", "3"], "takes one number or two", id="blocks"),
        pytest.param(["--model", "./nowhere"], "./nowhere is no directory", id="nowhere"),
        pytest.param(["--model", "KRON", "--device", "cuda"], "torch finds no CUDA device here", id="cuda"),
    ],
)
def test_errors_are_one_line(words, message, kron_dir, dense_dir, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *({"KRON": kron_dir, "DENSE": dense_dir}.get(word, word) for word in words)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", [["--tokens", "0"], ["--repeats", "x"], ["--dtype", "int8"], []], ids=str)
def test_wrong_usage_exits_with_2(words, kron_dir, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *(["--model", kron_dir] if words else []), *words])
    assert "usage: kron-hf bench" in capsys.readouterr().err
