"""Checks of the fused kernels on one device: natively on CUDA, or as a script in Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 python tests/fused_checks.py results.json NAME...

Each check is a function of a device; the script writes `{name: traceback or None}`.
"""

import json
import sys
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy
import torch
from test_ops import BACKWARD, FORWARD, TOLERANCE, make_inputs, naive, output_and_gradients

from kron_hf.ops import cost, fused, kron_linear, paths
from kron_hf.ops.fused import launch

SHAPES = {  # (out_blocks, in_blocks, block_out, block_in, rank), tokens
    "4x4": ((3, 2, 4, 4, 1), 37),
    "8x8": ((5, 3, 8, 8, 1), 21),
    "16x16_rank_2": ((3, 5, 16, 16, 2), 19),
    "5x7_rank_3": ((3, 5, 5, 7, 3), 37),
    "12x6_rank_5": ((7, 11, 12, 6, 5), 5),
    "4x16_one_column": ((5, 1, 4, 16, 2), 9),
    "16x4_one_row": ((1, 6, 16, 4, 2), 9),
    "one_block": ((1, 1, 8, 8, 1), 3),
    "4x64_rank_8": ((3, 2, 4, 64, 8), 3),
    "64x4_rank_8": ((2, 3, 64, 4, 8), 3),
    "64x64": ((1, 2, 64, 64, 1), 3),
    "8x8_rank_16": ((2, 3, 8, 8, 16), 5),
    "more_blocks_than_a_tile": ((70, 67, 4, 4, 1), 33),
}
SLOW = (
    *("values_8x8", "values_12x6_rank_5", "values_16x4_one_row", "values_64x4_rank_8"),
    *("narrow_16x16_rank_2", "narrow_5x7_rank_3"),
)
NARROW = ("4x4", "16x16_rank_2", "5x7_rank_3")
SMALL = (3, 2, 4, 8, 2)
LARGE = [(64, 64, 16, 16, 1), (64, 64, 16, 16, 4), (256, 64, 16, 16, 1), (128, 128, 32, 32, 1), (48, 48, 16, 16, 2)]


@contextmanager
def fused_path():
    """Forces the fused path; yields the list of launches that it makes."""
    launches, run = [], launch.Launch.run

    def recorded(self):
        launches.append(self)
        run(self)

    choice = patch.object(paths, "fused_first", lambda shape: True)
    healthy = patch.dict(fused._state, broken=False)  # a check that failed must not switch the next one off
    with choice, patch.object(launch.Launch, "run", recorded), healthy:
        yield launches


def inputs_on(device, *arguments, **options):
    """`make_inputs`, as leaves on a device."""
    made = make_inputs(*arguments, **options)
    return [None if t is None else t.detach().to(device).requires_grad_(t.requires_grad) for t in made]


def assert_near_float64(inputs, function=kron_linear):
    """Output and gradients against the naive formula; inputs are on the device in the dtype to check."""
    with fused_path() as launches:
        given = output_and_gradients(function, inputs)
    assert len(launches) >= 3, f"the kernels did not run, or not all: {len(launches)}"
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    expected = output_and_gradients(naive, wide)
    for name, one, other in zip(("y", "dx", "ds", "da", "db", "dbias"), given, expected, strict=False):
        assert one.dtype == inputs[0].dtype
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error.item() < TOLERANCE[one.dtype], f"{name}: {error.item():.1e}"


def values(device, name, dtypes):
    shape, tokens = SHAPES[name]
    for dtype in dtypes:
        assert fused.supports(cost.Shape(device, dtype, tokens, *shape))
        assert_near_float64(inputs_on(device, shape, tokens, dtype))


def one_token_and_none(device):
    assert_near_float64(inputs_on(device, SMALL, 1, torch.float32))
    with fused_path() as launches:
        out, *grads = output_and_gradients(kron_linear, inputs_on(device, SMALL, 0, torch.float32))
    assert not launches
    assert out.shape == (0, 12)
    assert not any(grad.any() for grad in grads)


def no_bias(device):
    assert_near_float64(inputs_on(device, SMALL, 7, torch.float32, bias=False))


