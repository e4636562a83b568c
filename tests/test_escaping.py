"""Hostile names, of modules, tensors, labels, classes and data sets, come out of everything we show as plain text."""

import io
import json
import re
import warnings
from contextlib import redirect_stdout

import pytest
import torch
import yaml
from fuzz_checkpoints import join_safetensors, split_safetensors
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from kron_hf import KronConfig, KronLinear, get_kron_model, kron_summary, write_model_card
from kron_hf.cli import main
from kron_hf.demo.quiet import quiet_transformers
from kron_hf.demo.report import draw_masks, named_masks, save_mask_picture
from kron_hf.escaping import one_line, plain, printable, shorten, shown

# Module names may hold anything but a dot.
HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "two\nlines",
    "carriage\rreturn",
    "\u202egnp",
    "zero\u200bwidth",
    "c1\x9b31m",
    "null\x00",
    "lone\ud800surrogate",
    "line\u2028separator",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://evil)",
    "https://evil/x",
    "a | b | c",
    "```\n# injected\n```",
    "# heading",
    "$x$ {0} %s",
    "---\nlicense: mit",
    "x" * 5000,
]


def assert_clean(text: str, lines: bool = True) -> None:
    assert text.encode()
    assert all(line.isprintable() for line in (text.split("\n") if lines else [text]))


class Hostile(nn.Module):
    """A model whose modules have hostile names."""

    def __init__(self, make):
        super().__init__()
        for name in HOSTILE:
            self.add_module(name, make())
        self.head = nn.Linear(4, 4)


def outside_of_code(markdown: str) -> str:
    """What is left of a text without its fenced blocks."""
    prose, fence = [], ""
    for line in markdown.split("\n"):
        if fence:
            fence = "" if line == fence else fence
        elif line.startswith("```"):
            fence = line.rstrip("abcdefghijklmnopqrstuvwxyz")
        else:
            prose.append(line)
    assert not fence
    return "\n".join(prose)


@pytest.fixture
def kron():
    return Hostile(lambda: KronLinear(8, 8, 4, 1))


@pytest.fixture
def dense():
    return Hostile(lambda: nn.Linear(6, 6))


@pytest.fixture
def saved(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=len(HOSTILE), id2label=dict(enumerate(HOSTILE)),
    )  # fmt: skip
    get_kron_model(ViTForImageClassification(config), KronConfig(block_size=(4, 8), rank=1)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_shown_printable_and_plain(name):
    for text in (shown(name), shown([name]), shown({name: name}), printable(name), plain(name), one_line(name)):
        assert_clean(text, lines=False)
    assert len(shown(name)) <= 240
    assert len(plain(name)) <= 120
    assert "\\" in printable(name) or printable(name) == name


def test_what_is_harmless_stays():
    assert printable("vit.layers.0.mlp.fc1") == "vit.layers.0.mlp.fc1"
    assert printable("Gänseblümchen 雏菊") == "Gänseblümchen 雏菊"
    assert shown("vit.layers.0.mlp.fc1") == "'vit.layers.0.mlp.fc1'"
    assert one_line("  two\n  lines ") == "two lines"
    assert printable("a\n\x1b", keep="\n") == "a\n\\x1b"


def test_shown_is_bounded_in_depth_and_length():
    deep: object = 1
    for _ in range(100_000):
        deep = [deep]
    assert len(shown(deep)) < 100
    assert len(shown(list(range(10**6)))) < 100
    assert len(shown({str(number): [[number]] * 9 for number in range(1000)})) <= 240
    assert len(one_line("word " * 10**5)) == 1000
    assert shorten("0123456789", 10) == "0123456789"
    assert shorten("0123456789a", 10) == "012...789a"


def test_table_keeps_its_lines(kron):
    text = str(kron_summary(kron))
    assert_clean(text)
    lines = text.split("\n")
    assert len(lines) == 1 + 1 + len(HOSTILE) + 1 + 3
    assert max(map(len, lines)) < 250
    column = lines[0].index("block")
    assert all(line[column:].startswith("4 x 4") for line in lines[2:-4])
    names = json.loads(json.dumps(kron_summary(kron).to_dict()))["layers"]
    assert [layer["name"] for layer in names] == HOSTILE  # data is not text: it stays as it is


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_card(kron, tmp_path, name):
    text = write_model_card(kron, tmp_path, name=name, dataset=name, metrics={name: 1.0}).read_text(encoding="utf-8")
    assert_clean(text)
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    metadata = yaml.safe_load(front)
    assert metadata.keys() == {"library_name", "tags", "metrics", "model-index"}
    assert len(metadata["model-index"][0]["results"][0]["metrics"]) == 1
    prose = outside_of_code(body)
    ours = re.findall(r"<!-- [a-z_ :/]+ -->", prose)
    assert ours == ["<!-- written by kron_hf -->", "<!-- kron_hf: figures -->", "<!-- /kron_hf: figures -->"]
    assert prose.count("<") == 3
    assert re.findall(r"(?<!\\)\]\(([^)]*)", prose) == ["https://arxiv.org/abs/2503.21928", "kron_masks.png"]
    assert prose.count("://") == 1
    _, *headings = [line for line in prose.split("\n") if line.startswith("#")]
    assert headings == ["## Figures", "## Training", "## Limits", "## Check it", "## Licence"]
    rows = [line for line in prose.split("\n") if line.startswith("|")]
    counts = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert counts == [3] * 3 + [5] * (len(rows) - 3)


def test_masks(kron, tmp_path):
    text = draw_masks(named_masks(kron))
    assert_clean(text)
    assert "license" in text
    save_mask_picture(kron, tmp_path / "masks.png")
    assert (tmp_path / "masks.png").stat().st_size > 0


@pytest.mark.parametrize(
    "config",
    [
        KronConfig(block_size=4, rank=1),  # divides nothing
        KronConfig(block_size=4, rank=1, target_modules=HOSTILE),
        KronConfig(block_size=3, rank=1, target_modules=["nowhere", *HOSTILE[:3]], exclude_modules=HOSTILE[:3]),
        KronConfig(block_size=3, rank=1, init_weights="nearest"),
    ],
    ids=["no-match", "named", "excluded", "not-finite"],
)
def test_errors_of_a_model_with_hostile_names(dense, config):
    for module in dense.children():
        module.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"[a-z]{5}") as caught, warnings.catch_warnings(record=True):
        get_kron_model(dense, config)
    assert_clean(str(caught.value))


