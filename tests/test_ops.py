from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from kron_hf.factors import kron_weight
from kron_hf.ops import cost, kron_linear, layouts, paths

CHUNK = 4
PATHS = [pytest.param(None, id="build_w")] + [
    pytest.param(cost.Factored(layout, order, CHUNK, CHUNK), id=f"{layout}-{order}")
    for layout, order in product(("token_major", "token_last"), ("b_first", "m_first"))
]
SHAPES = [  # (out_blocks, in_blocks, block_out, block_in, rank)
    pytest.param((3, 2, 4, 4, 1), id="square"),
    pytest.param((3, 5, 2, 7, 3), id="rectangular"),
    pytest.param((5, 1, 1, 6, 2), id="1_x_in"),
    pytest.param((1, 6, 5, 1, 2), id="out_x_1"),
    pytest.param((1, 1, 5, 3, 4), id="one_block"),
    pytest.param((3, 2, 2, 3, 6), id="full_rank"),
    pytest.param((4, 3, 1, 1, 1), id="1_x_1"),
]
SQUARE = (3, 2, 4, 4, 2)
FORWARD, BACKWARD = torch.ops.kron_hf.kron_linear.default, torch.ops.kron_hf.kron_linear_backward.default


@pytest.fixture
def force_path(monkeypatch):
    """Makes both directions take one path, whatever the cost model says."""

    def force(path):
        monkeypatch.setattr(paths, "forward_path", lambda shape: path)
        monkeypatch.setattr(paths, "backward_path", lambda shape: path)

    return force


def make_inputs(shape, tokens, dtype=torch.float64, bias=True, requires_grad=True):
    """X (leading shape `tokens`), s, a, b and bias, as leaves."""
    out_blocks, in_blocks, block_out, block_in, rank = shape
    leading = (tokens,) if isinstance(tokens, int) else tokens
    sizes = [(*leading, in_blocks * block_in), (out_blocks, in_blocks), (rank, out_blocks, in_blocks)]
    sizes += [(rank, block_out, block_in)] + [(out_blocks * block_out,)] * bias
    inputs = [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for size in sizes]
    return inputs if bias else [*inputs, None]


def naive(x, s, a, b, bias):
    return F.linear(x, kron_weight(s, a, b), bias)


def output_and_gradients(function, inputs):
    out = function(*inputs)
    leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in every dtype
    return out, *torch.autograd.grad(out, leaves, weights.to(out.dtype))


@pytest.mark.parametrize("tokens", [0, 1, CHUNK, 2 * CHUNK + 3], ids=lambda n: f"{n}_tokens")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_the_naive_formula(force_path, path, shape, tokens):
    force_path(path)
    for bias in (True, False):
        inputs = make_inputs(shape, tokens, bias=bias)
        torch.testing.assert_close(output_and_gradients(kron_linear, inputs), output_and_gradients(naive, inputs))


