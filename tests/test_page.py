"""`kron-hf inspect`: one page, whole, escaped, with nothing from elsewhere."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_cards import HISTORY, tiny_model

from kron_hf import KronLinear, kron_summary
from kron_hf.cli import main
from kron_hf.page.curves import draw_charts
from kron_hf.page.grid import draw_grid, draw_legend
from kron_hf.page.html import build_page
from kron_hf.page.layers import layer_pictures
from kron_hf.page.png import MAX_CELLS, heatmap
from kron_hf.training_history import curves_of, read_history

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e"


VOID = {"meta", "image", "circle", "path", "polyline", "rect"}


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "model"
    model = tiny_model()
    model.save_pretrained(folder)
    for step in (3, 20):
        (folder / f"checkpoint-{step}").mkdir()
        state = {"log_history": HISTORY if step == 20 else []}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert main(["inspect", str(folder), "--html", str(folder / "out.html")]) == 0
    return folder, model, (folder / "out.html").read_text()


def test_page_is_well_formed_and_self_contained(saved):
    page = Tags(saved[2])
    assert page.open == []
    assert {"script", "link", "iframe", "img", "object", "base", "form"}.isdisjoint(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "srcset", "action", "xlink:href")]
    assert links
    assert all(value.startswith("data:image/png;base64,") for value in links)
    assert not [name for name, _ in page.attributes if name == "style" or name.startswith("on")]
    assert "url(" not in saved[2]
    assert "@import" not in saved[2]


def test_policy_allows_the_style_of_the_page_and_nothing_else(saved):
    style = re.search("<style>(.*?)</style>", saved[2], re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'" in saved[2]
    assert 'name="viewport" content="width=device-width' in saved[2]


def test_page_tells_every_layer_and_curve(saved):
    _, model, page = saved
    for layer in kron_summary(model).layers:
        assert page.count(f"<b>{layer.name}</b>") == 1
        assert f"{layer.deployed_params:,}" in page
    assert page.count('<svg class="mask"') == 6
    assert page.count('<figure class="chart">') == 3


def test_the_colour_of_zero_covers_the_weight_and_no_more(saved):
    assert saved[2].count('viewBox="0 0 32 64" role="img"') == 1  # fc1, taller than wide: it leaves room at its sides
    assert saved[2].count('<rect class="zero" width="32" height="64"/>') == 1
    assert ".mask" not in re.search("<style>(.*?)</style>", saved[2], re.DOTALL)[1]


def test_the_legend_has_the_colours_of_the_heatmaps():
    data = re.search('data:image/png;base64,([^"]*)', draw_legend())[1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))[0]
    ends = heatmap(torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool))
    light, dark = np.asarray(Image.open(io.BytesIO(ends)).convert("RGBA"))[0]
    assert (shown[0] == light).all()
    assert (shown[-1] == dark).all()


def layers_named(*names):
    model = torch.nn.Module()
    for name in names:
        parent = model
        for part in name.split(".")[:-1]:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent._modules[part]
        parent.add_module(name.split(".")[-1], KronLinear(4, 4, 2, 1))
    return kron_summary(model)


def test_a_stage_tells_the_range_of_its_sparsities(saved):
    assert "<summary><b>vit.layers.0</b> 6 layers, sparsity 0.06 to 0.12</summary>" in saved[2]


def test_layers_of_a_stage_are_together():
    page = draw_grid(layers_named("head", "net.0.fc1", "net.0.mlp.1.fc", "net.1.fc1", "net.fc"), {})
    stages = re.findall("<summary><b>(.*?)</b> (.*?)</summary>", page)
    assert stages == [
        ("", "1 layer, sparsity 0.00"),
        ("net.0", "2 layers, sparsity 0.00"),
        ("net.1", "1 layer, sparsity 0.00"),
        ("net", "1 layer, sparsity 0.00"),
    ]


@pytest.mark.parametrize(("count", "unfolded"), [(24, 24), (25, 1)])
def test_of_many_layers_only_the_first_stage_is_unfolded(count, unfolded):
    page = draw_grid(layers_named(*(f"net.{number}.fc" for number in range(count))), {})
    assert (page.count("<details open>"), page.count("<details")) == (unfolded, count)


def test_no_partial_file_is_left(saved, tmp_path, capsys):
    assert [path.name for path in saved[0].iterdir() if "partial" in path.name] == []
    assert main(["inspect", str(saved[0]), "--html", str(tmp_path)]) == 1
    assert "is a directory" in capsys.readouterr().err
    assert main(["inspect", str(saved[0]), "--html", str(tmp_path / "no" / "out.html")]) == 1
    assert "is no directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_strangers_text_is_escaped():
    model = torch.nn.ModuleDict({"fc": next(m for m in tiny_model().modules() if hasattr(m, "s"))})
    model._modules[HOSTILE] = model._modules.pop("fc")
    curves = {HOSTILE: [(1, 0.5), (2, 1e308), (3, -1e308)], "loss": [(1, 2.0), (2, 1.0)]}
    page = build_page(HOSTILE, HOSTILE, kron_summary(model), layer_pictures(model), curves)
    assert "script" not in Tags(page).tags
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "nan" not in page.lower().split("</style>")[1]


def test_heatmap_is_blank_exactly_where_blocks_are_zero():
    norms = torch.tensor([[0.0, 1.0, 4.0], [2.0, 0.0, 1e-20]])
    picture = Image.open(io.BytesIO(heatmap(norms, norms > 0))).convert("RGBA")
    alpha = np.asarray(picture)[..., 3]
    assert (alpha > 0).tolist() == (norms > 0).tolist()
    lightness = np.asarray(picture.convert("L")).astype(int)
    assert lightness[0, 2] < lightness[1, 0] < lightness[0, 1] < lightness[1, 2]


def test_a_large_layer_is_drawn_small_and_a_lone_block_stays_visible():
    norms = torch.zeros(1000, 3)
    norms[777, 1] = 5.0
    picture = Image.open(io.BytesIO(heatmap(norms, norms > 0))).convert("RGBA")
    assert picture.size == (3, MAX_CELLS)
    assert (np.asarray(picture)[..., 3] > 0).sum() == 1


def test_norms_that_are_not_finite_are_drawn():
    norms = torch.tensor([[torch.nan, torch.inf, 1.0]])
    alpha = np.asarray(Image.open(io.BytesIO(heatmap(norms, torch.ones(1, 3, dtype=torch.bool)))).convert("RGBA"))
    assert (alpha[..., 3] == 255).all()


def test_history_of_strangers():
    history = [{"step": 1, "loss": "x", "a": float("nan"), "b": True}, 3, {"loss": 1.0}, {"step": -1, "loss": 1.0}]
    assert curves_of([*history, {"step": 2, "loss": 3, "train_runtime": 1.0}, {"step": 5, "loss": 2.5}]) == {
        "loss": [(2, 3.0), (5, 2.5)]
    }
    many = curves_of({"step": step, "loss": float(step)} for step in range(10_000))
    assert len(many["loss"]) <= 2001
    assert (many["loss"][0], many["loss"][-1]) == ((0, 0.0), (9999, 9999.0))
    assert draw_charts({}) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"log_history": 1}', "[" * 100_000])
def test_malformed_history_is_refused(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"trainer_state\.json"):
        read_history(tmp_path)
