import pytest
import torch
from matplotlib.figure import Figure
from tiny_cards import tiny_model
from torch import nn

from kron_hf import KronLinear, block_summary, kron_summary
from kron_hf.summary.picture import MAX_MASKS, draw_masks


def test_plot_shows_every_layer():
    summary = kron_summary(tiny_model())
    figure = summary.plot()
    assert isinstance(figure, Figure)
    sparsity, counts, *masks = figure.axes
    heights = [bar.get_height() for bar in sparsity.patches]
    assert heights == [layer.sparsity for layer in summary.layers]
    assert [bar.get_height() for bar in counts.patches] == [
        getattr(layer, name) for name in ("dense_params", "deployed_params") for layer in summary.layers
    ]
    assert (counts.get_yscale(), counts.get_ylim()[0]) == ("linear", 0)
    assert len(masks) == len(summary.layers)
    for axes, mask in zip(masks, summary.masks.values(), strict=True):
        assert (axes.images[0].get_array() == mask.float().numpy()).all()


def test_that_some_masks_are_left_out_is_said():
    summary = kron_summary(nn.Sequential(*(KronLinear(4, 4, 2, 1) for _ in range(MAX_MASKS + 2))))
    for figure in (summary.plot(), draw_masks(summary)):
        assert "(the last 48 of 50): dark = alive" in figure.texts[0].get_text()
        assert all(0 <= edge <= 1 for axes in figure.axes for edge in axes.get_position().extents)


def test_masks_of_dense_layers_with_zero_blocks_and_no_mask_on_meta():
    linear = nn.Linear(8, 4, bias=False)
    linear.weight.data[:2, :4] = 0
    masks = block_summary(linear, {"fc$x": (linear, (2, 4))}).masks
    assert masks["fc$x"].tolist() == [[False, True], [True, True]]
    assert kron_summary(KronLinear(8, 8, 4, 1, device="meta")).masks == {}


def test_masks_are_no_part_of_the_figures():
    summary = kron_summary(KronLinear(8, 8, 4, 1))
    assert "masks" not in summary.to_dict()
    assert "masks" not in repr(summary)


def test_nothing_to_plot():
    with pytest.raises(ValueError, match="no layers"):
        kron_summary(nn.Linear(2, 2)).plot()


def test_a_large_mask_is_shrunk_and_keeps_lone_blocks(tmp_path):
    layer = KronLinear(4, 1200, (1, 4), 1)
    with torch.no_grad():
        layer.s.zero_()
        layer.s[700] = 1
    image = kron_summary(layer).plot().axes[2].images[0].get_array()
    assert image.shape == (256, 1)
    assert image.sum() == 1
