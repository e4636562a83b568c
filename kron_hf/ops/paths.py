"""The kernels of `kron_linear` in plain PyTorch, for every device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kron_hf.factors import kron_weight, to_blocks

__all__ = ["backward", "forward"]


def forward(x: Tensor, s: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias`."""
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        out = F.linear(rows, kron_weight(s, a, b), bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def backward(grad_output: Tensor, x: Tensor, s: Tensor, a: Tensor, b: Tensor, needed: list[bool]) -> tuple[Tensor, ...]:
    """Gradients for x, s, a, b and bias; an empty tensor for each that is not needed."""
    with torch.autocast(x.device.type, enabled=False):
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        weight = kron_weight(s, a, b)
        grad_x = (grad_rows @ weight).view(x.shape) if needed[0] else x.new_empty(0)
        grad_weight = grad_rows.T @ rows
        blocks = to_blocks(grad_weight, (b.shape[1], b.shape[2]))  # [O * I, bo * bi]
        grad_m = (b.flatten(1) @ blocks.T).view(a.shape)
        grad_b = ((s * a).flatten(1) @ blocks).view(b.shape)
        grads = (grad_x, (grad_m * a).sum(0), grad_m * s, grad_b, grad_rows.sum(0))
        return tuple(grad if wanted else x.new_empty(0) for grad, wanted in zip(grads, needed, strict=True))
