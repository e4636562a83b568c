"""`fold_for_inference`: the same function, and never that of factors as they were before."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kron_hf import KronLinear, fold_for_inference
from kron_hf.factors import kron_weight
from kron_hf.ops import cost

# Large enough for the cost model to leave dead block rows and columns out.
FEATURES, BLOCK, TOKENS = 768, 16, 32
BLOCKS = FEATURES // BLOCK


def sparse_layer(rows=slice(0, 0), columns=slice(0, 0), *, freeze=True, bias=True, dtype=torch.float64):
    """A layer whose S is zero in these block rows and columns, and in one other place."""
    layer = KronLinear(FEATURES, FEATURES, BLOCK, 4, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.s.normal_()
        layer.s[rows], layer.s[:, columns], layer.s[-1, -1] = 0, 0, 0
    if freeze:
        layer.freeze_mask()
    return layer.eval()


def small_layer():
    layer = KronLinear(12, 8, 4, 2).eval()
    with torch.no_grad():
        layer.s.normal_()
        layer.s[0, 1] = 0
    layer.freeze_mask()
    return layer


def result(layer, x):
    with torch.no_grad():
        return layer(x)


@pytest.fixture
def folded():
    """A small folded layer, an input, and what it gave before."""
    layer, x = small_layer(), torch.randn(5, 12)
    expected = result(layer, x)
    assert fold_for_inference(layer) is layer
    return layer, x, expected


DEAD = [
    pytest.param((slice(0, 0), slice(0, 0)), (False, False), id="none"),
    pytest.param((slice(3, 30), slice(0, 0)), (True, False), id="rows"),
    pytest.param((slice(0, 0), slice(5, 40)), (False, True), id="columns"),
    pytest.param((slice(0, 36), slice(10, 40)), (True, True), id="both"),
    pytest.param((slice(0, 1), slice(0, 1)), (False, False), id="too-few-to-pay"),
    pytest.param((slice(None), slice(None)), (False, False), id="all"),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("dead", "dropped"), DEAD)
def test_dead_rows_and_columns_are_left_out_and_the_result_is_the_same(dead, dropped, bias):
    layer = sparse_layer(*dead, bias=bias)
    x = torch.randn(2, TOKENS // 2, FEATURES, dtype=torch.float64)
    expected = result(layer, x)
    fold_for_inference(layer)
    assert (layer.folded.rows is not None, layer.folded.columns is not None) == dropped
    torch.testing.assert_close(result(layer, x), expected)
    for strided in (x.transpose(0, 1), x[0, 0], x[:, :0]):
        torch.testing.assert_close(result(layer, strided), result(copy.deepcopy(layer), strided))
    assert layer.folded is not None


def test_what_is_not_left_out_gives_the_same_bits(folded):
    layer, x, expected = folded
    assert torch.equal(result(layer, x), expected)
    assert torch.equal(layer.folded.m, layer.masked_s() * layer.a)


def test_the_factors_are_used_as_folded(folded, monkeypatch):
    layer, x, expected = folded
    monkeypatch.setattr(KronLinear, "masked_s", lambda self: pytest.fail("S was folded again"))
    assert torch.equal(result(layer, x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_dead_entries_that_an_optimizer_moved_stay_dead():
    layer, x = small_layer(), torch.randn(5, 12)
    expected = result(layer, x)
    with torch.no_grad():
        layer.s[0, 1] = 3
    assert torch.equal(result(fold_for_inference(layer), x), expected)


def test_with_gradients_the_factors_are_trained_as_ever(folded):
    layer, x, expected = folded
    out = layer(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_in_evaluation_mode_lifts_the_fold(folded, optimizer):
    """Though torch does not notice what fused optimizers write."""
    layer, x, _ = folded
    steps = optimizer(layer.parameters(), lr=0.1, fused=True)
    layer(x).square().sum().backward()
    steps.step()
    steps.zero_grad()
    with torch.no_grad():
        expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(result(layer, x), expected)


def test_gradients_for_the_input_alone_leave_the_fold(folded):
    layer, x, expected = folded
    layer.requires_grad_(False)
    assert torch.equal(layer(x.requires_grad_()), expected)
    assert layer.folded is not None


def test_forward_mode_derivatives_see_the_factors(folded):
    layer, x, _ = folded
    values = dict(layer.named_parameters())
    directions = {name: torch.randn_like(value) for name, value in values.items()}
    with torch.no_grad():
        _, found = torch.func.jvp(lambda values: functional_call(layer, values, (x,)), (values,), (directions,))

    def dense(values):
        return nn.functional.linear(x, kron_weight(values["s"], values["a"], values["b"]), values["bias"])

    values, directions = values | {"s": layer.masked_s()}, directions | {"s": directions["s"] * layer.block_mask}
    _, expected = torch.func.jvp(dense, (values,), (directions,))
    torch.testing.assert_close(found, expected)


def test_autocast(folded):
    layer, x, _ = folded
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = result(layer, x), result(copy.deepcopy(layer), x)
    assert out.dtype == torch.bfloat16
    # S * A is rounded to bfloat16 once in place of twice.
    torch.testing.assert_close(out, expected, rtol=4 * 2**-8, atol=4 * 2**-8)


def test_dead_rows_under_autocast():
    layer = fold_for_inference(sparse_layer(slice(3, 30), dtype=torch.float32))
    x = torch.randn(TOKENS, FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        out = result(layer, x)
    assert (layer.folded.rows is not None, out.dtype) == (True, torch.bfloat16)
    torch.testing.assert_close(out[:, 48:480], layer.bias[48:480].bfloat16().expand(TOKENS, -1))


def write_a(layer):
    with torch.no_grad():
        layer.a.mul_(2)


def write_detached(layer):
    layer.s.detach().mul_(2)


def step(layer):
    layer.b.grad = torch.ones_like(layer.b)
    torch.optim.SGD([layer.b], lr=0.1).step()


CHANGES = {
    "in-place": write_a,
    "detached": write_detached,
    "optimizer": step,
    "new-data": lambda layer: setattr(layer.a, "data", 2 * layer.a.data),
    "new-parameter": lambda layer: setattr(layer, "a", nn.Parameter(2 * layer.a.detach())),
    "load": lambda layer: layer.load_state_dict(small_layer().state_dict()),
    "load-assign": lambda layer: layer.load_state_dict(small_layer().state_dict(), assign=True),
    "reset": KronLinear.reset_parameters,
    "train": lambda layer: layer.train().eval(),
    "freeze": lambda layer: layer.freeze_mask(torch.eye(2, 3) == 1),
    "dtype": lambda layer: layer.double().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_factors_lift_the_fold(folded, change):
    layer, x, _ = folded
    change(layer)
    fresh = KronLinear(12, 8, 4, 2)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(result(layer, x), result(fresh, x))
    assert layer.folded is None


@pytest.mark.parametrize(
    "change", [CHANGES["load"], CHANGES["train"], nn.Module.double], ids=["load", "train", "double"]
)
def test_its_memory_is_given_back_at_once(folded, change):
    layer, _, _ = folded
    change(layer)
    assert layer.folded is None


def test_the_bias_may_change(folded):
    layer, x, expected = folded
    with torch.no_grad():
        layer.bias += 1
    torch.testing.assert_close(result(layer, x), expected + 1)
    assert layer.folded is not None


def test_other_tensors_for_a_while(folded):
    layer, x, _ = folded
    others = {name: 2 * tensor.detach() for name, tensor in layer.named_parameters()}
    with torch.no_grad():
        out = torch.func.functional_call(layer, others, (x,))
    for parameter in layer.parameters():
        parameter.data.mul_(2)
    layer.folded = None
    assert torch.equal(out, result(layer, x))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_not_folded(folded, copied):
    layer, x, expected = folded
    twin = copied(layer)
    assert twin.folded is None
    assert torch.equal(result(twin, x), expected)
    with torch.no_grad():
        twin.a.zero_()
    assert torch.equal(result(twin, x), layer.bias.expand(5, -1))


def test_nothing_of_it_is_saved_and_the_memory_is_that_of_s_times_a(folded):
    layer, _, _ = folded
    assert layer.state_dict().keys() == small_layer().state_dict().keys()
    assert [name for name, _ in layer.named_buffers()] == ["weight"]
    own = [layer.folded.m, layer.folded.rows, layer.folded.columns, layer.folded.weight]
    assert sum(tensor.nbytes for tensor in own if tensor is not None) == layer.a.nbytes


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # from Inductor
def test_compile_has_no_graph_break_and_sees_changes(folded):
    layer, x, expected = folded
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(result(compiled, x), expected)
    with torch.no_grad():
        layer.a.mul_(2)
        layer.bias.zero_()
        layer.b.mul_(0.5)
    torch.testing.assert_close(result(compiled, x), result(copy.deepcopy(layer), x))
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_export_without_dead_rows_and_columns(grad):
    layer = fold_for_inference(sparse_layer(slice(0, 30), slice(10, 40)))
    x = torch.randn(TOKENS, FEATURES, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(layer, (x,))
    torch.testing.assert_close(result(program.module(), x), result(copy.deepcopy(layer), x))
    products = [node for node in program.graph.nodes if "kron_linear" in str(node.target)]
    assert [node.meta["val"].shape for node in products] == [(TOKENS, FEATURES - 30 * BLOCK)]


@pytest.mark.parametrize(("dead", "_dropped"), DEAD)
def test_export_for_any_number_of_tokens(dead, _dropped):
    layer = fold_for_inference(sparse_layer(*dead))
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},))
    other = torch.randn(5, 7, FEATURES, dtype=torch.float64)
    torch.testing.assert_close(result(program.module(), other), result(layer, other))


@pytest.mark.parametrize("keep_weight", [False, True])
def test_folding_under_autocast_rounds_nothing(keep_weight):
    layer, x = KronLinear(32, 32, 4, 8).eval(), torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        fold_for_inference(layer, tokens=4, keep_weight=keep_weight)
    kept = layer.folded.weight if keep_weight else layer.folded.m
    assert kept.dtype == torch.float32
    torch.testing.assert_close(result(layer, x), result(copy.deepcopy(layer), x))


def test_export_of_changed_factors_is_that_of_the_new_ones():
    layer = fold_for_inference(small_layer())
    x = torch.randn(5, 12)
    write_a(layer)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(result(program.module(), x), result(copy.deepcopy(layer), x))


def test_w_is_kept_only_if_that_is_asked_for():
    layer = KronLinear(32, 32, 4, 8).eval()
    assert cost.forward_path(cost.Shape("cpu", torch.float32, 4, 8, 8, 4, 4, 8)) is None
    x = torch.randn(4, 32)
    expected = result(layer, x)
    assert fold_for_inference(layer, tokens=4).folded.weight is None
    assert fold_for_inference(layer, tokens=4, keep_weight=True).folded.m is None
    torch.testing.assert_close(layer.folded.weight, layer.dense_weight().detach())
    torch.testing.assert_close(result(layer, x), expected)
    with torch.no_grad():
        layer.b.mul_(2)
        layer.bias.mul_(2)
    torch.testing.assert_close(result(layer, x), 2 * expected)


def test_w_is_not_kept_where_the_factors_are_faster():
    layer = fold_for_inference(sparse_layer(dtype=torch.float32), keep_weight=True)
    assert layer.folded.weight is None


def test_a_model_is_folded_as_a_whole():
    model = nn.Sequential(KronLinear(8, 8, 4, 2), nn.Dropout(), KronLinear(8, 8, 2, 1))
    assert fold_for_inference(model) is model
    assert not model.training
    assert all(layer.folded is not None for layer in (model[0], model[2]))
    model.train()
    assert all(layer.folded is None for layer in (model[0], model[2]))


def test_an_input_of_another_size_names_both_sizes(folded):
    layer, _, _ = folded
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must have 12 features .* got shape \[3, 8\]"):
        layer(torch.zeros(3, 8))


def inference_layer():
    with torch.inference_mode():
        return KronLinear(8, 8, 4, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(lambda: nn.Linear(4, 4), "Linear has no Kronecker layer", id="dense"),
        pytest.param(
            lambda: nn.Sequential(KronLinear(8, 8, 4, 2, device="meta")), "0: KronLinear.fold: .* meta", id="meta"
        ),
        pytest.param(inference_layer, "made under torch.inference_mode", id="inference"),
    ],
)
def test_what_cannot_be_folded_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        fold_for_inference(model())


def test_bad_tokens_and_training_mode_are_refused():
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        fold_for_inference(small_layer(), tokens=0)
    with pytest.raises(ValueError, match="in training mode"):
        KronLinear(8, 8, 4, 2).fold()