def test_error_of_a_converted_model(kron):
    with pytest.raises(ValueError, match=r"first: \\x1b\[31mred") as caught:
        get_kron_model(kron, KronConfig(block_size=4, rank=1))
    assert_clean(str(caught.value))


def test_warnings_of_a_model_with_hostile_names(dense):
    dense.add_module("odd\nsize\x1b", nn.Linear(5, 5))
    patterns = {re.escape(name): 9 for name in ("\x1b[1mbold", "a\nb")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_kron_model(dense, KronConfig(block_size=3, rank=8, rank_pattern=patterns, exclude_modules=["nowhere\x1b"]))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 5  # left dense, two patterns and a name without effect, FLOPs
    for message in messages:
        assert_clean(message, lines=False)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes.pop("quantization_config", {})
    path.write_text(json.dumps(config | changes))


def rename_a_tensor(folder, name):
    path = folder / "model.safetensors"
    header, payload = split_safetensors(path.read_bytes())
    header[name] = header.pop("vit.layers.0.mlp.fc1.s")
    path.write_bytes(join_safetensors(header, payload))


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
@pytest.mark.parametrize("place", ["module", "key", "entry", "tensor", "shard"])
def test_errors_of_a_hostile_checkpoint(saved, name, place):
    if place == "module":
        edit_config(saved, quantization_config={"modules": {name: {"block_size": [4, 8], "rank": 1}}})
    elif place == "key":
        edit_config(saved, quantization_config={name: 1})
    elif place == "entry":
        edit_config(saved, quantization_config={"modules": {"vit": name}})
    elif place == "tensor":
        rename_a_tensor(saved, name.replace("\ud800", "\x01"))
    else:
        (saved / "model.safetensors").rename(saved / "shard.safetensors")
        index = {"metadata": {}, "weight_map": {"a": "shard.safetensors", "b": name.replace("\x00", "\x01")}}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError)) as caught:
        AutoModelForImageClassification.from_pretrained(saved)
    assert isinstance(caught.value, UnicodeError) or len(str(caught.value)) < 1000
    assert_clean(str(caught.value), lines=False)
    assert str(saved) not in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
@pytest.mark.parametrize("key", ["model_type", "architectures", "dtype", "quant_method"])
def test_errors_of_the_command_line(saved, capsys, name, key):
    if key == "quant_method":
        edit_config(saved, quantization_config={key: name})
    else:
        edit_config(saved, **{key: [name] if key == "architectures" else name})
    assert main(["summary", str(saved)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kron-hf: error: ")
    assert err.count("\n") == 1
    assert_clean(err)


def test_summary_of_a_model_with_hostile_labels(saved, capsys):
    edit_config(saved, tags=HOSTILE, task_specific_params={HOSTILE[0]: HOSTILE[1]}, problem_type=None)
    assert main(["summary", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert_clean(out)
    assert err == ""
    model = AutoModelForImageClassification.from_pretrained(saved)
    assert list(model.config.id2label.values()) == HOSTILE
    assert_clean(write_model_card(model, saved).read_text())


def test_logs_of_transformers_are_escaped(capsys):
    logger = logging.get_logger("transformers.test")
    stream = io.StringIO()
    handler = logging.get_logger().handlers[0]
    before, handler.stream = handler.stream, stream  # type: ignore[attr-defined]
    try:
        with quiet_transformers(), redirect_stdout(io.StringIO()):
            logger.warning("\x1b[1mLOAD REPORT\x1b[0m %s\n%s", "a\x1b]0;title\x07b", "second line")
        logger.warning("\x1b[1mraw")
    finally:
        handler.stream = before  # type: ignore[attr-defined]
    escaped, _, raw = stream.getvalue().partition("second line\n")
    assert escaped.endswith("LOAD REPORT a\\x1b]0;title\\x07b\n")
    assert "\x1b[1mraw" in raw


def test_no_local_path_in_what_is_written(saved, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    model = AutoModelForImageClassification.from_pretrained(saved.resolve())
    assert model.config.name_or_path  # transformers remembers where it was loaded from
    model.save_pretrained(elsewhere)
    write_model_card(model, elsewhere)
    torch.testing.assert_close(
        AutoModelForImageClassification.from_pretrained(elsewhere).state_dict(), model.state_dict(), rtol=0, atol=0
    )
    parts = (str(saved), str(elsewhere), str(saved.parent))
    for path in elsewhere.iterdir():
        content = path.read_bytes()
        assert not any(part.encode() in content for part in parts), path.name