def strides_and_leading_dimensions(device):
    _, *rest = inputs_on(device, SMALL, 1, torch.float32)
    views = [torch.randn(16, 5, device=device).T, torch.randn(2, 16, 3, device=device).transpose(1, 2)]
    views += [torch.randn(5, 32, device=device)[:, ::2], torch.randn(16, device=device).expand(5, 16)]
    views += [torch.randn(6, 17, device=device).flatten()[1:97].view(6, 16)]  # not aligned
    for view in views:
        assert_near_float64([view.requires_grad_(), *rest])


def strided_factors(device):
    x, s, a, b, bias = [tensor.detach() for tensor in inputs_on(device, SMALL, 7, torch.float32)]
    strided = [x, s, a, b.transpose(1, 2).contiguous().transpose(1, 2), bias.repeat_interleave(2)[::2]]
    assert_near_float64([tensor.requires_grad_() for tensor in strided])


def several_ranges_of_tokens(device):
    with patch.object(launch, "_PROGRAMS", 2):
        assert_near_float64(inputs_on(device, (3, 4, 8, 8, 2), 70, torch.float32))


def same_bits(device):
    with patch.object(launch, "_PROGRAMS", 4), fused_path():
        inputs = inputs_on(device, (5, 3, 8, 8, 2), 40, torch.float16)
        first, second = (output_and_gradients(kron_linear, inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def only_needed_gradients(device):
    inputs = [t.detach() for t in inputs_on(device, SMALL, 9, torch.float32)[:4]]
    gradient = torch.randn(9, 12, device=device)
    with fused_path():
        full = BACKWARD(gradient, *inputs, [True] * 5)
        for needed in ([True] + [False] * 4, [False, False, False, True, False], [False, True, True, True, True]):
            grads = BACKWARD(gradient, *inputs, needed)
            for grad, wanted, expected in zip(grads, needed, full, strict=True):
                assert grad.numel() == (expected.numel() if wanted else 0)
                if wanted:
                    torch.testing.assert_close(grad, expected)


def nothing_outside_is_read(device):
    """Tensors lie between NaN, and blocks and tokens are no multiples of a tile."""

    def between_nan(tensor):
        buffer = torch.full((3 * tensor.numel(),), torch.nan, dtype=tensor.dtype, device=device)
        inside = buffer[tensor.numel() : 2 * tensor.numel()].view(tensor.shape)
        return inside.copy_(tensor.detach()).requires_grad_()

    for shape in ((3, 5, 4, 4, 1), (3, 3, 8, 12, 3)):
        assert_near_float64([between_nan(tensor) for tensor in inputs_on(device, shape, 5, torch.float32)])


def a_non_finite_token_stays_alone(device):
    x, *rest = [tensor.detach() for tensor in inputs_on(device, (3, 2, 4, 4, 1), 9, torch.float32)]
    with fused_path(), numpy.errstate(invalid="ignore"):  # the interpreter's products
        clean = kron_linear(x, *rest)
        for value in (torch.inf, torch.nan):
            spoilt = x.clone()
            spoilt[4, 3] = value
            out = kron_linear(spoilt, *rest)
            others = torch.arange(9, device=device) != 4
            assert torch.equal(out[others], clean[others])
            assert not out[4].isfinite().any()


def sums_are_float32(device):
    tokens = 600  # in bfloat16, 256 + 1 is 256: a narrow running sum would stop there
    inputs = [torch.ones_like(t) for t in inputs_on(device, (1, 1, 4, 4, 1), tokens, torch.bfloat16)]
    gradient = torch.ones(tokens, 4, dtype=torch.bfloat16, device=device)
    with patch.object(launch, "_PROGRAMS", 2), fused_path():
        _, grad_s, grad_a, grad_b, _ = BACKWARD(gradient, *inputs[:4], [True] * 5)
    exact = torch.tensor([tokens * 16.0, tokens], device=device).bfloat16()
    assert torch.equal(grad_s.flatten(), exact[:1])
    assert torch.equal(grad_a.flatten(), exact[:1])
    assert torch.equal(grad_b.flatten(), exact[1:].expand(16))


def operator_checks(device):
    inputs = inputs_on(device, SMALL, (2, 3), torch.float32)
    with fused_path() as launches:
        torch.library.opcheck(FORWARD, inputs)
        plain = [tensor.detach() for tensor in inputs[:4]]
        torch.library.opcheck(BACKWARD, (torch.randn(2, 3, 12, device=device), *plain, [True] * 5))
    assert launches


def tf32_follows_torch(device):
    x, _, a, b, _ = [t.detach() for t in inputs_on(device, SMALL, 3, torch.float32)]
    y, before = x.new_empty(3, 12), torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, dtype, expected in (
            (True, torch.float32, "tf32"),
            (False, torch.float32, "ieee"),
            (True, torch.bfloat16, "ieee"),
        ):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            made = launch.product_launch(*(t.to(dtype) for t in (x, a, b)), None, y.to(dtype))
            assert made.arguments["PRECISION"] == expected
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def large(device, shape, dtype):
    """Sizes of real layers; native only."""
    inputs = inputs_on(device, shape, 4096 + 3, dtype)
    for tensor in inputs:
        tensor.data *= tensor.shape[-1] ** -0.5  # keeps float16 from overflowing
    assert_near_float64(inputs)


def more_than_2_to_31_elements(device):
    """Offsets that do not fit into 32 bits; native only, 20 GB."""
    shape, features = (16, 16, 16, 16, 1), 256
    tokens = 2**31 // features + 40
    x, s, a, b, bias = [t.detach() for t in inputs_on(device, shape, 50, torch.bfloat16)]
    many = x.new_zeros(tokens, features)
    many[-50:] = x
    with fused_path() as launches:
        out = kron_linear(many, s, a, b, bias)[-50:].clone()
        gradient = torch.zeros_like(many)
        gradient[-50:] = out
        grads = BACKWARD(gradient, many, s, a, b, [True, True, True, True, False])
        expected = kron_linear(x, s, a, b, bias)
        few = BACKWARD(expected, x, s, a, b, [True, True, True, True, False])
    assert len(launches) == 6
    assert torch.equal(out, expected)
    torch.testing.assert_close((grads[0][-50:], *grads[1:]), (few[0], *few[1:]), rtol=2e-2, atol=1e-2)


def cuda_graph_and_compile(device):
    """Neither a graph break nor a synchronisation; native only."""
    inputs = inputs_on(device, (8, 8, 16, 16, 2), 256, torch.bfloat16)
    with fused_path():
        expected = output_and_gradients(kron_linear, inputs)
        compiled = torch.compile(kron_linear, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):  # warms up, records, replays
            torch.compiler.cudagraph_mark_step_begin()
            given = [tensor.clone() for tensor in output_and_gradients(compiled, inputs)]
        assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
        graph, plain = torch.cuda.CUDAGraph(), [tensor.detach() for tensor in inputs]
        with torch.cuda.graph(graph):
            out = kron_linear(*plain)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(out, expected[0])


WIDE = {f"values_{name}": partial(values, name=name, dtypes=(torch.float32,)) for name in SHAPES}
WIDE |= {f"narrow_{name}": partial(values, name=name, dtypes=(torch.bfloat16, torch.float16)) for name in NARROW}
MORE = {name: WIDE.pop(name) for name in SLOW}
CORE = WIDE | {
    function.__name__: function
    for function in (
        *(one_token_and_none, no_bias, strides_and_leading_dimensions, strided_factors, several_ranges_of_tokens),
        *(same_bits, only_needed_gradients, nothing_outside_is_read, a_non_finite_token_stays_alone),
        *(sums_are_float32, operator_checks, tf32_follows_torch),
    )
}
NATIVE = {
    f"large_{'_'.join(map(str, shape))}_{str(dtype)[6:]}": partial(large, shape=shape, dtype=dtype)
    for shape in LARGE
    for dtype in TOLERANCE
}
NATIVE |= {function.__name__: function for function in (more_than_2_to_31_elements, cuda_graph_and_compile)}


def main() -> None:
    """Runs the named checks on the CPU."""
    file, *names = sys.argv[1:]
    results = {}
    for name in names:
        torch.manual_seed(0)
        try:
            (CORE | MORE)[name]("cpu")
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    Path(file).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