@pytest.mark.parametrize(
    ("shape", "forward_factored"),
    [
        pytest.param((24, 24, 16, 16, 1), True, id="token_major"),
        pytest.param((96, 96, 8, 8, 1), True, id="token_last"),
        pytest.param((96, 96, 4, 4, 8), False, id="build_w"),
        pytest.param((384, 1, 1, 384, 8), True, id="low_rank"),
    ],
)
def test_the_chosen_path_over_several_chunks(shape, forward_factored):
    tokens = 2 * 2048 + 5
    chosen = cost.forward_path(cost.Shape("cpu", torch.float32, tokens, *shape))
    assert (chosen is not None) == forward_factored
    inputs = make_inputs(shape, tokens, torch.float32)
    reference = make_inputs(shape, tokens)
    with torch.no_grad():
        for wide, narrow in zip(reference, inputs, strict=True):
            wide.copy_(narrow)
    for given, expected in zip(
        output_and_gradients(kron_linear, inputs), output_and_gradients(naive, reference), strict=True
    ):
        torch.testing.assert_close(given.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("size", [1, 1000, 3000])
@pytest.mark.parametrize("order", ["b_first", "m_first"])
def test_the_gradient_of_m_from_parts_of_a_chunk(monkeypatch, force_path, order, size):
    monkeypatch.setattr(layouts, "_COPIED", size)
    force_path(cost.Factored("token_major", order, 16, 16))
    inputs = make_inputs((3, 5, 2, 7, 3), 16 + 13)  # the last chunk has other parts than the first
    torch.testing.assert_close(output_and_gradients(kron_linear, inputs), output_and_gradients(naive, inputs))


VIEWS = [
    pytest.param(lambda: torch.randn(8, 5, dtype=torch.float64).T, id="transposed"),
    pytest.param(lambda: torch.randn(5, 16, dtype=torch.float64)[:, ::2], id="every_other_feature"),
    pytest.param(lambda: torch.randn(2, 3, 16, dtype=torch.float64)[:, 1:, 8:], id="slice"),
    pytest.param(lambda: torch.randn(4, 3, 8, dtype=torch.float64).transpose(0, 1), id="batch_second"),
    pytest.param(lambda: torch.randn(8, dtype=torch.float64).expand(5, 2, 8), id="expanded"),
    pytest.param(lambda: torch.randn(2, 8, 3, 2, dtype=torch.float64).permute(0, 2, 3, 1), id="channels_first"),
    pytest.param(lambda: torch.randn(8, dtype=torch.float64), id="no_leading_dimension"),
    pytest.param(lambda: torch.randn(2, 0, 3, 8, dtype=torch.float64), id="empty"),
]


@pytest.mark.parametrize("make_x", VIEWS)
@pytest.mark.parametrize("path", PATHS)
def test_any_strides_and_leading_dimensions(force_path, path, make_x):
    force_path(path)
    inputs = [make_x().requires_grad_(), *make_inputs(SQUARE, 1)[1:]]
    torch.testing.assert_close(output_and_gradients(kron_linear, inputs), output_and_gradients(naive, inputs))


def test_a_transposed_gradient(force_path):
    force_path(cost.Factored("token_last", "b_first", CHUNK, CHUNK))
    inputs = make_inputs(SQUARE, 10)
    gradient = torch.randn(12, 10, dtype=torch.float64).T
    given = torch.autograd.grad(kron_linear(*inputs), inputs, gradient)
    torch.testing.assert_close(given, torch.autograd.grad(naive(*inputs), inputs, gradient))


# Relative to the largest entry: sums of some tens of products, each rounded to the dtype once or twice.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_narrow_dtypes_are_close_to_float64(force_path, path, dtype):
    force_path(path)
    inputs = make_inputs(SQUARE, 2 * CHUNK + 3, dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    for given, expected in zip(
        output_and_gradients(kron_linear, inputs), output_and_gradients(naive, wide), strict=True
    ):
        assert given.dtype == dtype
        error = (given.double() - expected).abs().max() / expected.abs().max()
        assert error.item() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_chunks_are_added_up_in_float32(force_path, path, dtype):
    force_path(path)
    tokens = 4096  # in bfloat16, 1024 + 4 is 1024: a narrow running sum would stop there
    inputs = [torch.ones_like(tensor) for tensor in make_inputs((2, 2, 1, 1, 1), tokens, dtype, requires_grad=False)]
    grads = BACKWARD(torch.ones(tokens, 2, dtype=dtype), *inputs[:4], [False, True, True, True, True])
    _, grad_s, grad_a, grad_b, grad_bias = grads
    assert grad_s.tolist() == [[tokens] * 2] * 2
    assert grad_a.tolist() == [[[tokens] * 2] * 2]
    assert grad_b.tolist() == [[[4 * tokens]]]
    assert grad_bias.tolist() == [tokens] * 2


@pytest.mark.parametrize("path", PATHS)
def test_autocast_casts_as_f_linear_does(force_path, path):
    force_path(path)
    inputs = make_inputs(SQUARE, 9, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kron_linear(*inputs)
        dense = F.linear(inputs[0], kron_weight(*inputs[1:4]), inputs[4])
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))  # inside: backward ignores autocast
    assert out.dtype == dense.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads] == [torch.float32] * 5
    cast = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    expected = kron_linear(*cast)
    assert torch.equal(out, expected)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, cast, torch.ones_like(expected)), strict=True):
        assert torch.equal(grad, wanted.float())


