import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from kron_hf import KronLinear

# (in, out, block_size, rank)
SHAPES = {
    "square-block": (12, 8, 4, 2),
    "odd-block": (15, 21, (7, 5), 3),
    "block-is-row": (10, 6, (1, -1), 2),
    "block-is-column": (10, 6, (-1, 1), 2),
    "block-is-all": (6, 5, (-1, -1), 1),
    "block-is-entry": (5, 3, 1, 1),
    "full-rank": (6, 4, (2, 3), 6),
    "wide": (33, 2, (2, 11), 4),
    "tall": (2, 33, (11, 1), 4),
    "one-to-one": (1, 1, 1, 1),
}


def layer_of(shape, **kwargs):
    in_features, out_features, block_size, rank = SHAPES[shape]
    layer = KronLinear(in_features, out_features, block_size, rank, **kwargs)
    with torch.no_grad():
        layer.s.copy_(torch.randn_like(layer.s))  # S = 1 would hide a formula that leaves it out
    return layer


def weight_by_torch_kron(layer):
    return sum(torch.kron(layer.s * a, b) for a, b in zip(layer.a, layer.b, strict=True))


def frozen_layer():
    """A layer with three zero blocks, one of them next to a negative entry, and its mask frozen."""
    layer = KronLinear(8, 12, (3, 2), rank=2)
    with torch.no_grad():
        layer.s.copy_(torch.randn_like(layer.s))
        layer.s[0, 1], layer.s[2, 3], layer.s[3, 0] = 0, 0, 0
        layer.s[0, 0] = -0.5
    layer.freeze_mask()
    return layer


DEAD = ([0, 2, 3], [1, 3, 0])


