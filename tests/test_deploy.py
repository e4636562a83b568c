"""Exports without a graph: the factored layer, the directory, dense models in a process without kron_hf, pipelines."""

import json
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, example_input, kron_layers, outputs_of
from PIL import Image
from test_compact import sparse
from transformers import BertTokenizer, ViTImageProcessor, pipeline

from kron_hf import KronConfig, KronLinear, export, get_kron_model
from kron_hf.cli import main
from kron_hf.deploy import factored
from kron_hf.deploy.factored import FactoredLinear, factored_copy
from kron_hf.deploy.graph import example_inputs


def build():
    torch.manual_seed(0)
    return sparse(get_kron_model(FAMILIES["vit"](), KronConfig(block_size=(4, 8), rank=2)), 0.8)


SIZES = [
    pytest.param((6, 4), (2, 3), 2, id="square"),
    pytest.param((48, 12), (2, 16), 1, id="wide blocks"),
    pytest.param((12, 48), (16, 2), 3, id="tall blocks"),
    pytest.param((5, 1), (1, 12), 2, id="low rank"),
]


@pytest.mark.parametrize("dropped", [False, True], ids=["all", "dropped"])
@pytest.mark.parametrize("dead", [0.0, 0.5], ids=["alive", "half dead"])
@pytest.mark.parametrize(("blocks", "block_size", "rank"), SIZES)
def test_factored_layer_computes_the_same(monkeypatch, blocks, block_size, rank, dead, dropped):
    features = (blocks[1] * block_size[1], blocks[0] * block_size[0])
    layer = KronLinear(*features, block_size, rank, dtype=torch.float64).eval()
    with torch.no_grad():
        layer.s[: int(dead * blocks[0])] = 0
        layer.s[:, : int(dead * blocks[1])] = 0
    choice = factored.cost.Dropped(rows=dropped and dead > 0, columns=dropped and dead > 0)
    monkeypatch.setattr(factored.cost, "worth_dropping", lambda *_: choice)
    plain = FactoredLinear(layer)
    assert (plain.rows is not None) == choice.rows
    x = torch.randn(2, 3, features[0], dtype=torch.float64)
    torch.testing.assert_close(plain(x), layer(x))
    assert not any(parameter.requires_grad for parameter in plain.parameters())


