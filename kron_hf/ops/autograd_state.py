"""What autograd is doing at the moment, where torch has no documented question for it."""

import torch
from torch.autograd import forward_ad

__all__ = ["below_autograd", "transformed"]

below_autograd = torch._C._AutoDispatchBelowAutograd


def transformed() -> bool:
    """Whether forward-mode derivatives or transforms of `torch.func` are under way.

    They need formulas made of torch's own operators: our own know the derivatives of reverse mode alone.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