# The formula


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_formula(shape, bias):
    layer = layer_of(shape, bias=bias, dtype=torch.float64)
    x = torch.randn(7, layer.in_features, dtype=torch.float64)
    weight = weight_by_torch_kron(layer)
    torch.testing.assert_close(layer.dense_weight(), weight)
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_formula(shape):
    layer = layer_of(shape, dtype=torch.float64)
    x = torch.randn(7, layer.in_features, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    cotangent = torch.randn(7, layer.out_features, dtype=torch.float64)
    expected = torch.autograd.grad(F.linear(x, weight_by_torch_kron(layer), layer.bias), inputs, cotangent)
    torch.testing.assert_close(torch.autograd.grad(layer(x), inputs, cotangent), expected)


@pytest.mark.parametrize("shape", ["odd-block", "block-is-row", "full-rank"])
def test_gradcheck(shape):
    layer = layer_of(shape, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, layer.in_features, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 0, 5), (2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    layer = layer_of("odd-block")
    x = torch.randn(*lead, 15, requires_grad=True)
    out = layer(x)
    assert out.shape == (*lead, 21)
    torch.testing.assert_close(out, F.linear(x, weight_by_torch_kron(layer), layer.bias))
    out.sum().backward()
    assert x.grad.shape == x.shape
    if x.numel() == 0:
        assert all(torch.all(p.grad == 0) for p in layer.parameters())


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[..., :1].expand(4, 6, 15), lambda x: x[::3, 1]],
    ids=["transposed", "strided", "expanded", "sliced"],
)
def test_non_contiguous_input(view):
    layer = layer_of("odd-block")
    x = view(torch.randn(4, 6, 15))
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_non_contiguous_output_gradient():
    layer = layer_of("odd-block", dtype=torch.float64)
    x = torch.randn(4, 15, dtype=torch.float64)
    cotangent = torch.randn(21, 4, dtype=torch.float64).T
    grads = torch.autograd.grad(layer(x), list(layer.parameters()), cotangent)
    expected = torch.autograd.grad(layer(x), list(layer.parameters()), cotangent.contiguous())
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    layer = layer_of("square-block", dtype=dtype)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    x = torch.randn(5, 12, dtype=dtype, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == layer.s.grad.dtype == dtype
    exact = copy.deepcopy(layer).double()(x.double())
    # The weight is rounded once to dtype and the sum over 12 products is rounded again.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


def test_autocast_computes_as_nn_linear_does():
    layer = layer_of("square-block")
    x = torch.randn(5, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == layer.to_linear()(x).dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == layer.a.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(x), rtol=8 * 2**-8, atol=8 * 2**-8)


# Construction


def test_parameters_are_s_a_b_and_bias():
    layer = KronLinear(12, 8, (4, 2), rank=3)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {"s": (2, 6), "a": (3, 2, 6), "b": (3, 4, 2), "bias": (8,)}
    assert set(layer.state_dict()) == {*shapes, "weight"}
    assert layer.weight.numel() == 0
    without = KronLinear(12, 8, (4, 2), rank=3, bias=False)
    assert without.bias is None
    assert {name for name, _ in without.named_parameters()} == {"s", "a", "b"}


def test_device_and_dtype_arguments():
    layer = KronLinear(12, 8, 4, 2, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.bfloat16, "meta")
    assert layer(torch.empty(3, 12, device="meta", dtype=torch.bfloat16)).shape == (3, 8)


def test_materialised_from_meta():
    layer = KronLinear(12, 8, 4, 2, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.weight.device.type == "cpu"
    assert all(torch.isfinite(p).all() for p in layer.parameters())
    assert layer(torch.ones(12)).shape == (8,)


def test_weight_follows_dtype_and_device():
    layer = KronLinear(12, 8, 4, 2).half()
    assert layer.weight.dtype == torch.float16
    assert layer.to("meta").weight.device.type == "meta"
    assert layer.to(torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_reset_parameters_is_balanced(rank):
    layer = KronLinear(256, 512, 16, rank)
    assert torch.all(layer.s == 1)
    # a has rank * 512 entries: its variance is known to about sqrt(2 / 512) = 6 %, that of b to sqrt(2 / 256) = 9 %
    variance = 1 / (3 * 256)
    for factor in (layer.a, layer.b):
        torch.testing.assert_close(factor.std().item(), (variance / rank) ** 0.25, rtol=0.15, atol=0)
    torch.testing.assert_close(layer.dense_weight().var().item(), variance, rtol=0.3, atol=0)
    bound = 256**-0.5
    assert 0.9 * bound < layer.bias.abs().max().item() <= bound


def test_reset_factors_gives_the_wanted_variance():
    layer = KronLinear(512, 512, 8, 8)
    layer.reset_factors(4.0)
    # b has 512 entries: 6 %, and the product of both factors about as much
    torch.testing.assert_close(layer.dense_weight().var().item(), 4.0, rtol=0.2, atol=0)


def test_reset_parameters_lifts_a_frozen_mask():
    layer = frozen_layer()
    layer.reset_parameters()
    assert layer.sparsity == 0


@pytest.mark.parametrize(
    ("block_size", "shown"), [(3, (3, 3)), ((4, 5), (4, 5)), ((3, 4), (3, 4)), (16, (16, 16)), ((-1, 5), (8, 5))]
)
def test_block_that_does_not_divide_names_both_sizes(block_size, shown):
    message = f"KronLinear: block_size {shown} does not divide its weight of shape (8, 12) (out, in)"
    with pytest.raises(ValueError, match=re.escape(message)):
        KronLinear(12, 8, block_size, 1)


@pytest.mark.parametrize(
    "block_size",
    [0, -4, True, 4.0, "4", "16", None, (4,), (4, 4, 4), (0, 4), (4, -2), ("4", "4"), (4.0, 4), (True, 4)],
    ids=repr,
)
def test_bad_block_size(block_size):
    with pytest.raises(
        ValueError, match="block_size must be a positive int or a pair.*got " + re.escape(repr(block_size))
    ):
        KronLinear(12, 8, block_size, 1)


def test_minus_one_is_only_for_pairs():
    with pytest.raises(ValueError, match="block_size=-1 is only allowed inside a pair"):
        KronLinear(12, 8, -1, 1)


@pytest.mark.parametrize("rank", [0, -1, 9, 2.0, True, "2", None], ids=repr)
def test_bad_rank(rank):
    with pytest.raises(ValueError, match=rf"rank must be an int from 1 to bo \* bi = 8, got {re.escape(repr(rank))}"):
        KronLinear(12, 8, (2, 4), rank)


def test_input_of_another_size_names_both_sizes():
    with pytest.raises(ValueError, match=r"x must have 12 features .* got shape \[3, 8\]"):
        KronLinear(12, 8, 4, 1)(torch.zeros(3, 8))


def test_repr_shows_the_sizes():
    assert repr(KronLinear(12, 8, (4, -1), 2, bias=False)) == (
        "KronLinear(in_features=12, out_features=8, block_size=(4, 12), rank=2, bias=False)"
    )


# From and to nn.Linear


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("block_size", [2, (3, 2), (1, -1), (-1, 1)], ids=str)
def test_from_linear_is_exact_at_full_rank(block_size, bias):
    linear = nn.Linear(8, 6, bias=bias, dtype=torch.float64)
    rank = {2: 4, (3, 2): 6, (1, -1): 8, (-1, 1): 6}[block_size]
    layer = KronLinear.from_linear(linear, block_size, rank)
    torch.testing.assert_close(layer.dense_weight(), linear.weight)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    assert torch.all(layer.s == 1)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_from_linear_is_optimal_below(rank):
    linear = nn.Linear(12, 9, dtype=torch.float64)
    layer = KronLinear.from_linear(linear, (3, 2), rank)
    rows = torch.stack([block.flatten() for row in linear.weight.split(3) for block in row.split(2, dim=1)])
    best = torch.linalg.svdvals(rows)[rank:].square().sum()  # Eckart-Young: no fit of this rank is closer
    torch.testing.assert_close((layer.dense_weight() - linear.weight).square().sum(), best)


def test_from_linear_low_rank_is_the_truncated_svd():
    linear = nn.Linear(7, 5, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    layer = KronLinear.from_linear(linear, (1, -1), rank=2)
    torch.testing.assert_close(layer.dense_weight(), (u[:, :2] * values[:2]) @ vh[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_from_and_to_linear_keep_dtype_mode_and_bias(dtype):
    linear = nn.Linear(8, 6, dtype=dtype).eval()
    layer = KronLinear.from_linear(linear, 2, 4)
    back = layer.to_linear()
    assert {p.dtype for p in layer.parameters()} == {p.dtype for p in back.parameters()} == {dtype}
    assert not layer.training
    assert not back.training
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias is not linear.bias
    tolerance = 8 * torch.finfo(dtype).eps  # both factors and their product are rounded
    torch.testing.assert_close(back.weight, linear.weight, rtol=tolerance, atol=tolerance)


def test_to_linear_has_the_same_function_and_exact_zeros():
    layer = frozen_layer().double()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(linear(x), layer(x))
    blocks = linear.weight.view(4, 3, 4, 2)
    assert torch.all(blocks[DEAD[0], :, DEAD[1]] == 0)
    assert torch.count_nonzero(linear.weight) == 12 * 8 - 3 * 6


@pytest.mark.parametrize("trained", ["none", "bias", "factors"])
def test_to_linear_keeps_what_is_trained(trained):
    layer = KronLinear(8, 12, 4, 2)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_((name == "bias") == (trained == "bias") and trained != "none")
    linear = layer.to_linear()
    assert (linear.weight.requires_grad, linear.bias.requires_grad) == (trained == "factors", trained == "bias")


def test_to_linear_without_bias():
    assert KronLinear(8, 12, 4, 2, bias=False).to_linear().bias is None


def test_nan_weight_is_refused():
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="from_linear: the weight holds NaN or infinite values"):
        KronLinear.from_linear(linear, 4, 2)


# With the rest of PyTorch


def test_deepcopy_is_independent():
    layer = frozen_layer()
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.a.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_pickle_round_trip():
    layer = frozen_layer()
    twin = pickle.loads(pickle.dumps(layer))
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin.dead_blocks, layer.dead_blocks)


def test_state_dict_round_trip(tmp_path):
    layer = layer_of("odd-block")
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    twin = KronLinear(*SHAPES["odd-block"])
    assert twin.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True)).missing_keys == []
    x = torch.randn(3, 15)
    assert torch.equal(twin(x), layer(x))


def test_state_dict_of_a_dense_layer_does_not_load():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        KronLinear(8, 8, 4, 2).load_state_dict(nn.Linear(8, 8).state_dict(), strict=False)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(use_reentrant):
    layer = layer_of("odd-block")
    x = torch.randn(4, 15, requires_grad=True)
    inputs = [x, *layer.parameters()]
    layer(x).square().sum().backward()
    expected = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close([tensor.grad for tensor in inputs], expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # from Inductor
def test_compile_without_graph_breaks():
    """Two layers, one with a frozen mask, forward and backward in one compiled graph."""
    torch.manual_seed(0)
    model = nn.Sequential(KronLinear(16, 12, (3, 4), 2), nn.GELU(), frozen_layer_after(12))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 5, 16)
    expected = model(x)
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    out = compiled(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), list(model.parameters())), grads)


