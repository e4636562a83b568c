"""Frozen masks outside of the layers: copied to another model, and as text for checkpoints."""

import base64

import torch
from torch import Tensor, nn

from kron_hf.sparsity.pruning import kron_layers

__all__ = ["copy_masks", "pack_mask", "unpack_mask"]


def copy_masks(source: nn.Module, target: nn.Module) -> None:
    """Freezes in `target` the masks that are frozen in `source`, a model with the same Kronecker layers.

    For weight averages: an average begun before the masks froze (`torch.optim.swa_utils.AveragedModel`, an EMA) has
    no zeros. S becomes zero there. Layers without a frozen mask in `source` have none in `target` afterwards.

    Raises:
        ValueError: The models have other Kronecker layers.

    Example:
        >>> import copy
        >>> from kron_hf import KronLinear
        >>> model = KronLinear(8, 8, block_size=4, rank=1)
        >>> average = copy.deepcopy(model)
        >>> model.freeze_mask(torch.tensor([[True, False], [False, False]]))
        >>> copy_masks(model, average)
        >>> average.sparsity
        0.25
    """
    sources, targets = kron_layers(source), kron_layers(target)
    shapes = [[list(layer.s.shape) for layer in layers] for layers in (sources, targets)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"copy_masks: the Kronecker layers must be the same, source has S of shapes {shapes[0]}, target {shapes[1]}"
        )
    for layer, other in zip(sources, targets, strict=True):
        if layer.dead_blocks is None:
            other.unfreeze_mask()
        else:
            other.freeze_mask(layer.dead_blocks)


def pack_mask(mask: Tensor) -> str:
    """A bool mask as base64 text, eight blocks a byte."""
    bits = nn.functional.pad(mask.flatten().to("cpu", torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return base64.b64encode(bytes((bits << torch.arange(8, dtype=torch.uint8)).sum(1).tolist())).decode()


def unpack_mask(text: str, like: Tensor, name: str = "initial_dead") -> Tensor:
    """The mask of `pack_mask`, with the shape of `like` and on its device; `name` is for errors.

    Raises:
        ValueError: The text is no base64, or of a mask of another size.
    """
    try:
        packed = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(f"the sparsity state is malformed: a mask in {name} is not base64") from None
    if len(packed) != -(-like.numel() // 8):
        raise ValueError(f"the sparsity state has a mask of {len(packed)} bytes for a layer of {like.numel()} blocks")
    bits = torch.tensor(list(packed), dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten()[: like.numel()].view(like.shape).bool().to(like.device)
