"""`model_flops`: the FLOPs of a whole model, counted while it runs with shapes alone."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kron_hf.ops  # noqa: F401  # registers what a Kronecker product costs
from kron_hf.evaluation_mode import evaluation

__all__ = ["ModelFlops", "model_flops"]


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a model for given inputs; a multiply-add is 2.

    Attributes:
        forward: Of one forward pass.
        backward: Of the gradients that training needs; 0 where nothing is trained.
    """

    forward: int
    backward: int

    @property
    def training(self) -> int:
        """Forward and backward together."""
        return self.forward + self.backward


def model_flops(model: nn.Module, inputs: Tensor | Mapping[str, Any], *, compute: bool = False) -> ModelFlops:
    """Counts the FLOPs of matrix products, attention and convolutions in a forward and backward pass, per batch.

    The pass runs on the meta device, with the shapes of the parameters and inputs alone: it computes nothing, takes no
    memory, and leaves the model and its gradients as they are. Kronecker layers cost what `kron_summary` says. Each
    product has two gradients, of its input and of its weights, so that training is three times the forward, less the
    gradient of the images, which nobody needs, and those of frozen parameters. Not counted: biases, norms, activations,
    softmax, and the optimizer. Dropout, layer drop and gradient checkpointing are off while it counts.

    Args:
        model: Any module.
        inputs: A batch as the model is called with: keyword arguments by name, or the first argument. One of size 1
            gives the FLOPs per input. Values do not matter; tensors may be on the meta device.
        compute: Whether to compute in earnest, on the model's own device, for models that look at values on their way.

    Raises:
        ValueError: The model looks at values, which the meta device has none of, or gives back no tensor.

    Example:
        >>> model_flops(nn.Linear(16, 4), torch.empty(1, 16))
        ModelFlops(forward=128, backward=128)
    """
    counter = FlopCounterMode(display=False)
    # Of all ways to compute attention the plain products alone are counted alike on every device.
    with evaluation(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        outputs = _run(model, inputs, _detached if compute else _on_meta)
        forward = counter.get_total_flops()
        roots = [output for output in outputs if output.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    return ModelFlops(forward, counter.get_total_flops() - forward)


def _run(model: nn.Module, inputs: Tensor | Mapping[str, Any], stand_in: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The floating point outputs of one forward, with other tensors in the place of the model's own."""
    tensors = {name: stand_in(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    try:
        if isinstance(inputs, Tensor):
            outputs = functional_call(model, tensors, (stand_in(inputs),))
        else:
            batch = {name: stand_in(entry) if isinstance(entry, Tensor) else entry for name, entry in inputs.items()}
            outputs = functional_call(model, tensors, (), batch)
    except (NotImplementedError, RuntimeError) as error:
        if stand_in is not _on_meta or "meta" not in str(error):
            raise
        raise ValueError(
            f"model_flops: {type(model).__name__} does not run on the meta device, where tensors have no values "
            f"({error}); leave out inputs that it decides by, such as an attention mask of ones, or pass compute=True"
        ) from error
    floating = [tensor for tensor in _tensors(outputs) if tensor.is_floating_point()]
    if not floating:
        raise ValueError(f"model_flops: {type(model).__name__} gives back no floating point tensor")
    return floating


def _tensors(outputs: object) -> Iterator[Tensor]:
    """The tensors in what a model gives back: itself one, or a mapping or sequence of them at any depth."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping | tuple | list):
        for entry in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors(entry)


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


def _detached(tensor: Tensor) -> Tensor:
    """The same memory, with a gradient of its own."""
    return tensor.detach().requires_grad_(tensor.requires_grad)
