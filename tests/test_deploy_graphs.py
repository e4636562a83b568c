"""Exported graphs: plain operations alone, any batch, the model's outputs; loaded where there is no kron_hf."""

import copy
import json
import subprocess
import sys

import numpy
import pytest
import torch
from families import FAMILIES, example_input, outputs_of
from test_compact import sparse
from transformers import ViTConfig

from kron_hf import KronConfig, export, get_kron_model

pytestmark = pytest.mark.slow  # torch's ONNX exporter alone takes a quarter of a minute
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def build(family="vit", rank=2):
    torch.manual_seed(0)
    return sparse(get_kron_model(FAMILIES[family](), KronConfig(block_size=(4, 8), rank=rank)), 0.8)


def five(model):
    """A batch of another size than the example of the export."""
    return {name: torch.cat([tensor, tensor.flip(-1), tensor[:1]]) for name, tensor in example_input(model).items()}


def large_graphs(model, folder):
    """As of a model of more than protocol buffers hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kron_hf.deploy.onnx_file.LARGEST", 0)
        return {f"large{int8}": export(model, folder / f"large{int8}", "onnx", int8=int8) for int8 in (False, True)}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """A model and its graphs in all forms."""
    folder, model = tmp_path_factory.mktemp("graphs"), build()
    reports = {
        **large_graphs(model, folder),
        "onnx": export(model, folder / "onnx", "onnx"),
        "int8": export(model, folder / "int8", "onnx", int8=True),
        "torch-export": export(model, folder / "torch-export", "torch-export"),
        "bfloat16": export(model, folder / "bfloat16", "torch-export", dtype=torch.bfloat16),
    }
    return model, folder, reports


def run_onnx(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def test_onnx_computes_the_same_for_another_batch(graphs):
    model, folder, reports = graphs
    found, expected = run_onnx(folder / "onnx" / "model.onnx", five(model)), outputs_of(model, five(model))
    torch.testing.assert_close(found, expected)
    assert reports["onnx"].max_difference <= 1e-5 * reports["onnx"].output_scale


def test_onnx_holds_plain_operations_and_no_paths(graphs):
    model, folder, _ = graphs
    loaded = onnx.load(folder / "onnx" / "model.onnx")
    onnx.checker.check_model(loaded, full_check=True)
    assert {node.domain for node in loaded.graph.node} <= {""}
    assert not loaded.functions
    content = (folder / "onnx" / "model.onnx").read_bytes()
    assert all(word not in content for word in (b"site-packages", b".py", b"kron_hf"))
    assert len(content) < 2 * sum(tensor.nbytes for tensor in model.state_dict().values())


def test_int8_is_smaller_and_near(graphs):
    model, folder, reports = graphs
    kinds = {tensor.data_type for tensor in onnx.load(folder / "int8" / "model.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    expected = outputs_of(model, five(model))
    found = run_onnx(folder / "int8" / "model.onnx", five(model))
    assert 0 < float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())
    assert sorted(path.name for path in (folder / "int8").iterdir()) == [
        "config.json",
        "kron_export.json",
        "model.onnx",
    ]
    assert reports["int8"].bytes < reports["onnx"].bytes


@pytest.mark.parametrize(("kind", "small"), [("largeFalse", "onnx"), ("largeTrue", "int8")], ids=["float", "int8"])
def test_weights_that_a_graph_cannot_hold_lie_beside_it(graphs, kind, small):
    model, folder, reports = graphs
    assert sorted(path.name for path in (folder / kind).iterdir()) == [
        *("config.json", "kron_export.json", "model.onnx", "model.onnx.data")
    ]
    assert reports[kind].files.keys() == {"model.onnx", "model.onnx.data"}
    assert 0 < reports[kind].files["model.onnx"] < reports[small].bytes
    moved = (folder / kind).rename(folder / f"moved-{kind}")
    found, expected = (run_onnx(path / "model.onnx", five(model)) for path in (moved, folder / small))
    torch.testing.assert_close(found, expected)


def test_torch_export_in_a_process_without_kron_hf(graphs):
    model, folder, reports = graphs
    inputs = five(model)
    numpy.save(folder / "inputs.npy", inputs["pixel_values"].numpy())
    code = (
        "import sys\nsys.modules['kron_hf'] = sys.modules['transformers'] = None\nimport numpy, torch\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "x = torch.from_numpy(numpy.load(sys.argv[2]))\n"
        "numpy.save(sys.argv[3], model(x)['logits'].detach().numpy())\n"
    )
    files = [folder / "torch-export" / "model.pt2", folder / "inputs.npy", folder / "outputs.npy"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.from_numpy(numpy.load(folder / "outputs.npy"))
    torch.testing.assert_close(found, outputs_of(model, inputs))
    assert reports["torch-export"].max_difference <= 1e-5 * reports["torch-export"].output_scale
    assert b"site-packages" not in files[0].read_bytes()


def test_bfloat16(graphs):
    model, folder, reports = graphs
    program = torch.export.load(folder / "bfloat16" / "model.pt2")
    assert {tensor.dtype for tensor in program.state_dict.values() if tensor.is_floating_point()} == {torch.bfloat16}
    x = five(model)["pixel_values"].to(torch.bfloat16)
    expected = outputs_of(copy.deepcopy(model).to(torch.bfloat16), {"pixel_values": x})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x)["logits"], expected, rtol=0.05, atol=0.02)
    assert 0 < reports["bfloat16"].max_difference < 0.1 * reports["bfloat16"].output_scale


def test_config_beside_a_graph_is_that_of_a_dense_model(graphs):
    model, folder, _ = graphs
    for kind in ("onnx", "torch-export"):
        config = json.loads((folder / kind / "config.json").read_text())
        assert not {"quantization_config", "fusion_config"} & config.keys()
        assert config["architectures"] == ["ViTForImageClassification"]
        assert ViTConfig.from_pretrained(folder / kind).num_labels == model.config.num_labels


@pytest.mark.parametrize("family", ["swin", "dinov2", "bert"])
def test_families(tmp_path, family):
    model = build(family)
    export(model, tmp_path / "graph", "torch-export", example=example_input(model))
    loaded = torch.export.load(tmp_path / "graph" / "model.pt2").module()
    with torch.no_grad():
        found = loaded(*five(model).values())["logits"]
    torch.testing.assert_close(found, outputs_of(model, five(model)))


def test_a_graph_that_computes_something_else_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr("kron_hf.deploy.exporting.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="what was exported computes something else than ViTForImageClassification"):
        export(build(), tmp_path / "graph", "torch-export")
    assert list(tmp_path.iterdir()) == []
