"""`fold_for_inference`: what can be computed once if a model only evaluates from now on."""

from typing import TypeVar

from torch import nn

from kron_hf.escaping import printable
from kron_hf.kron_layer import KronLayer

__all__ = ["fold_for_inference"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def fold_for_inference(model: ModelT, *, tokens: int = 4096, keep_weight: bool = False) -> ModelT:
    """Puts a model into eval mode and prepares its Kronecker layers for evaluation, in place.

    In each layer S is folded into A, and block rows and columns of S that are all zero are left out where the cost
    model says that it pays: inputs are gathered, outputs scattered. The results are the same. Parameters, `state_dict`,
    saving and copies are as before; a layer holds its folded A in addition.

    What was folded is used in eval mode without gradients (`torch.no_grad`, `torch.inference_mode`) and by
    `torch.export`; `torch.compile` computes from the factors. `train()`, `load_state_dict`, `to()` and its like, and
    writes into the factors that torch notices lift it. **Writes through `.data` are not noticed**, such as those of
    some averages of weights: call this again after them.

    Args:
        model: A model with Kronecker layers, or one of them.
        tokens: How many tokens a call has, batch size times sequence length: what is worth while depends on it.
        keep_weight: Keep W of a layer where a product with it is the cheapest way, as for few tokens. It takes the
            memory of the dense layer in addition to that of the factors.

    Raises:
        ValueError: The model has no Kronecker layer, `tokens` is below 1, or a layer's factors are sharded or on meta.

    Example:
        >>> import torch
        >>> from kron_hf import KronLinear
        >>> layer = fold_for_inference(KronLinear(8, 8, block_size=4, rank=2))
        >>> with torch.no_grad():
        ...     layer(torch.zeros(3, 8)).shape
        torch.Size([3, 8])
    """
    if tokens < 1:
        raise ValueError(f"fold_for_inference: tokens must be at least 1, got {tokens}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KronLayer)}
    if not layers:
        raise ValueError(f"fold_for_inference: {type(model).__name__} has no Kronecker layer")
    model.eval()
    for name, layer in layers.items():
        try:
            layer.fold(tokens, keep_weight)
        except ValueError as error:
            raise ValueError(f"{printable(name)}: {error}" if name else str(error)) from None
    return model