def frozen_layer_after(in_features):
    layer = KronLinear(in_features, 8, 4, 2)
    with torch.no_grad():
        layer.s[0, 0] = 0
    layer.freeze_mask()
    return layer


# The frozen mask


def test_block_mask_and_sparsity_count_negative_entries_as_alive():
    layer = frozen_layer()
    assert layer.block_mask.dtype == torch.bool
    assert layer.block_mask.shape == layer.s.shape
    assert bool(layer.block_mask[0, 0])  # negative
    assert (~layer.block_mask).nonzero().tolist() == [[0, 1], [2, 3], [3, 0]]
    assert layer.sparsity == pytest.approx(3 / 16)
    with torch.no_grad():
        layer.s.neg_()
    assert layer.sparsity == pytest.approx(3 / 16)


def test_an_unfrozen_zero_is_an_ordinary_value():
    layer = KronLinear(8, 12, (3, 2), 2)
    with torch.no_grad():
        layer.s[0, 1] = 0
    assert layer.sparsity == pytest.approx(1 / 16)
    layer(torch.randn(3, 8)).square().sum().backward()
    assert layer.s.grad[0, 1] != 0


def test_frozen_entries_get_no_gradient():
    layer = frozen_layer()
    layer(torch.randn(3, 8)).square().sum().backward()
    assert torch.all(layer.s.grad[DEAD] == 0)
    assert torch.all(layer.s.grad[layer.block_mask] != 0)
    assert torch.all(layer.a.grad[:, *DEAD] == 0)
    layer.s.grad = None
    layer.dense_weight().square().sum().backward()
    assert torch.all(layer.s.grad[DEAD] == 0)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.95, nesterov=True, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_zeros_stay_whatever_the_momentum_says(optimizer):
    layer, target = KronLinear(8, 12, (3, 2), 2), nn.Linear(8, 12)
    steps = OPTIMIZERS[optimizer](layer.parameters())

    def train(count):
        for _ in range(count):
            x = torch.randn(16, 8)
            steps.zero_grad()
            F.mse_loss(layer(x), target(x)).backward()
            steps.step()

    train(10)  # so that there is momentum that would move the zeros
    with torch.no_grad():
        layer.s[DEAD] = 0
    layer.freeze_mask()
    alive = layer.s.detach()[layer.block_mask].clone()
    train(30)
    blocks = layer.dense_weight().view(4, 3, 4, 2)
    assert torch.all(blocks[DEAD[0], :, DEAD[1]] == 0)
    assert torch.all(layer.state_dict()["s"][DEAD] == 0)
    assert (~layer.block_mask).sum() == 3
    assert torch.all(layer.s.detach()[layer.block_mask] != alive)  # the others were trained


