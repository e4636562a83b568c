"""Compiles launches of the fused kernels for GPUs that need not be there, and reads what the assembler says."""

import io
import re
from contextlib import redirect_stdout
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kron_hf.ops.fused import launch

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Resources(NamedTuple):
    """Of one kernel: registers a thread, bytes of registers spilled a thread, bytes of shared memory a program."""

    registers: int
    spilled: int
    shared: int


def launches(shape, dtype, tokens=16384):
    """All launches of a forward and backward, on the meta device; shape is (O, I, bo, bi, rank)."""
    out_blocks, in_blocks, block_out, block_in, rank = shape

    def empty(*size):
        return torch.empty(size, dtype=dtype, device="meta")

    x, y = empty(tokens, in_blocks * block_in), empty(tokens, out_blocks * block_out)
    m, b, bias = empty(rank, out_blocks, in_blocks), empty(rank, block_out, block_in), empty(out_blocks * block_out)
    return [launch.product_launch(x, m, b, bias, y), *launch.gradients_launches(y, x, m, b, torch.empty_like(x))[0]]


def resources(made, capability):
    """Compiles a launch as Triton would at its first run on a device of that capability (90 for 9.0)."""
    options = {"num_warps": made.warps, "num_stages": made.stages}
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source(made), target=GPUTarget("cuda", capability, 32), options=options)
    (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    assert spilled, log.getvalue()
    return Resources(int(registers), sum(int(size) for pair in spilled for size in pair), compiled.metadata.shared)


def source(made):
    """The kernel specialised for its arguments, as Triton's launcher specialises it."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(made.kernel.params):
        name, value = parameter.name, made.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(made.kernel, signature, constants, attributes)
