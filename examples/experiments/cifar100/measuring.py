"""The figures of a trained model, dense or Kronecker, counted from its tensors."""

import resource
import sys
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from kron_hf import KronConfig, KronLinear, kron_summary
from kron_hf.targets import find_targets

__all__ = ["model_figures", "peak_memory_bytes", "versions"]


def model_figures(model: nn.Module, block_size: int | tuple[int, int] | None) -> dict[str, Any]:
    """Sparsity, nonzeros and parameters of the whole model.

    `sparsity` is the share of the entries of the projections that lie in blocks of exact zeros. `nonzeros` counts what
    lives: all parameters, but of a Kronecker layer only A and S of living blocks, of a dense projection only the
    entries of blocks that are not all zero.

    Args:
        model: The trained model.
        block_size: Of the blocks of a dense model; None for one that was not pruned.
    """
    summary = kron_summary(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    if summary.layers:
        dead = sum(
            int((~layer.block_mask).sum()) * (1 + layer.rank)
            for layer in model.modules()
            if isinstance(layer, KronLinear)
        )
        sparsity = summary.sparsity
    elif block_size is None:
        dead, sparsity = 0, 0.0
    else:
        targets = find_targets(model, KronConfig(block_size=block_size, rank=1))
        dead = sum(_zero_entries(target.linear.weight, target.block_size) for target in targets)
        sparsity = dead / sum(target.linear.weight.numel() for target in targets)
    return {
        "sparsity": sparsity,
        "nonzeros": total - dead,
        "trained_params": summary.trained_params,
        "deployed_params": summary.deployed_params,
    }


def peak_memory_bytes() -> int:
    """Most memory held at once by this process: on a GPU what torch allocated there, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Of what computed the figures."""
    return {name: version(name) for name in ("kron_hf", "torch", "transformers", "accelerate")}


def _zero_entries(weight: Tensor, block_size: tuple[int, int]) -> int:
    rows, columns = (size // block for size, block in zip(weight.shape, block_size, strict=True))
    blocks = weight.detach().view(rows, block_size[0], columns, block_size[1])
    return int((blocks == 0).all(3).all(1).sum()) * block_size[0] * block_size[1]