@pytest.mark.parametrize("path", PATHS)
def test_autocast_leaves_float64_alone(force_path, path):
    force_path(path)
    inputs = make_inputs(SQUARE, 9)
    expected = output_and_gradients(kron_linear, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kron_linear(*inputs), expected[0])
        torch.testing.assert_close(output_and_gradients(kron_linear, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [(7,), (2, 3), (0,), ()], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_opcheck(tokens, bias):
    inputs = make_inputs(SQUARE, tokens, bias=bias)
    torch.library.opcheck(FORWARD, inputs)
    plain = [tensor.detach() for tensor in inputs[:4]]
    gradient = torch.randn(*tokens, 12, dtype=torch.float64)
    for needed in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(BACKWARD, (gradient, *plain, needed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(force_path, path, shape):
    force_path(path)
    inputs = make_inputs(shape, CHUNK + 1)
    assert torch.autograd.gradcheck(kron_linear, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [3, (2, 2), ()])
def test_second_derivatives(shape, tokens):
    assert torch.autograd.gradgradcheck(kron_linear, make_inputs(shape, tokens), fast_mode=True)


@pytest.mark.parametrize("frozen", range(5))
def test_second_derivatives_where_some_are_frozen(frozen):
    inputs = make_inputs(SQUARE, 3)
    inputs[frozen].requires_grad_(False)
    assert torch.autograd.gradgradcheck(kron_linear, inputs, fast_mode=True)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_mode(shape, grad):
    inputs = make_inputs(shape, 3)
    directions = tuple(torch.randn_like(tensor) for tensor in inputs)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, directions)
        found = forward_ad.unpack_dual(kron_linear(*duals)).tangent
    _, expected = torch.func.jvp(naive, tuple(inputs), directions)
    torch.testing.assert_close(found, expected)


def test_transforms_of_torch_func():
    """As researchers use them: gradients for each sample, and a Hessian."""
    inputs = tuple(make_inputs(SQUARE, 4, requires_grad=False))

    def loss(function, *inputs):
        return function(*inputs).square().sum()

    for transform in (
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(1, 2, 3)), in_dims=(0, None, None, None, None)),
        lambda f: torch.func.hessian(f, argnums=(0, 3)),
        lambda f: torch.func.jacrev(f, argnums=2),
    ):
        found, expected = (transform(partial(loss, function))(*inputs) for function in (kron_linear, naive))
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_has_no_graph_break_and_no_recompile(backend):
    torch._dynamo.reset()
    graphs = 0

    def counting(module, example_inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(module, example_inputs)

    def step(*inputs):
        return kron_linear(*inputs).relu()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
    for tokens in (5, 9):
        inputs = make_inputs(SQUARE, (tokens, 3), torch.float32)
        torch.testing.assert_close(output_and_gradients(compiled, inputs), output_and_gradients(step, inputs))
    assert graphs == 1
    torch._dynamo.reset()


def test_the_operator_itself_follows_autocast():
    inputs = make_inputs(SQUARE, 5, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(FORWARD(*inputs), kron_linear(*inputs))
        assert FORWARD(*inputs).dtype == torch.bfloat16


def test_compile_under_autocast():
    torch._dynamo.reset()
    compiled = torch.compile(kron_linear, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(SQUARE, 5, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given, expected = output_and_gradients(compiled, inputs), output_and_gradients(kron_linear, inputs)
    assert given[0].dtype == torch.bfloat16
    torch.testing.assert_close(given, expected)
    torch._dynamo.reset()


def saved_tensors(function, inputs):
    """What autograd keeps for backward, once each."""
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return list(saved.values())


@pytest.mark.parametrize("make_x", VIEWS[:1] + VIEWS[3:4])
@pytest.mark.parametrize("path", PATHS)
def test_backward_keeps_only_the_input_and_the_parameters(force_path, path, make_x):
    force_path(path)
    inputs = [make_x().requires_grad_(), *make_inputs(SQUARE, 1)[1:]]
    kept = {tensor.data_ptr() for tensor in saved_tensors(kron_linear, inputs)}
    assert kept == {tensor.data_ptr() for tensor in inputs[:4]}


def test_backward_keeps_no_more_bytes_than_linear():
    inputs = make_inputs((4, 4, 8, 8, 2), 100, torch.float32)
    linear = torch.nn.Linear(32, 32)
    kept, dense = saved_tensors(kron_linear, inputs), saved_tensors(linear, inputs[:1])
    assert sum(t.nbytes for t in kept) <= sum(t.nbytes for t in dense)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("trained", range(5), ids=["x", "s", "a", "b", "bias"])
def test_one_trained_argument(force_path, path, trained):
    force_path(path)
    inputs = make_inputs(SQUARE, 9, requires_grad=False)
    inputs[trained].requires_grad_()
    torch.testing.assert_close(output_and_gradients(kron_linear, inputs), output_and_gradients(naive, inputs))


@pytest.mark.parametrize("path", PATHS)
def test_only_needed_gradients_are_computed(force_path, path):
    force_path(path)
    x, s, a, b, _ = make_inputs(SQUARE, 9, requires_grad=False)
    gradient = torch.randn(9, 12, dtype=torch.float64)
    full = BACKWARD(gradient, x, s, a, b, [True] * 5)
    for needed in product([True, False], repeat=5):
        grads = BACKWARD(gradient, x, s, a, b, list(needed))
        for grad, wanted, expected in zip(grads, needed, full, strict=True):
            assert grad.numel() == (expected.numel() if wanted else 0)
            if wanted:
                torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("path", PATHS)
def test_same_inputs_same_bits(force_path, path):
    force_path(path)
    inputs = make_inputs((6, 6, 8, 8, 2), 37, torch.float32)
    first, second = (output_and_gradients(kron_linear, inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    inputs = make_inputs(SQUARE, 5)
    expected = kron_linear(*inputs)
    with mode():
        out = kron_linear(*inputs)
    assert expected.requires_grad
    assert not out.requires_grad
    assert torch.equal(out, expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_gradient_checkpointing(reentrant):
    inputs = make_inputs(SQUARE, 5)

    def recomputed(*inputs):
        return checkpoint(kron_linear, *inputs, use_reentrant=reentrant)

    x, *rest = output_and_gradients_by_backward(recomputed, inputs)
    expected_x, *expected = output_and_gradients_by_backward(kron_linear, inputs)
    assert torch.equal(x, expected_x)
    assert all(torch.equal(one, other) for one, other in zip(rest, expected, strict=True))


def output_and_gradients_by_backward(function, inputs):
    for tensor in inputs:
        tensor.grad = None
    out = function(*inputs)
    out.sum().backward()
    return out, *(tensor.grad for tensor in inputs)


def test_meta_device():
    inputs = [tensor.detach().to("meta").requires_grad_() for tensor in make_inputs(SQUARE, (2, 3))]
    out = kron_linear(*inputs)
    out.sum().backward()
    assert (out.shape, out.device.type) == ((2, 3, 12), "meta")
    assert [tensor.grad.shape for tensor in inputs] == [tensor.shape for tensor in inputs]


BAD = [
    pytest.param({0: (5, 7)}, ValueError, r"x must have 8 features \(I \* bi = 2 \* 4\).*got shape \[5, 7\]", id="x"),
    pytest.param({0: ()}, ValueError, "x must have 8 features", id="x_scalar"),
    pytest.param({1: (3, 1)}, ValueError, r"a \[rank, O, I\].*got s \[3, 1\], a \[2, 3, 2\]", id="s_broadcasts"),
    pytest.param({2: (3, 2)}, ValueError, r"a \[rank, O, I\].*a \[3, 2\]", id="a_without_rank"),
    pytest.param({3: (1, 4, 4)}, ValueError, r"b \[rank, bo, bi\].*b \[1, 4, 4\]", id="ranks_differ"),
    pytest.param({4: (8,)}, ValueError, r"bias must have shape \[12\] \(O \* bo = 3 \* 4\), got \[8\]", id="bias"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_wrong_shapes(changed, error, message):
    inputs = make_inputs(SQUARE, 5)
    for position, size in changed.items():
        inputs[position] = torch.randn(size, dtype=torch.float64)
    with pytest.raises(error, match=message):
        kron_linear(*inputs)


@pytest.mark.parametrize("function", [kron_linear, FORWARD])
@pytest.mark.parametrize("position", range(5), ids=["x", "s", "a", "b", "bias"])
def test_mixed_dtypes(position, function):
    inputs = make_inputs(SQUARE, 5)
    inputs[position] = inputs[position].float()
    name = ["x", "s", "a", "b", "bias"][position]
    with pytest.raises(TypeError, match=rf"same floating point dtype of 16 to 64 bits, got .*{name} torch.float32"):
        function(*inputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes(dtype):
    with pytest.raises(TypeError, match=rf"of 16 to 64 bits, got x {dtype}, s {dtype}"):
        kron_linear(*[tensor.detach().abs().to(dtype) for tensor in make_inputs(SQUARE, 5)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_factors_that_are_not_finite_spoil_their_blocks_alone(force_path, path, value):
    force_path(path)
    x, s, a, b, bias = [tensor.detach() for tensor in make_inputs(SQUARE, CHUNK + 1)]
    expected = kron_linear(x, s, a, b, bias)
    a[0, 1, 0] = value
    out = kron_linear(x, s, a, b, bias)
    torch.testing.assert_close(out[:, [0, 1, 2, 3, 8, 9, 10, 11]], expected[:, [0, 1, 2, 3, 8, 9, 10, 11]])
    assert not out[:, 4:8].isfinite().any()
    b[0] = value
    assert not kron_linear(x, s, a, b, bias).isfinite().any()


def test_more_than_2_to_31_elements():
    tokens = 2**31 // 8 + 5
    inputs = [tensor.detach().to("meta").requires_grad_() for tensor in make_inputs(SQUARE, 1)]
    inputs[0] = torch.empty(tokens, 8, dtype=torch.float64, device="meta", requires_grad=True)
    out = kron_linear(*inputs)
    out.sum().backward()
    assert (out.shape, inputs[0].grad.shape) == ((tokens, 12), (tokens, 8))
    for dtype in (torch.float32, torch.bfloat16):
        path = cost.forward_path(cpu_shape(768, 16, 2, 2**33, dtype))
        assert path is not None
        assert path.chunk <= 2048


def cpu_shape(features, block, rank, tokens=4096, dtype=torch.float32):
    return cost.Shape("cpu", dtype, tokens, features // block, features // block, block, block, rank)


@pytest.mark.parametrize(("block", "rank"), [(8, 1), (16, 1), (16, 2), (32, 1), (32, 2), (64, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cost_model_takes_the_factors_where_they_are_clearly_cheaper(block, rank, dtype):
    shape = cpu_shape(768, block, rank, dtype=dtype)
    assert cost.forward_path(shape) is not None
    assert cost.backward_path(shape) is not None


@pytest.mark.parametrize(
    ("features", "block", "rank"), [(768, 4, 8), (768, 64, 16), (64, 8, 4), (768, 768, 1)], ids=str
)
def test_cost_model_builds_w_where_the_factors_are_not_cheaper(features, block, rank):
    shape = cpu_shape(features, block, rank)
    assert cost.forward_path(shape) is None
    assert cost.backward_path(shape) is None


@pytest.mark.parametrize(("rank", "factored"), [(3, True), (4, False)])
def test_cost_model_is_cautious_where_nothing_was_measured(rank, factored):
    # Multiply-adds over dense at 768 x 768 in blocks of 16: rank * (1 / 16 + 1 / 48)
    shape = cpu_shape(768, 16, rank)._replace(device_type="cuda")
    assert (cost.forward_path(shape) is not None) == factored


@pytest.mark.parametrize("tokens", [0, 1, 17, 197, 4096, 10**6])
def test_chunks_are_bounded_and_depend_on_shapes_only(tokens):
    shape = cpu_shape(768, 16, 2, tokens)
    path = cost.forward_path.__wrapped__(shape)
    assert path == cost.forward_path.__wrapped__(shape)
    assert path is None or 16 <= path.chunk <= 2048


def test_the_larger_dimension_decides_the_order():
    wide = cost.Shape("cpu", torch.float32, 4096, 192, 48, 16, 16, 1)  # 768 -> 3072
    forward, backward = cost.forward_path(wide), cost.forward_path(wide.transposed)
    assert forward is not None
    assert backward is not None
    assert (forward.order, backward.order) == ("b_first", "m_first")


@pytest.mark.parametrize("function", [kron_linear, FORWARD])
@pytest.mark.parametrize("which", ["x", "s", "a", "b", "bias"])
def test_one_device_is_required(which, function):
    tensors = {"x": (2, 8), "s": (2, 2), "a": (1, 2, 2), "b": (1, 4, 4), "bias": (8,)}
    made = {name: torch.ones(shape, device="meta" if name == which else "cpu") for name, shape in tensors.items()}
    with pytest.raises(ValueError, match=r"must be on one device, got .*meta"):
        function(*made.values())
