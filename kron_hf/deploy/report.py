"""What an export has written, and how it compares."""

from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import nn

from kron_hf.kron_layer import KronLayer
from kron_hf.selection.candidates import KronCandidates, converted_layers

__all__ = ["ExportReport", "dense_bytes", "stored_bytes"]


@dataclass(frozen=True)
class ExportReport:
    """One export.

    Attributes:
        format: What was written.
        files: Size of each file of weights, in bytes.
        saved_bytes: Size of the weights as `save_pretrained` writes them.
        dense_bytes: Size of the weights of the dense model, in the same dtype.
        max_difference: Largest difference between the outputs of what was written and of the model; None if they were
            not compared, as a lossless copy need not be.
        output_scale: Largest output of the model in that comparison.
        details: Further figures by name.
    """

    format: str
    files: dict[str, int]
    saved_bytes: int
    dense_bytes: int
    max_difference: float | None = None
    output_scale: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all files of weights."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types."""
        figures = {"format": self.format, "files": self.files, "bytes": self.bytes, "saved_bytes": self.saved_bytes}
        figures |= {"dense_bytes": self.dense_bytes, "ratio_to_dense": self.bytes / self.dense_bytes}
        if self.max_difference is not None:
            figures |= {"max_difference": self.max_difference, "output_scale": self.output_scale}
        return figures | self.details

    def __str__(self) -> str:
        names = ", ".join(f"{name} ({size:,} bytes)" for name, size in self.files.items())
        lines = [
            f"{self.format}: {names}",
            f"{self.bytes / self.dense_bytes:.3f} of the dense weights ({self.dense_bytes:,} bytes), "
            f"{self.bytes / self.saved_bytes:.3f} of the model as saved ({self.saved_bytes:,} bytes)",
        ]
        if self.max_difference is not None:
            lines.append(
                f"largest difference to the model's outputs: {self.max_difference:.1e} of {self.output_scale:.1e}"
            )
        lines += [f"{name.replace('_', ' ')}: {value}" for name, value in self.details.items()]
        return "\n".join(lines)


def stored_bytes(model: nn.Module) -> int:
    """Size of the tensors that a model saves; one that it holds under two names counts once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values() if tensor.numel()}
    return sum(tensors.values())


def dense_bytes(model: nn.Module) -> int:
    """The same of the model with dense layers in the place of its Kronecker layers."""
    layers = converted_layers(model).values()
    own = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    biases = sum(layer.bias.nbytes for layer in layers if layer.bias is not None)
    return stored_bytes(model) - own + biases + sum(map(_weight_bytes, layers))


def _weight_bytes(layer: KronLayer | KronCandidates) -> int:
    """Size of W."""
    return prod(layer.weight_shape) * layer.weight.element_size()
