import json

import pytest
from transformers import AutoConfig, ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, get_kron_model
from kron_hf.checkpoint.reading import clean_errors, read_config


@pytest.fixture
def saved(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def convert(folder):
    return get_kron_model(KronConfig(base_model_name_or_path=str(folder), block_size=4, rank=1, init_weights="nearest"))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("as it is"), ValueError, "^as it is$"),
        (FileNotFoundError("as it is"), FileNotFoundError, "^as it is$"),
        (ValueError("two\n  lines\x1b"), ValueError, r"^two lines\\x1b$"),
        (FileNotFoundError("two\nlines"), OSError, "^two lines$"),
        (KeyError("hidden"), ValueError, r"^'some/model': transformers cannot load this .* \(KeyError: 'hidden'\)$"),
        (RecursionError("deep"), ValueError, "RecursionError: deep"),
        (MemoryError(), ValueError, "MemoryError"),
    ],
    ids=lambda value: repr(value) if isinstance(value, Exception) else "",
)
def test_clean_errors(error, kind, message):
    with pytest.raises(kind, match=message) as caught, clean_errors("some/model"):
        raise error
    assert str(caught.value).isprintable()
    assert caught.value is error or caught.value.__cause__ is error


def test_interruptions_pass():
    with pytest.raises(KeyboardInterrupt), clean_errors("x"):
        raise KeyboardInterrupt


def test_read_config_is_auto_config(saved):
    assert read_config(str(saved)).to_dict() == AutoConfig.from_pretrained(saved).to_dict()
    config, unused = read_config(str(saved), return_unused_kwargs=True, num_labels=7, other=1)  # type: ignore[misc]
    assert (config.num_labels, unused) == (7, {"other": 1})


@pytest.mark.parametrize("text", ["[]", "1", "null", '"text"', "{", "", "[" * 5000 + "]" * 5000], ids=lambda t: t[:8])
def test_configs_that_are_no_objects(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError), match=r"config|checkpoint"):
        read_config(str(saved))


def test_labels_are_checked_before_transformers_makes_them(saved):
    edit(saved, num_labels=10**15)
    with pytest.raises(ValueError, match="'num_labels' claims 1e"):
        read_config(str(saved))


def test_foreign_code_is_neither_run_nor_asked_about(saved, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (saved / "evil.py").write_text("raise SystemExit('run')")
    edit(saved, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        convert(saved)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"patch_size": 0},
        {"hidden_act": "no\x1bsuch"},
        {"model_type": "no\x1bsuch"},
        {"architectures": ["no\x1bsuch"]},
        {"architectures": {"a": 1}},
        {"dtype": "load"},
        {"quantization_config": [1]},
        {"quantization_config": {"quant_method": ["kron"]}},
    ],
    ids=str,
)
def test_broken_configs_of_the_base_model(saved, changes):
    edit(saved, **changes)
    with pytest.raises((ValueError, OSError)) as caught:
        convert(saved)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


def test_broken_weights_of_the_base_model(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"transformers cannot load this checkpoint \(SafetensorError"):
        convert(saved)
