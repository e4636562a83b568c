import pytest
import torch
import yaml
from families import FAMILIES
from huggingface_hub import ModelCard
from peft import get_peft_model
from PIL import Image
from tiny_peft import quiet_peft
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, KronLinear, get_kron_model
from kron_hf.model_card import add_usage, escape_markdown, write_model_card


@pytest.fixture
def model():
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, num_labels=10,
    )  # fmt: skip
    return get_kron_model(ViTForImageClassification(config), KronConfig(block_size=4, rank=2))


def test_card_has_import_line_metrics_and_metadata(model, tmp_path):
    path = write_model_card(model, tmp_path, name="me/vit", dataset="digits", metrics={"accuracy": 0.975})
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers"
    assert "kron_hf" in card.data.tags
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.eval_results[0].metric_value == 0.975
    assert "\nimport kron_hf" in card.text
    assert "AutoModelForImageClassification.from_pretrained('me/vit')" in card.text
    assert "| accuracy | 0.9750 |" in card.text
    assert "measured on the data named above" in card.text
    assert "vit.layers.0.mlp.fc1" in card.text


def test_what_was_not_measured_is_said(model, tmp_path):
    text = write_model_card(model, tmp_path).read_text()
    assert "How good it is was not measured." in text
    assert "named above" not in text


def test_a_report_is_shown_as_it_is_and_cannot_end_its_box(model, tmp_path):
    report = "a  b\n----\n1  2\n```\n\x1b[31m<b>"
    text = write_model_card(model, tmp_path, report=report).read_text()
    assert "````text\na  b\n----\n1  2\n```\n\\x1b[31m<b>\n````" in text


def test_snippet_of_the_card_runs(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    text = write_model_card(model, tmp_path).read_text()
    monkeypatch.chdir(tmp_path.parent)
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    torch.testing.assert_close(names["model"].state_dict(), model.state_dict(), rtol=0, atol=0)
    assert names["AutoModelForImageClassification"] is AutoModelForImageClassification


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("a\n---\nlicense: mit", id="yaml"),
        pytest.param("```\n# injected", id="fence"),
        pytest.param("'); import os; os.abort() #", id="python"),
        pytest.param("<script>alert(1)</script>", id="html"),
        pytest.param("[x](javascript:alert)|*b*", id="markdown"),
    ],
)
def test_names_cannot_break_out(model, tmp_path, name):
    text = write_model_card(model, tmp_path, name=name, dataset=name, metrics={"accuracy": 1.0}).read_text()
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    metadata = yaml.safe_load(front)
    assert metadata["model-index"][0]["name"] == name
    assert "license" not in metadata
    title = next(line for line in body.splitlines() if line.startswith("# "))
    assert title == f"# {escape_markdown(name)}"
    assert "<script>" not in title
    fence = next(line for line in body.splitlines() if line.startswith("```")).removesuffix("python")
    code = body.split(f"{fence}python\n")[1].split(f"\n{fence}\n")[0]
    assert compile(code, "card", "exec")
    assert repr(name) in code


@pytest.mark.parametrize("place", ["{}/model", "~/model", "./model", "../model"])
def test_of_a_local_path_only_the_last_part_is_told(model, tmp_path, place):
    local = place.format(tmp_path)
    text = write_model_card(model, tmp_path, name=local, dataset=local, metrics={"accuracy": 1.0}).read_text()
    assert str(tmp_path) not in text
    assert local not in text
    assert "from_pretrained('model')" in text
    assert "Measured on model:" in text


def test_usage_is_added_once_to_a_card_of_others(model, tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n\nmine\n")
    add_usage(card, model, f"{tmp_path}/model")
    once = card.read_text()
    assert once.startswith("---\nlicense: mit\n---\n\nmine\n")
    assert "\nimport kron_hf" in once
    assert "vit.layers.0.mlp.fc1" in once
    assert str(tmp_path) not in once
    add_usage(card, model, "other")
    assert card.read_text() == once


def test_markdown_is_escaped():
    assert escape_markdown("a_b *c*\n# d") == r"a\_b \*c\* \# d"


def test_foreign_readme_is_kept(model, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_model_card(model, tmp_path)
    assert readme.read_text() == "mine"
    write_model_card(model, tmp_path, overwrite=True)
    write_model_card(model, tmp_path, name="again")
    assert "# again" in readme.read_text()


def test_plain_module_and_default_name(tmp_path):
    directory = tmp_path / "my_net"
    directory.mkdir()
    text = write_model_card(nn.Sequential(KronLinear(8, 8, 4, 1)), directory).read_text()
    assert "# my\\_net" in text
    assert "pipeline_tag" not in text


def test_bad_arguments(model, tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        write_model_card(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="need dataset="):
        write_model_card(model, tmp_path, metrics={"accuracy": 1.0})
    with pytest.raises(ValueError, match="metrics must be finite numbers, got 'loss': nan"):
        write_model_card(model, tmp_path, dataset="digits", metrics={"accuracy": 1.0, "loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_the_empty_template_of_peft_is_replaced_but_not_a_card_that_someone_filled_in(tmp_path):
    with quiet_peft():
        adapter = get_peft_model(FAMILIES["vit"](), KronConfig(block_size=4, rank=1, init_weights="random"))
    adapter.save_pretrained(tmp_path)
    template = (tmp_path / "README.md").read_text()
    assert "import kron_hf" not in template
    assert "import kron_hf" in write_model_card(adapter, tmp_path).read_text()
    (tmp_path / "README.md").write_text(template.replace("[More Information Needed]", "Trained by me."))
    with pytest.raises(FileExistsError, match="was not written by kron_hf"):
        write_model_card(adapter, tmp_path)


def test_plots_of_benchmarks_are_copied_shown_and_removed_with_the_next_card(model, tmp_path):
    plot, folder = tmp_path / "speed.png", tmp_path / "model"
    folder.mkdir()
    Image.new("RGB", (2, 2)).save(plot)
    write_model_card(model, folder, plots={"speed": plot, "roofline": str(plot)})
    card = (folder / "README.md").read_text()
    assert "over rank and block size](kron_speed.png)" in card
    assert "](kron_roofline.png)" in card
    assert (folder / "kron_speed.png").read_bytes() == plot.read_bytes()
    write_model_card(model, folder, plots={"roofline": folder / "kron_roofline.png"})
    assert not (folder / "kron_speed.png").exists()
    assert "kron_speed.png" not in (folder / "README.md").read_text()


def test_plots_of_other_names_or_formats_are_refused(model, tmp_path):
    (tmp_path / "plot.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"plots must be named speed or roofline, got \['latency'\]"):
        write_model_card(model, tmp_path, plots={"latency": tmp_path / "plot.svg"})
    with pytest.raises(ValueError, match="plots must be PNG files, and speed is none"):
        write_model_card(model, tmp_path, plots={"speed": tmp_path / "plot.svg"})
    assert not (tmp_path / "README.md").exists()
