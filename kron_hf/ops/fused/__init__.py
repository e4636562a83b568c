"""Fused Triton kernels, for CUDA devices of compute capability 8.0 and more.

One kernel computes the product with its bias, one the gradients of x and B, one that of M; none writes what stands
between the products with B_i and M_i to memory. Everything here returns None where the kernels do not apply, so that
the caller takes another path. Triton is imported at the first call that asks for them. With `TRITON_INTERPRET=1` in the
environment they run on the CPU too, slowly, for tests.
"""

import os
import warnings
from functools import cache
from importlib.metadata import requires
from typing import Any

import torch
from torch import Tensor

from kron_hf.ops.ways import Shape

__all__ = ["gradients", "product", "supports"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MIN_BLOCK, _MAX_BLOCK, _MAX_RANK = 4, 64, 16
_OFFSETS = 2**31  # those inside a tile are 32-bit
_MAX_TILE_TOKENS = 64
_state = {"broken": False}


def supports(shape: Shape) -> bool:
    """Whether there are kernels for a layer of this shape and dtype; says nothing of the machine."""
    return (
        shape.dtype in _DTYPES
        and all(_MIN_BLOCK <= block <= _MAX_BLOCK for block in (shape.block_out, shape.block_in))
        and shape.rank <= _MAX_RANK
        and 0 < shape.tokens < _OFFSETS - _MAX_TILE_TOKENS
        and max(shape.in_features, shape.out_features) * _MAX_TILE_TOKENS < _OFFSETS
        and shape.rank * shape.out_blocks * shape.in_blocks < _OFFSETS
    )


def product(shape: Shape, x: Tensor, m: Tensor, b: Tensor, bias: Tensor | None) -> Tensor | None:
    """`x W^T + bias` for x `[N, I * bi]`, contiguous, with `W = sum_i m_i (x) b_i`."""
    return _run("product", shape, x, m, b, bias)


def gradients(
    shape: Shape, g: Tensor, x: Tensor, m: Tensor, b: Tensor, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor] | None:
    """Gradients for x (None if not needed), M and B, the last two in float32, from g `[N, O * bo]`, contiguous."""
    return _run("gradients", shape, g, x, m, b, need_x)


def _run(name: str, shape: Shape, x: Tensor, *arguments: Any) -> Any:
    if _state["broken"] or not supports(shape) or not _runs_on(x.device):
        return None
    try:
        from kron_hf.ops.fused import launch

        return getattr(launch, name)(x, *arguments)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # no fault of Triton's: the other paths would fail as well
    except Exception as error:  # an import, a compiler, a driver: anything may be wrong with an installation
        _state["broken"] = True
        reason = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            f"kron_linear: the Triton kernels do not run here ({type(error).__name__}: {reason}); plain PyTorch, which "
            f"is slower, is used for the rest of this process. They need `pip install {_triton_requirement()}`, "
            "a C compiler (gcc or clang) and a folder to write to (TRITON_CACHE_DIR, else ~/.triton).",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@cache
def _runs_on(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _triton_requirement() -> str:
    """What the installed torch requires; its builds for the CPU require none."""
    names = (line.split(";")[0].strip() for line in requires("torch") or [])
    return next((name for name in names if name.startswith("triton")), "triton")