def test_moved_zeros_are_masked_in_the_forward_and_mended_in_the_state_dict():
    layer = frozen_layer()
    x = torch.randn(3, 8)
    expected = layer(x)
    with torch.no_grad():
        layer.s[DEAD] = torch.tensor([1.0, -2.0, float("nan")])
    assert torch.equal(layer(x), expected)
    assert layer.sparsity == pytest.approx(3 / 16)
    assert torch.all(layer.state_dict()["s"][DEAD] == 0)
    assert torch.all(layer.s[DEAD] == 0)


def test_loaded_zeros_freeze():
    layer = KronLinear(8, 12, (3, 2), 2)
    layer.load_state_dict(frozen_layer().state_dict())
    layer(torch.randn(3, 8)).square().sum().backward()
    assert torch.all(layer.s.grad[DEAD] == 0)
    assert layer.dead_blocks.nonzero().tolist() == [[0, 1], [2, 3], [3, 0]]


def test_loaded_zeros_freeze_inside_a_model_and_when_assigned():
    stored = nn.Sequential(frozen_layer()).state_dict()
    with torch.device("meta"):
        model = nn.Sequential(KronLinear(8, 12, (3, 2), 2))
    model.load_state_dict(stored, assign=True)
    assert model[0].dead_blocks.sum() == 3


def test_loading_without_zeros_lifts_the_mask():
    layer = frozen_layer()
    layer.load_state_dict(KronLinear(8, 12, (3, 2), 2).state_dict())
    assert layer.dead_blocks is None
    assert layer.sparsity == 0


def test_loading_without_s_keeps_the_mask():
    layer = frozen_layer()
    layer.load_state_dict({"bias": torch.zeros(12)}, strict=False)
    assert layer.dead_blocks.sum() == 3


