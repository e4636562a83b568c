"""A model as a graph of plain operations (`torch.export`), with a batch of any size."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from kron_hf.checkpoint import strip_kron_config
from kron_hf.deploy.factored import factored_copy
from kron_hf.escaping import shown

__all__ = ["example_inputs", "exported_program", "graph_config", "named_outputs"]

MAX_BATCH = 2**16  # the graph holds for batches of 1 to this
TOKENS = 16  # of the example of a text model


class _Graph(nn.Module):
    """Takes inputs in their order and gives the outputs that are tensors, by name."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return named_outputs(self.model, dict(zip(self.names, inputs, strict=True)))


def named_outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a transformers model that are tensors, such as `{"logits": ...}`."""
    outputs = model(**inputs, return_dict=True)
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of two images or texts of the size that the model is for, random.

    Raises:
        ValueError: The model takes something else.
    """
    config: Any = model.config
    config = getattr(config, "vision_config", config) if model.main_input_name == "pixel_values" else config
    if model.main_input_name == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)}
    if model.main_input_name == "input_ids":
        ids = torch.arange(2 * TOKENS).view(2, TOKENS) % config.vocab_size
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    raise ValueError(
        f"{type(model).__name__} takes {shown(model.main_input_name)}; pass an example of its inputs, a batch of two: "
        "export(..., example={name: tensor})"
    )


def exported_program(model: PreTrainedModel, example: Mapping[str, Tensor]) -> ExportedProgram:
    """The graph of a model for evaluation, on the CPU, its Kronecker layers in two matrix products each.

    It takes the tensors of the example in their order and returns a dict of tensors. It holds no paths of this machine.

    Args:
        model: A transformers model.
        example: A batch of at least two of its inputs by name; the first dimension of each is the batch.

    Raises:
        ValueError: Something in it is no operation of torch itself.
    """
    example = {name: tensor.cpu() for name, tensor in example.items()}
    batch = Dim("batch", min=1, max=MAX_BATCH)
    graph = _Graph(factored_copy(model), list(example))
    with torch.no_grad():
        shapes = {"inputs": tuple({0: batch} for _ in example)}
        program = torch.export.export(graph, tuple(example.values()), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "aten") == "kron_hf":
            raise ValueError(f"{type(model).__name__}: its graph holds {node.target}, which only kron_hf can run")
        node.meta.pop("stack_trace", None)  # lines of files on this machine
    return program


def graph_config(model: PreTrainedModel) -> Any:
    """The config that goes with a graph: labels and sizes, and nothing of Kronecker layers."""
    config = copy.deepcopy(model.config)
    strip_kron_config(config)
    config.architectures = [type(model).__name__]
    return config
