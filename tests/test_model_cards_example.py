"""`model_cards/`: what lies there is what the command writes, and it verifies before it is copied."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from examples.model_cards import NAME, write_cards
from kron_hf.claims import read_claims
from kron_hf.claims.files import file_claim
from kron_hf.demo.training import Recipe
from kron_hf.model_card.figures import find_figures

FOLDER = Path(__file__).parent.parent / "model_cards"


def test_the_template_is_that_of_the_package():
    packaged = files("kron_hf.model_card").joinpath("template.md").read_text()
    assert (FOLDER / "template.md").read_text() == packaged


def test_the_card_and_its_claims_belong_together():
    claims, card = read_claims(FOLDER / NAME), ModelCard.load(FOLDER / NAME / "README.md")
    for name in ("README.md", "kron_masks.png", "kron_training.png"):
        assert file_claim(FOLDER / NAME / name) == claims.files[name]
    figures = find_figures(card.content)
    assert figures is not None
    for count in ("total_params", "nonzeros", "deployed_params", "image_flops"):
        assert f"{claims.whole[count]:,}" in figures
    assert [result.metric_value for result in card.data.eval_results] == [claims.metrics[0].value]
    assert len(claims.stated["commit"]) == 40


@pytest.mark.slow
def test_the_command_writes_what_verifies(tmp_path):
    said = []
    tiny = Recipe(hidden_size=32, layers=1, epochs=4, learning_rates=(3e-3,), block_size=4, rank=2)
    write_cards(tmp_path, recipe=tiny, write=said.append)
    assert any("every claim that was checked holds" in text for text in said)
    assert {path.name for path in (tmp_path / NAME).iterdir()} == {
        *("README.md", "kron_claims.json", "kron_masks.png", "kron_training.png")
    }
    assert json.loads((tmp_path / NAME / "kron_claims.json").read_text())["metrics"][0]["metric"] == "accuracy"
