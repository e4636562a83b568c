"""ONNX files of the factored graph, compared with the model by onnxruntime."""

# The extra `export` need not be installed.
# pyright: reportMissingImports=false

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

__all__ = ["OnnxModel", "quantize_onnx", "write_onnx"]

# Protocol buffers hold 2 GiB: larger weights go into a file `NAME.data` beside the graph, which runtimes find there.
LARGEST = 2**31 - 2**27


def write_onnx(program: ExportedProgram, path: Path, inputs: list[str], outputs: list[str]) -> None:
    """Writes a graph as ONNX.

    Args:
        program: The graph.
        path: The file; weights of more than 2 GiB go into another one beside it, `NAME.data`.
        inputs: Names for its inputs.
        outputs: Names for its outputs.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    import onnx  # noqa: F401  # what is missing is said by its name
    import onnxscript  # noqa: F401

    with _quiet_exporter():
        written: Any = torch.onnx.export(program, (), input_names=inputs, output_names=outputs, verbose=False)
    model = written.model
    for part in (model, model.graph, *model.graph.all_nodes(), *model.graph.initializers.values()):
        part.metadata_props.clear()  # lines of files on this machine, and most of the size of a small model
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    written.save(str(path), external_data=size > LARGEST)


def quantize_onnx(whole: Path, path: Path) -> None:
    """Writes an ONNX file with weights of 8 bits, by onnxruntime's dynamic quantisation: it needs no data.

    Args:
        whole: The file to read, in another folder: both may have weights beside them.
        path: The file to write.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    size = sum(file.stat().st_size for file in whole.parent.glob(f"{whole.name}*"))
    with _quiet_exporter():
        quantize_dynamic(str(whole), str(path), weight_type=QuantType.QInt8, use_external_data_format=size > LARGEST)


class OnnxModel:
    """An ONNX file that is called like the model.

    Args:
        path: The file.
        threads: How many threads it computes with; None is all.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        if threads is not None:
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its outputs by name; inputs that the graph does not use are passed over."""
        known = {entry.name for entry in self.session.get_inputs()}
        found = self.session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in known})
        names = [entry.name for entry in self.session.get_outputs()]
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks on its own way of working."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root", "")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):  # of torch, for torch
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
