"""`KronConv2d` against `F.conv2d` with the weight that the formula gives, and `nn.Conv2d`'s own geometry."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kron_hf import KronConv2d, kron_summary, model_flops
from kron_hf.ops.convolution import cheapest_way, kron_conv2d
from kron_hf.ops.geometry import Convolution
from kron_hf.sparsity.pruning import block_entries

# (in, out, kernel_size, block_size, rank) and the geometry
SHAPES = {
    "3x3": ((12, 8, 3, (4, 2), 2), {"padding": 1}),
    "1x1": ((12, 8, 1, 4, 3), {}),
    "odd": ((6, 15, (3, 2), (5, 3), 4), {"stride": (2, 1), "padding": (1, 0)}),
    "same": ((4, 6, (5, 3), (3, 2), 2), {"padding": "same"}),
    "valid-dilated": ((4, 6, 3, (2, 4), 2), {"padding": "valid", "dilation": (1, 2)}),
    "reflect": ((4, 6, 3, (2, 2), 2), {"padding": (2, 1), "padding_mode": "reflect", "stride": 2}),
    "circular-same": ((4, 6, (2, 4), (2, 2), 2), {"padding": "same", "padding_mode": "circular", "dilation": (2, 1)}),
    "replicate": ((4, 6, 3, (2, 2), 2), {"padding": 1, "padding_mode": "replicate"}),
    "patches": ((3, 8, 4, (4, 1), 2), {"stride": 4}),
    "low-rank": ((6, 4, 3, (1, -1), 2), {"padding": 1}),
    "block-is-all": ((6, 4, 2, (-1, -1), 5), {}),
    "rank-above-bo*bi": ((6, 4, 3, 1, 7), {}),
}
WAYS = ("b_first", "m_first", "build_w")


def conv_of(shape, **options) -> nn.Conv2d:
    (in_channels, out_channels, kernel, *_), geometry = SHAPES[shape]
    return nn.Conv2d(in_channels, out_channels, kernel, **geometry, **options)


def layer_of(shape, **options) -> KronConv2d:
    sizes, geometry = SHAPES[shape]
    layer = KronConv2d(*sizes, **geometry, **options)
    with torch.no_grad():
        layer.s.copy_(torch.randn_like(layer.s))  # S = 1 would hide a formula that leaves it out
    return layer


def weight_by_loops(layer):
    """The formula, entry by entry of S."""
    block_out, block_in = layer.block_size
    rows = []
    for j in range(layer.out_blocks):
        row = [
            sum(layer.s[j, k] * layer.a[i, j, k] * layer.b[i] for i in range(layer.rank))
            for k in range(layer.in_blocks)
        ]
        rows.append(torch.cat(row, 1))
    weight = torch.cat(rows)
    assert weight.shape == (layer.out_blocks * block_out, layer.in_blocks * block_in, *layer.kernel_size)
    return weight


def dense_output(layer, shape, x):
    """What `nn.Conv2d` itself computes with that weight."""
    parameters = {"weight": weight_by_loops(layer)} | ({} if layer.bias is None else {"bias": layer.bias})
    return functional_call(conv_of(shape, bias=layer.bias is not None), parameters, (x,))


# The formula


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_formula_on_every_way(shape, bias):
    layer = layer_of(shape, bias=bias, dtype=torch.float64)
    x = torch.randn(2, layer.in_channels, 9, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = dense_output(layer, shape, x)
    cotangent = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, inputs, cotangent)
    torch.testing.assert_close(layer.dense_weight(), weight_by_loops(layer))
    geometry = Convolution(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    outputs = [kron_conv2d(x, layer.s * layer.a, layer.b, layer.bias, geometry, way) for way in WAYS]
    for y in (layer(x), *outputs):
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, inputs, cotangent), grads)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_any_layout_and_those_alone_that_are_asked_for(way, layout):
    layer = layer_of("3x3", dtype=torch.float64)
    x = torch.randn(2, 12, 6, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    expected = dense_output(layer, "3x3", x)
    cotangent = torch.randn_like(expected).to(memory_format=layout)
    inputs = [x, layer.s, layer.a, layer.b]
    grads = torch.autograd.grad(expected, inputs, cotangent)
    y = kron_conv2d(x, layer.s * layer.a, layer.b, layer.bias, Convolution((3, 3), padding=(1, 1)), way)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, cotangent, retain_graph=True), grads)
    torch.testing.assert_close(torch.autograd.grad(y, inputs[:1], cotangent, retain_graph=True), grads[:1])
    torch.testing.assert_close(torch.autograd.grad(y, inputs[2:], cotangent), grads[2:])
    y = kron_conv2d(x.detach(), layer.s * layer.a, layer.b, layer.bias, Convolution((3, 3), padding=(1, 1)), way)
    torch.testing.assert_close(torch.autograd.grad(y, inputs[1:], cotangent), grads[1:])


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("way", WAYS)
def test_saved_for_backward_is_the_input_and_what_factors_take(way, padding_mode):
    layer, saved = KronConv2d(16, 16, 3, 4, 3, padding=1, padding_mode=padding_mode), {}
    x = torch.randn(4, 16, 9, 9, requires_grad=True)
    geometry = Convolution((3, 3), padding=(1, 1), padding_mode=padding_mode)
    m = (layer.s * layer.a).detach().requires_grad_()

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kron_conv2d(x, m, layer.b, layer.bias, geometry, way)
    images = {"zeros": [9], "reflect": [9, 11]}[padding_mode]  # what pads keeps its input, before dense ones as well
    assert sorted(saved.values()) == sorted([*(4 * 16 * size**2 for size in images), m.numel(), layer.b.numel()])


@pytest.mark.parametrize("shape", ["odd", "same", "reflect", "low-rank"])
def test_gradcheck(shape):
    layer = layer_of(shape, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(1, layer.in_channels, 5, 4, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["odd", "same", "reflect"])
def test_second_derivatives_and_those_of_forward_mode(shape, way):
    layer = layer_of(shape, dtype=torch.float64)
    x = torch.randn(2, layer.in_channels, 5, 6, dtype=torch.float64, requires_grad=True)
    m = (layer.s * layer.a).detach().requires_grad_()

    def function(x, m, b, bias):
        return kron_conv2d(x, m, b, bias, layer._geometry, way)

    inputs = (x, m, layer.b, layer.bias)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("lead", [(), (0,), (3,)], ids=str)
def test_leading_dimensions(lead):
    layer = layer_of("3x3")
    x = torch.randn(*lead, 12, 6, 5, requires_grad=True)
    out = layer(x)
    assert out.shape == (*lead, 8, 6, 5)
    torch.testing.assert_close(out, dense_output(layer, "3x3", x))
    out.sum().backward()
    assert x.grad.shape == x.shape
    if x.numel() == 0:
        assert all(torch.all(p.grad == 0) for p in layer.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["3x3", "1x1"])
def test_memory_formats(shape, way):
    layer = layer_of(shape)
    geometry = Convolution(layer.kernel_size, layer.stride, layer.padding)
    x = torch.randn(2, 12, 6, 5)
    factors = (layer.masked_s() * layer.a, layer.b, layer.bias, geometry, way)
    for moved in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(kron_conv2d(moved, *factors), dense_output(layer, shape, x))


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_is_moved_to_channels_last_as_nn_conv2d_is(way):
    layer = layer_of("3x3")
    x = torch.randn(2, 12, 6, 5)
    expected = layer(x)
    factors = layer.to(memory_format=torch.channels_last).b
    assert (factors.shape, layer.b is factors) == ((2, 4, 2, 3, 3), True)
    m, geometry = layer.s * layer.a, Convolution((3, 3), padding=(1, 1))
    out = kron_conv2d(x.to(memory_format=torch.channels_last), m, layer.b, layer.bias, geometry, way)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert layer.b.grad.shape == layer.b.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_dtypes(dtype, way):
    layer = layer_of("3x3", dtype=dtype)
    x = torch.randn(2, 12, 4, 4, dtype=dtype)
    y = kron_conv2d(x, layer.s * layer.a, layer.b, layer.bias, Convolution((3, 3), padding=(1, 1)), way)
    assert y.dtype == dtype
    exact = copy.deepcopy(layer).double()(x.double())
    # Both factors, what lies between and the sum over 108 products of size 1 are rounded.
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def test_autocast_computes_as_nn_conv2d_does():
    layer = layer_of("3x3")
    x = torch.randn(2, 12, 6, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == layer.to_conv()(x).dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == layer.a.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(x), rtol=32 * 2**-8, atol=32 * 2**-8)


# The way


@pytest.mark.parametrize(
    ("shapes", "strides", "way"),
    [
        (((1, 16, 16), (1, 4, 4, 3, 3)), 1, "m_first"),  # as many multiply-adds
        (((1, 32, 2), (1, 2, 32, 3, 3)), 1, "b_first"),
        (((1, 2, 32), (1, 32, 2, 3, 3)), 1, "m_first"),
        (((1, 2, 32), (1, 32, 2, 3, 3)), 16, "m_first"),
        (((1, 16, 16), (1, 4, 4, 3, 3)), 4, "b_first"),  # a stride of 2
        (((3, 16, 16), (3, 4, 4, 3, 3)), 1, "build_w"),  # 0.27 of the multiply-adds
        (((4, 16, 16), (4, 16, 16, 3, 3)), 1, "m_first"),  # 0.28 of them, but in wider blocks
        (((2, 16, 16), (2, 16, 16, 1, 1)), 1, "m_first"),
        (((1, 64, 64), (1, 1, 1, 1, 1)), 1, "build_w"),
    ],
)
def test_the_way_that_is_to_take_the_least_time_is_taken(shapes, strides, way):
    m_shape, b_shape = map(torch.Size, shapes)
    assert cheapest_way(m_shape, b_shape, strides, "cpu") == way
    if way == "build_w":
        assert cheapest_way(m_shape, b_shape, strides, "meta") != way


@pytest.mark.parametrize(("stride", "products"), [(1, 64 * 2 + 9 * 64 * 2), (4, 16 * 64 * 2 + 9 * 64 * 2)])
def test_flops_are_those_that_run(stride, products):
    """M comes first here, at every position of the input."""
    layer = KronConv2d(64, 64, 3, (32, 2), 1, stride=stride, padding=1, bias=False)
    assert layer.forward_flops == kron_summary(layer).converted.forward_flops == 2 * products
    assert model_flops(layer, torch.empty(1, 64, 8, 8)).forward == (8 // stride) ** 2 * 2 * products
    with torch.no_grad():
        layer.s[1] = 0
    ideal = kron_summary(layer).converted.ideal_forward_flops
    assert ideal == products  # half the rows of M, and B for half the outputs


# Construction


def test_parameters_are_s_a_b_and_bias():
    layer = KronConv2d(12, 8, (3, 5), (4, 2), rank=3)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {"s": (2, 6), "a": (3, 2, 6), "b": (3, 4, 2, 3, 5), "bias": (8,)}
    assert set(layer.state_dict()) == {*shapes, "weight"}
    assert layer.weight.numel() == 0
    assert KronConv2d(12, 8, 3, 4, 3, bias=False).bias is None


@pytest.mark.parametrize("shape", SHAPES)
def test_attributes_are_those_of_nn_conv2d(shape):
    layer, conv = layer_of(shape), conv_of(shape)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert {name: getattr(layer, name) for name in names} == {name: getattr(conv, name) for name in names}


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_reset_parameters_has_the_variance_of_nn_conv2d(rank):
    layer = KronConv2d(64, 256, 3, 8, rank)
    variance = nn.Conv2d(64, 256, 3).weight.var().item()
    assert torch.all(layer.s == 1)
    torch.testing.assert_close(variance, 1 / (3 * 64 * 9), rtol=0.02, atol=0)
    # a has rank * 256 entries, b rank * 576: their variances are known to about 9 % and 6 %.
    torch.testing.assert_close(layer.dense_weight().var().item(), variance, rtol=0.3, atol=0)
    bound = (64 * 9) ** -0.5
    assert 0.9 * bound < layer.bias.abs().max().item() <= bound


def test_meta_and_materialised():
    layer = KronConv2d(12, 8, 3, 4, 2, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    assert layer(torch.empty(2, 12, 5, 5, device="meta", dtype=torch.bfloat16)).shape == (2, 8, 3, 3)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer.dense_weight()).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((12, 8, 3, 5, 1), {}, "block_size (5, 5) does not divide its weight of shape (8, 12) (out, in)"),
        ((12, 8, 3, (2, 2), 37), {}, "rank must be an int from 1 to bo * bi * kh * kw = 36, got 37"),
        ((12, 8, 0, 4, 1), {}, "kernel_size must be an int or a pair of ints of at least 1, got 0"),
        ((12, 8, 3, 4, 1), {"stride": (1, 2, 3)}, "stride must be an int or a pair of ints of at least 1"),
        (
            (12, 8, 3, 4, 1),
            {"padding": "full"},
            "padding must be 'same', 'valid', an int or a pair of ints, got 'full'",
        ),
        ((12, 8, 3, 4, 1), {"padding": "same", "stride": 2}, "padding='same' needs stride 1, got stride=(2, 2)"),
        ((12, 8, 3, 4, 1), {"padding_mode": "mirror"}, "padding_mode must be one of 'zeros'"),
        ((12, 8, 3, 4, 1), {"groups": 4}, "this grouped convolution has groups=4 for (8, 12) channels (out, in)"),
        ((8, 8, 7, 4, 1), {"groups": 8}, "this depthwise convolution has groups=8 for (8, 8) channels (out, in)"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_it_cannot_be(arguments, options, message):
    with pytest.raises(ValueError, match="^KronConv2d: .*" + re.escape(message)):
        KronConv2d(*arguments, **options)


@pytest.mark.parametrize("size", [(8, 5, 5), (2, 8, 5, 5), (12,), (1, 1, 12, 5, 5)], ids=str)
def test_input_of_another_size_names_both_sizes(size):
    with pytest.raises(ValueError, match=r"x must have 12 channels.*got shape " + re.escape(str(list(size)))):
        KronConv2d(12, 8, 3, 4, 1)(torch.zeros(size))


def test_repr_shows_the_sizes():
    assert repr(KronConv2d(12, 8, 3, (4, -1), 2, padding="same", bias=False)) == (
        "KronConv2d(12, 8, kernel_size=(3, 3), stride=(1, 1), padding='same', block_size=(4, 12), rank=2, bias=False)"
    )


# From and to nn.Conv2d


@pytest.mark.parametrize("shape", SHAPES)
def test_from_conv_is_exact_at_full_rank_and_to_conv_has_the_same_function(shape):
    conv = conv_of(shape, dtype=torch.float64).eval()
    _, _, _, block_size, _ = SHAPES[shape][0]
    probe = layer_of(shape)
    layer = KronConv2d.from_conv(conv, block_size, min(probe.s.numel(), block_entries(probe)))
    torch.testing.assert_close(layer.dense_weight(), conv.weight)
    x = torch.randn(2, conv.in_channels, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))
    back = layer.to_conv()
    assert type(back) is nn.Conv2d
    assert repr(back) == repr(conv)
    assert not back.training
    torch.testing.assert_close(back(x), conv(x))
    assert torch.equal(back.bias, conv.bias)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_from_conv_is_optimal_below(rank):
    conv = nn.Conv2d(8, 9, 3, dtype=torch.float64)
    layer = KronConv2d.from_conv(conv, (3, 2), rank)
    rows = torch.stack([block.flatten() for row in conv.weight.split(3) for block in row.split(2, dim=1)])
    best = torch.linalg.svdvals(rows)[rank:].square().sum()  # Eckart-Young: no fit of this rank is closer
    torch.testing.assert_close((layer.dense_weight() - conv.weight).square().sum(), best)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (
            nn.Conv2d(8, 8, 3, groups=8),
            "KronConv2d.from_conv: groups must be 1.*this depthwise convolution has groups=8",
        ),
        (nn.Conv2d(8, 8, 3, groups=2), "KronConv2d.from_conv: groups must be 1.*this grouped convolution has groups=2"),
    ],
    ids=["depthwise", "grouped"],
)
def test_depthwise_and_grouped_convolutions_are_refused_by_name(conv, message):
    with pytest.raises(ValueError, match=message):
        KronConv2d.from_conv(conv, 2, 1)


def test_nan_weight_is_refused():
    conv = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="from_conv: the weight holds NaN or infinite values"):
        KronConv2d.from_conv(conv, 4, 2)
