import importlib.metadata
import json
import subprocess
import sys

import pytest
from transformers import ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, get_kron_model, kron_summary
from kron_hf.cli import main


def tiny_vit():
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


@pytest.fixture
def saved(tmp_path):
    model = get_kron_model(tiny_vit(), KronConfig(block_size=4, rank=2))
    model.save_pretrained(tmp_path / "kron")
    return model, str(tmp_path / "kron")


def test_summary_prints_the_table_of_the_saved_model(saved, capsys):
    model, directory = saved
    assert main(["summary", directory]) == 0
    out, err = capsys.readouterr()
    assert out == f"{kron_summary(model)}\n"
    assert err == ""


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"kron_hf {importlib.metadata.version('kron_hf')}\n"


def test_summary_as_json(saved, capsys):
    model, directory = saved
    assert main(["summary", directory, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(kron_summary(model).to_dict()))


def test_module_runs_and_shows_only_the_table(saved):
    model, directory = saved
    done = subprocess.run([sys.executable, "-m", "kron_hf", "summary", directory], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{kron_summary(model)}\n", "")


def test_summary_of_a_missing_directory(tmp_path, capsys):
    missing = str(tmp_path / "missing")
    assert main(["summary", missing]) == 1
    assert capsys.readouterr().err == f"kron-hf: error: {missing} is no directory\n"


def test_summary_of_an_unknown_id(capsys):
    assert main(["summary", "no-such-owner/no-such-model"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kron-hf: error: no-such-owner/no-such-model is no directory here")
    assert error.count("\n") == 1


def test_summary_of_an_empty_directory(tmp_path, capsys):
    assert main(["summary", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"kron-hf: error: {tmp_path} holds no saved model: config.json is missing\n"


def test_summary_without_kronecker_layers(tmp_path, capsys):
    tiny_vit().save_pretrained(tmp_path)
    assert main(["summary", str(tmp_path)]) == 1
    assert "no Kronecker layers" in capsys.readouterr().err


def test_summary_of_a_broken_config(saved, tmp_path, capsys):
    (tmp_path / "kron" / "config.json").write_text("{")
    assert main(["summary", saved[1]]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_demo_refuses_a_foreign_directory(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["demo", "--output-dir", str(tmp_path)]) == 1
    assert "was not written by kron-hf demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in [name for name in sys.modules if name.startswith("kron_hf.demo")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["demo", "--output-dir", str(tmp_path / "new")]) == 1
    assert "pip install 'kron_hf[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no-command"),
        pytest.param(["bogus"], id="unknown-command"),
        pytest.param(["summary"], id="no-model"),
        pytest.param(["demo", "--seed", "one"], id="seed"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: kron-hf" in capsys.readouterr().err
