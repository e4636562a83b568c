"""The experiment that converts a text encoder: verses, quips, every way of conversion on a tiny encoder."""

import json

import pytest

from examples.conversion import text
from examples.conversion.encoder import load_encoder, train_encoder
from examples.conversion.text import LOW_RANK, PLAN, TextConversion
from examples.conversion.text_report import table
from examples.conversion.verses import KINDS, encoded, quips, verses

BOOKS = ("Ge", "1Sm", "Psa", "Isa", "Jonah", "Mat", "Rom", "3Jn")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"{book}{number}:1 The word of {book} was number {number}." for number in range(1, 11) for book in BOOKS]
    (folder / "verses.txt").write_text("\n".join(lines) + "\n")
    fortunes = folder / "fortunes"
    fortunes.mkdir()
    (fortunes / "art").write_text("One\n\tquip.\n%\nAnother.\n%\n")
    (fortunes / "art.dat").write_text("\0 no text")
    (fortunes / "work").write_text("\n%\n".join(f"Quip {number}." for number in range(20)))
    return folder


@pytest.fixture(scope="module")
def encoder(files):
    train_encoder(files / "encoder", verses(files / "verses.txt"), masked_steps=2, steps=2, layers=1)
    return files / "encoder"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(text, "TRAINING", 60)
    monkeypatch.setattr(text, "CALIBRATION", 20)


@pytest.mark.parametrize(
    "conversion",
    [
        pytest.param({"budget": 0.25, "menu": LOW_RANK, "mixed": True}, id="low rank, mixed"),
        pytest.param(
            {"method": "random", "block_size": (4, 64), "rank": 2, "healed": "norms", "steps": 2, "learning_rate": 0.1},
            id="norms",
        ),
    ],
)
def test_a_conversion_is_measured_and_shown(conversion, files, encoder, small):
    judge = text._judge(encoder, verses(files / "verses.txt"), quips(files / "fortunes", 10))
    conversion = TextConversion(**conversion)
    row = text.measure(encoder, conversion, judge, quips(files / "fortunes", 22))
    row = json.loads(json.dumps(row | {"dense": judge.measure(load_encoder(encoder)[0])}))
    assert text._key(row) == text._key(vars(conversion))
    assert row["dense"]["feature_error"] == row["dense"]["strange_feature_error"] == 0
    assert row["dense"]["agreement"] == 1
    assert row["feature_error"] > 0
    assert row["params_of_dense"] < 0.3
    header, _, dense, line = table([row]).splitlines()
    assert header.count("|") == dense.count("|") == line.count("|")
    assert line.startswith(f"| {conversion.name} | {row['params_of_dense']:.3f} |")


def test_pruned_blocks_are_not_counted(files, encoder, small):
    judge = text._judge(encoder, verses(files / "verses.txt"), quips(files / "fortunes", 10))
    sizes = {"block_size": (4, 64), "rank": 4}
    whole, pruned = (
        text.measure(encoder, TextConversion(**sizes, target_sparsity=share), judge, []) for share in (None, 0.5)
    )
    # Of 12 d^2 weights in d = 192: 4 times 48 x 3, and 192 x 3 and 48 x 12 blocks, a rank each; 4 x 64 and a bias.
    blocks, patterns, biases = 4 * 144 + 576 + 576, 6 * 256, 9 * 192
    dense = 12 * 192**2 + biases
    assert whole["params_of_dense"] == pytest.approx((4 * (blocks + patterns) + biases) / dense, rel=1e-9)
    assert pruned["params_of_dense"] == pytest.approx((4 * (blocks / 2 + patterns) + biases) / dense, rel=1e-9)


def test_only_norms_are_healed(files, encoder, small, monkeypatch):
    trained = []
    monkeypatch.setattr(
        text,
        "distill",
        lambda model, *_, **__: trained.extend(n for n, p in model.named_parameters() if p.requires_grad),
    )
    judge = text._judge(encoder, verses(files / "verses.txt"), quips(files / "fortunes", 10))
    conversion = TextConversion(method="random", block_size=(4, 64), rank=2, healed="norms", steps=1)
    text.measure(encoder, conversion, judge, [])
    assert len(trained) == 2 + 4
    assert all("LayerNorm" in name for name in trained)


def test_verses_have_the_kinds_of_their_books(files):
    texts = verses(files / "verses.txt")
    kinds = {line.split()[3]: list(KINDS)[label] for line, label in zip(texts.lines, texts.labels, strict=True)}
    assert kinds == dict(zip(BOOKS, KINDS, strict=True))
    assert [line.split()[3] for line in texts.lines[:8]] != list(BOOKS)
    assert sum(len(books.split()) for books in KINDS.values()) == 66


@pytest.mark.parametrize("line", ["Tob1:1 Not in it.", "In the beginning"])
def test_other_lines_are_refused(line, tmp_path):
    (tmp_path / "verses.txt").write_text(f"Ge1:1 In the beginning\n{line}\n")
    with pytest.raises(ValueError, match=r"verses\.txt: a line must be like .* got '"):
        verses(tmp_path / "verses.txt")


def test_quips_are_whole_and_plain(files):
    found = quips(files / "fortunes", 22)
    assert sorted(found) == sorted(["One quip.", "Another.", *(f"Quip {number}." for number in range(20))])
    assert found != quips(files / "fortunes", 22, seed=1)
    with pytest.raises(ValueError, match="fortunes must hold at least 23 quips, has 22"):
        quips(files / "fortunes", 23)


def test_texts_are_padded_and_cut(encoder):
    _, tokenizer = load_encoder(encoder)
    batch = encoded(tokenizer, ["word", "word " * 100])
    assert batch["input_ids"].shape == (2, 40)
    assert batch["attention_mask"].sum(1).tolist() == [3, 40]


def test_all_declared_conversions_differ():
    assert len({text._key(vars(conversion)) for conversion in PLAN}) == len(PLAN)
