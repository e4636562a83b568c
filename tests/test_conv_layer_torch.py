"""`KronConv2d` with the rest of PyTorch: optimizers and its frozen mask, copies, folding, compilation and export."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import nn

from kron_hf import KronConv2d, fold_for_inference
from kron_hf.ops import folded_convolution
from kron_hf.ops.cost import Dropped


def frozen_layer() -> KronConv2d:
    layer = KronConv2d(8, 12, 3, (3, 2), rank=2, padding=1)
    with torch.no_grad():
        layer.s.copy_(torch.randn_like(layer.s))
        layer.s[0, 1], layer.s[2, 3], layer.s[3, 0] = 0, 0, 0
        layer.s[0, 0] = -0.5
    layer.freeze_mask()
    return layer


def test_a_frozen_mask_holds_under_momentum_and_weight_decay():
    layer = frozen_layer()
    dead = ~layer.block_mask
    assert int(dead.sum()) == 3
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 8, 4, 4)).square().sum().backward()
        assert torch.all(layer.s.grad[dead] == 0)
        optimizer.step()
    weight = layer.to_conv().weight
    blocks = weight.view(4, 3, 4, 2, 9).transpose(1, 2)
    assert torch.all(blocks[dead] == 0)
    assert int((weight == 0).sum()) == 3 * 3 * 2 * 9
    assert torch.all(layer.state_dict()["s"][dead] == 0)
    loaded = KronConv2d(8, 12, 3, (3, 2), rank=2, padding=1)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.dead_blocks, dead)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deep", "pickle"]
)
def test_copies_are_independent(copied):
    layer = frozen_layer()
    twin = copied(layer)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.a.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_state_dict_of_a_dense_layer_does_not_load():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        KronConv2d(8, 8, 3, 4, 2).load_state_dict(nn.Conv2d(8, 8, 3).state_dict(), strict=False)


@pytest.mark.parametrize("keep_weight", [False, True])
@pytest.mark.parametrize("rank", [1, 16], ids=["factors", "build-w"])
def test_folding_gives_the_same_and_is_lifted_by_writes(rank, keep_weight):
    layer = KronConv2d(64, 64, 3, 4, rank, padding=1, padding_mode="circular")
    with torch.no_grad():
        layer.s[1, 2] = 0
    layer.freeze_mask()
    x = torch.randn(2, 64, 5, 5)
    expected = layer(x).detach()
    fold_for_inference(layer, keep_weight=keep_weight)
    assert (layer.folded.weight is not None) == (keep_weight and rank == 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        layer.s[0, 0] = 5
        changed = layer(x)
    assert layer.folded is None
    torch.testing.assert_close(
        changed, F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), layer.dense_weight(), layer.bias)
    )


@pytest.mark.parametrize("keep_weight", [False, True])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rank", [1, 16], ids=["factors", "build-w"])
@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True), (True, True)], ids=str)
def test_without_dead_channels_the_result_is_the_same(monkeypatch, rows, columns, rank, bias, keep_weight):
    layer = KronConv2d(64, 48, 3, 4, rank, stride=(1, 2), padding=1, padding_mode="reflect", bias=bias).double().eval()
    with torch.no_grad():
        layer.s.normal_()
        layer.s[1:3], layer.s[:, 2:5], layer.s[0, 0] = 0, 0, 0
    layer.freeze_mask()
    x = torch.randn(2, 64, 4, 6, dtype=torch.float64)
    monkeypatch.setattr(folded_convolution, "worth_dropping", lambda *_: Dropped(rows, columns))
    with torch.no_grad():
        expected = layer(x)
        fold_for_inference(layer, keep_weight=keep_weight)
        assert (layer.folded.rows is not None, layer.folded.columns is not None) == (rows, columns)
        assert (layer.folded.weight is not None) == (keep_weight and rank == 16)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
        torch.testing.assert_close(layer(x[1]), expected[1])
        assert layer(x[:0]).shape == (0, *expected.shape[1:])
    assert layer.folded is not None


@pytest.mark.parametrize(
    ("shape", "living", "dropped"),
    [
        pytest.param((32, 32, 3, 4, 8), (16, 32), (True, False), id="rows"),
        pytest.param((32, 32, 3, 4, 8), (32, 16), (False, True), id="columns"),
        pytest.param((32, 32, 3, 4, 8), (16, 16), (True, True), id="both"),
        pytest.param((32, 32, 3, 4, 8), (31, 32), (False, False), id="too few to pay"),
        pytest.param((32, 32, 1, 4, 1), (24, 32), (False, False), id="too little work to pay"),
        pytest.param((32, 32, 3, 4, 8), (0, 0), (False, False), id="all dead"),
        pytest.param((32, 32, 3, 4, 8), (32, 32), (False, False), id="all alive"),
    ],
)
def test_dead_channels_are_left_out_where_it_pays(shape, living, dropped):
    out_blocks, in_blocks, kernel, block, rank = shape
    layer = KronConv2d(in_blocks * block, out_blocks * block, kernel, block, rank)
    assert folded_convolution.worth_dropping(layer.a, layer.b, 1, *living) == dropped


def test_dead_channels_under_autocast_and_in_an_exported_graph():
    layer = KronConv2d(128, 128, 3, 4, 8, padding=1).eval()
    with torch.no_grad():
        layer.s[:24], layer.s[:, 8:] = 0, 0
    layer.freeze_mask()
    x = torch.randn(2, 128, 4, 4)
    expected = layer(x).detach()
    fold_for_inference(layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert (layer.folded.rows is not None, found.dtype) == (True, torch.bfloat16)
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)
    # Before 2.13 torch does not see that four times a height is less than sixteen times.
    named = Version(torch.__version__) >= Version("2.13")
    height = torch.export.Dim("height", min=2) if named else torch.export.Dim.AUTO
    dims = ({0: torch.export.Dim("batch", min=1), 2: height},)
    graph = torch.export.export(layer, (x,), dynamic_shapes=dims).module()
    for size in ((1, 128, 4, 4), (3, 128, 6, 4)):
        x = torch.randn(size)
        torch.testing.assert_close(graph(x), copy.deepcopy(layer)(x))


def test_compile_has_no_graph_break():
    """Two layers, one with a frozen mask, forward and backward in one compiled graph."""
    model = nn.Sequential(KronConv2d(4, 8, 3, 2, 1, padding=1, padding_mode="circular"), nn.ReLU(), frozen_layer())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    out = compiled(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), list(model.parameters())), grads)


def test_export_with_any_batch_and_size_of_images():
    model = nn.Sequential(KronConv2d(8, 16, 3, 4, 1, padding=1), nn.ReLU(), KronConv2d(16, 8, 3, 4, 8, stride=2)).eval()
    batch, height = torch.export.Dim("batch", min=1), torch.export.Dim("height", min=9)
    exported = torch.export.export(model, (torch.randn(2, 8, 9, 7),), dynamic_shapes=({0: batch, 2: height},)).module()
    for size in ((1, 8, 9, 7), (5, 8, 12, 7)):
        x = torch.randn(size)
        torch.testing.assert_close(exported(x), model(x))