def test_a_layer_without_living_blocks_is_its_bias():
    layer = KronLinear(8, 4, 2, 1)
    layer.freeze_mask(torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(FactoredLinear(layer)(torch.randn(3, 8)), layer.bias.detach().expand(3, 4))


def test_both_orders_are_taken():
    wide, tall = KronLinear(192, 96, (2, 16), 1), KronLinear(96, 192, (16, 2), 1)
    assert {FactoredLinear(wide).b_first, FactoredLinear(tall).b_first} == {True, False}


def test_factored_copy():
    model = build()
    plain = factored_copy(model)
    inputs = example_input(model)
    torch.testing.assert_close(outputs_of(plain, inputs), outputs_of(model, inputs))
    assert not kron_layers(plain)
    assert len(kron_layers(model)) == 12


def test_unchosen_block_sizes_are_refused_by_name():
    model = get_kron_model(FAMILIES["vit"](), KronConfig(candidate_block_sizes=[4, 8], rank=1))
    with pytest.raises(ValueError, match=r"^vit\.layers\.0\.attention\.q_proj: its block size is not chosen yet"):
        factored_copy(model)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A saved model with an image processor, and its exports by the command."""
    folder = tmp_path_factory.mktemp("deploy")
    build().save_pretrained(folder / "kron")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "kron")
    for kind in ("dense", "compact"):
        assert main(["export", str(folder / "kron"), "--to", kind, "--output-dir", str(folder / kind)]) == 0
    return folder


def test_dense_and_compact_results_in_a_pipeline(source):
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    expected = pipeline("image-classification", str(source / "kron"))(image)
    compact, dense = (pipeline("image-classification", str(source / kind))(image) for kind in ("compact", "dense"))
    assert compact == expected
    assert [row["label"] for row in dense] == [row["label"] for row in expected]
    assert [row["score"] for row in dense] == pytest.approx([row["score"] for row in expected], abs=1e-6)


def test_a_dense_result_in_a_process_without_kron_hf(source):
    code = (
        "import sys\nsys.modules['kron_hf'] = None\nfrom transformers import pipeline\nfrom PIL import Image\n"
        "print(pipeline('image-classification', sys.argv[1])(Image.new('RGB', (16, 16), (200, 100, 50))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source / "dense")], capture_output=True, text=True)
    expected = pipeline("image-classification", str(source / "dense"))(Image.new("RGB", (16, 16), (200, 100, 50)))
    assert (done.stdout, done.returncode) == (f"{expected}\n", 0), done.stderr


def test_files_of_an_export(source):
    names = {kind: sorted(path.name for path in (source / kind).iterdir()) for kind in ("dense", "compact")}
    files = ["config.json", "kron_export.json", "model.safetensors", "preprocessor_config.json"]
    card = ["README.md", "kron_claims.json", "kron_masks.png"]
    assert names == {"dense": files, "compact": sorted([*card, *files])}
    record = json.loads((source / "dense" / "kron_export.json").read_text())
    assert record["bytes"] == (source / "dense" / "model.safetensors").stat().st_size
    assert record["max_difference"] <= 1e-6 * record["output_scale"]
    assert not any(str(source) in path.read_text() for path in source.glob("*/*.json"))


def test_dtype(tmp_path):
    report = export(build(), tmp_path / "half", "dense", dtype=torch.bfloat16)
    assert report.bytes < 0.6 * export(build(), tmp_path / "whole", "dense").bytes
    assert 0 < report.max_difference < 0.05 * report.output_scale  # to the model before the cast
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_model_stays_as_it_is(tmp_path):
    model = build().train()
    model.vit.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "dense", "dense", dtype=torch.bfloat16)
    export(model, tmp_path / "compact", "compact")
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert model.config.quantization_config["format_version"] == 1


def test_tokenizers_are_copied(tmp_path):
    get_kron_model(FAMILIES["bert"](), KronConfig(block_size=8, rank=1)).save_pretrained(tmp_path / "bert")
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path / "bert")
    assert main(["export", str(tmp_path / "bert"), "--to", "dense", "--output-dir", str(tmp_path / "dense")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (tmp_path / "bert" / name).read_bytes()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_not_exported_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and was not written by an export"):
        export(build(), tmp_path, "dense", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_earlier_export_is_replaced_if_it_may_be(tmp_path):
    export(build(), tmp_path / "out", "compact")
    with pytest.raises(FileExistsError, match=r"holds an export; overwrite=True \(--overwrite\)"):
        export(build(), tmp_path / "out", "dense")
    export(build(), tmp_path / "out", "dense", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "kron_export.json",
        "model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_lies_beside_an_earlier_export_is_never_lost(tmp_path):
    export(build(), tmp_path / "out", "compact")
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes/thesis.txt', which no export wrote"):
        export(build(), tmp_path / "out", "dense", overwrite=True)
    assert (tmp_path / "out" / "notes" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("record", ["{", "[]", '{"written": "model.safetensors"}', '{"written": [["x"]]}'])
def test_a_record_that_no_export_wrote_allows_nothing(tmp_path, record):
    (tmp_path / "kron_export.json").write_text(record)
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="which no export wrote"):
        export(build(), tmp_path, "dense", overwrite=True)


def test_nothing_appears_when_something_fails(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            (folder / "half.json").write_text("{")
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        export(build(), tmp_path / "out", "dense", processor=Broken())
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_its_own_output_directory_is_not_overwritten(source, capsys):
    folder = str(source / "compact")
    assert main(["export", folder, "--to", "dense", "--output-dir", folder, "--overwrite"]) == 1
    assert "--overwrite would delete the model" in capsys.readouterr().err
    assert (source / "compact" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (build, {"format": "gguf"}, ValueError, "format must be one of dense, onnx, torch-export, compact, got 'gguf'"),
        (build, {"format": "dense", "int8": True}, ValueError, "int8 goes with format 'onnx', got 'dense'"),
        (build, {"format": "onnx", "dtype": torch.bfloat16}, ValueError, "has no bfloat16"),
        (FAMILIES["vit"], {"format": "dense"}, ValueError, "ViTForImageClassification has no Kronecker layer"),
        (lambda: KronLinear(4, 4, 2, 1), {"format": "dense"}, TypeError, "needs a transformers model, got KronLinear"),
        (
            build,
            {"format": "onnx", "example": {"pixel_values": torch.zeros(1, 3, 16, 16)}},
            ValueError,
            "a batch of at least two",
        ),
    ],
    ids=["format", "int8", "bfloat16", "dense model", "no model", "example"],
)
def test_refusals(tmp_path, model, options, error, message):
    with pytest.raises(error, match=message):
        export(model(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_refused_by_the_command(source, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert main(["export", str(tmp_path / "adapter"), "--to", "dense", "--output-dir", str(tmp_path / "out")]) == 1
    assert "is an adapter; export what merge_and_unload() makes of it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_exporter_is_named(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("kron_hf.deploy.exporting.exported_program", lambda *_: None)
    out = tmp_path / "out"
    assert main(["export", str(source / "kron"), "--to", "onnx", "--output-dir", str(out)]) == 1
    assert capsys.readouterr().err == "kron-hf: error: this command needs onnx: pip install 'kron_hf[export]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["vit", "swin", "bert"])
def test_example_inputs(family):
    model = FAMILIES[family]()
    inputs = example_inputs(model)
    assert all(len(tensor) == 2 for tensor in inputs.values())
    assert len(outputs_of(model, inputs)) == 2