def test_a_load_that_fails_freezes_nothing():
    layer = KronLinear(8, 12, (3, 2), 2)
    with torch.no_grad():
        layer.s[DEAD] = 0
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(layer.state_dict() | {"s": torch.ones(2, 2)})
    assert layer.dead_blocks is None


def test_unfreeze_lifts_the_mask():
    layer = frozen_layer()
    with torch.no_grad():
        layer.s[0, 1] = 5.0  # as momentum would
    layer.unfreeze_mask()
    assert layer.s[0, 1] == 0  # the function does not jump
    layer(torch.randn(3, 8)).square().sum().backward()
    assert torch.all(layer.s.grad != 0)


def test_freeze_a_given_mask():
    layer = KronLinear(8, 8, 4, 1)
    dead = torch.tensor([[True, False], [False, True]])
    layer.freeze_mask(dead)
    assert torch.equal(layer.s == 0, dead)
    assert torch.equal(layer.block_mask, ~dead)
    dead.fill_(True)
    assert layer.sparsity == 0.5
    layer.freeze_mask(torch.zeros(2, 2, dtype=torch.bool))
    assert layer.dead_blocks is None


@pytest.mark.parametrize("dead", [torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2)], ids=["shape", "dtype"])
def test_freezing_a_wrong_mask_raises(dead):
    with pytest.raises(ValueError, match=r"dead must be bool of shape \[2, 2\], got torch\.\w+ of shape"):
        KronLinear(8, 8, 4, 1).freeze_mask(dead)


def test_freeze_without_zeros_freezes_nothing():
    layer = KronLinear(8, 12, (3, 2), 2)
    layer.freeze_mask()
    assert layer.dead_blocks is None


@pytest.mark.parametrize(
    "convert",
    [copy.deepcopy, lambda layer: layer.half(), lambda layer: layer.to(torch.bfloat16), lambda layer: layer.double()],
    ids=["deepcopy", "half", "bfloat16", "double"],
)
def test_the_mask_survives(convert):
    layer = convert(frozen_layer())
    assert layer.dead_blocks.dtype == torch.bool
    with torch.no_grad():
        layer.s[DEAD] = 1.0
    assert (~layer.block_mask).nonzero().tolist() == [[0, 1], [2, 3], [3, 0]]
    layer(torch.randn(3, 8, dtype=layer.s.dtype)).sum().backward()
    assert torch.all(layer.s.grad[DEAD] == 0)


def test_state_dict_on_meta_with_a_frozen_mask():
    assert frozen_layer().to("meta").state_dict()["s"].is_meta


def test_freezing_again_keeps_dead_blocks_that_an_optimizer_moved():
    layer = KronLinear(8, 8, 4, 1)
    with torch.no_grad():
        layer.s[0, 1] = 0
    layer.freeze_mask()
    with torch.no_grad():
        layer.s.add_(0.5)
    layer.freeze_mask()
    assert layer.block_mask.tolist() == [[True, False], [True, True]]
    assert layer.s[0, 1].item() == 0


def test_weight_averaging_runs_through_a_freeze():
    layer = KronLinear(8, 8, 4, 1)
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(layer)
    with torch.no_grad():
        layer.s[0, 1] = 0
    layer.freeze_mask()
    average.update_parameters(layer)
    torch.testing.assert_close(average.module.s[0, 1].item(), 0.9)


def test_the_mask_moves_with_the_layer():
    layer = KronLinear(8, 8, 4, 1)
    with torch.no_grad():
        layer.s[0, 1] = 0
    layer.freeze_mask()
    assert layer.to("meta").dead_blocks.is_meta
    assert layer.to_empty(device="cpu").dead_blocks is None  # on meta it has no values to bring


def test_the_mask_keeps_its_dtype_and_values():
    layer = frozen_layer().type(torch.float64)
    assert layer(torch.randn(3, 8, dtype=torch.float64)).dtype == torch.float64
    assert layer.to_empty(device="cpu").dead_blocks.nonzero().tolist() == [[0, 1], [2, 3], [3, 0]]


@pytest.mark.parametrize("size", [(0, 8), (8, 0)])
def test_a_layer_without_inputs_or_outputs_is_refused(size):
    with pytest.raises(ValueError, match=r"KronLinear: it needs at least one input and one output, got"):
        KronLinear(*size, 4, 1)


def test_its_dense_weight_is_exact_under_autocast():
    layer = frozen_layer()
    exact = layer.dense_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.dense_weight(), exact)
        assert torch.equal(layer.to_linear().weight, exact)
