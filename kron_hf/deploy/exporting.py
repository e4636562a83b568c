"""`export`: a model in the form in which it is to be run."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kron_hf.deploy.folder import check_target, whole_directory, write_record
from kron_hf.deploy.graph import example_inputs, exported_program, graph_config, named_outputs
from kron_hf.deploy.onnx_file import OnnxModel, quantize_onnx, write_onnx
from kron_hf.deploy.report import ExportReport, dense_bytes, stored_bytes
from kron_hf.deploy.saved import write_compact, write_dense
from kron_hf.evaluation_mode import evaluation
from kron_hf.selection.candidates import converted_layers
from kron_hf.targets import refuse_adapters

__all__ = ["FORMATS", "export"]

FORMATS = ("dense", "onnx", "torch-export", "compact")
# Of float32 outputs, and of those of half precision, relative to the largest: many times what other orders of
# summation make.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1
BATCHES = (1, 2, 3)

Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def export(
    model: PreTrainedModel,
    directory: str | Path,
    format: str,
    *,
    processor: Any = None,
    dtype: torch.dtype | None = None,
    int8: bool = False,
    example: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> ExportReport:
    """Writes a model with Kronecker layers in the form in which it is to be run; the model stays as it is.

    - `"compact"`: as `save_pretrained`, without what the zero blocks of S hide. It loads in the same way and computes
      the same, bit for bit. Entries of A where S is zero are not kept: after `unfreeze_mask` nothing grows back there.
    - `"dense"`: `to_dense`, for plain transformers without kron_hf.
    - `"onnx"`: `model.onnx`, each Kronecker layer as two matrix products with reshapes between, for any ONNX runtime;
      weights of more than 2 GiB lie beside it in `model.onnx.data`.
    - `"torch-export"`: the same graph as `model.pt2`, for `torch.export.load(...).module()`.

    Graphs take batches of any size, and are compared with the model before the directory appears, which is whole or
    not there at all.

    Args:
        model: A transformers model with Kronecker layers.
        directory: Where to.
        format: One of the above.
        processor: Image processor or tokenizer to save beside the model.
        dtype: Dtype to cast the model to; None leaves it.
        int8: Of an ONNX file: weights of 8 bits, by onnxruntime's dynamic quantisation.
        example: Inputs of the graph by name, a batch of two; None are random images or texts of the model's size.
        overwrite: Whether an earlier export in the directory is replaced; anything else there never is.
        max_shard_size: Largest weight file of a compact or dense model, in bytes or as in "5GB".

    Returns:
        Sizes, and the difference to the model; `str()` of it is readable. The directory holds it as `kron_export.json`.

    Raises:
        TypeError: The model is none of transformers.
        ValueError: It has no Kronecker layers, or PEFT adapters; there is no such format, or options do not go with
            it; or the graph does not compute what the model computes.
        FileExistsError: The directory holds something that is not to be overwritten.
        OSError: Something cannot be written.
        ModuleNotFoundError: onnx, onnxruntime or onnxscript is missing, `pip install 'kron_hf[export]'`.

    Example:
        >>> export(model, "vit-kron-onnx", "onnx")  # doctest: +SKIP
    """
    _check(model, format, dtype or getattr(model, "dtype", None), int8, example)
    directory = Path(directory)
    check_target(directory, overwrite=overwrite)
    original, cast = model, dtype is not None and dtype != model.dtype
    if cast:
        copied: Any = copy.deepcopy(model)
        model = copied.to(dtype)
    comparison = _Comparison(model, original, format, exact=not cast and not int8)
    with whole_directory(directory) as folder:
        if processor is not None:
            processor.save_pretrained(folder)
        if format == "compact":
            details = write_compact(model, folder, name=directory.resolve().name, max_shard_size=max_shard_size)
            report = comparison.report(folder, details=details)
        elif format == "dense":
            dense = write_dense(model, folder, max_shard_size=max_shard_size)
            report = comparison.report(folder, _runner(dense), _example(model, example, required=False))
        else:
            inputs = _example(model, example)
            run = _write_graph(model, format, folder, inputs, int8)
            report = comparison.report(folder, run, inputs, details={"weights": "int8"} if int8 else {})
        write_record(folder, report)
    return report


def _check(
    model: Any, format: str, dtype: torch.dtype | None, int8: bool, example: Mapping[str, Tensor] | None
) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not isinstance(model, PreTrainedModel):
        hint = "; call merge_and_unload() of an adapter first" if hasattr(model, "merge_and_unload") else ""
        raise TypeError(f"export needs a transformers model, got {type(model).__name__}{hint}")
    refuse_adapters(model)
    if not converted_layers(model):
        raise ValueError(f"export: {type(model).__name__} has no Kronecker layer")
    if dtype == torch.bfloat16 and format == "onnx":
        raise ValueError("format 'onnx' takes float16 or float32: NumPy, which feeds onnxruntime, has no bfloat16")
    if int8 and format != "onnx":
        raise ValueError(f"int8 goes with format 'onnx', got {format!r}")
    if example and any(len(tensor) < 2 for tensor in example.values()):
        raise ValueError("example must be a batch of at least two: of one, a graph would not know its batch dimension")
    if sharded := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise ValueError(f"export: {sharded[0]!r} is on the meta device; load the model without offloading")


def _write_graph(model: PreTrainedModel, format: str, folder: Path, example: dict[str, Tensor], int8: bool) -> Runner:
    program = exported_program(model, example)
    graph_config(model).save_pretrained(folder)
    if format == "onnx":
        path, outputs = folder / "model.onnx", list(_outputs(model, example))
        if not int8:
            write_onnx(program, path, list(example), outputs)
            return OnnxModel(path)
        with TemporaryDirectory(dir=folder) as scratch:
            whole = Path(scratch, path.name)
            write_onnx(program, whole, list(example), outputs)
            quantize_onnx(whole, path)
        return OnnxModel(path)
    path = folder / "model.pt2"
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()

    @torch.no_grad()
    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return loaded(*inputs.values())

    return run


@dataclass(frozen=True)
class _Comparison:
    """Measures what was written.

    Attributes:
        model: The model that was written.
        original: The same as it was given, before a cast.
        format: What was written.
        exact: Whether it has to compute what the original computes, up to the order of summation.
    """

    model: PreTrainedModel
    original: PreTrainedModel
    format: str
    exact: bool

    def report(
        self,
        folder: Path,
        run: Runner | None = None,
        example: dict[str, Tensor] | None = None,
        details: dict[str, Any] | None = None,
    ) -> ExportReport:
        weights = [path for kind in ("*.safetensors", "model.onnx*", "model.pt2") for path in sorted(folder.glob(kind))]
        figures: dict[str, Any] = {"details": (details or {}) | {"dtype": str(self.model.dtype).removeprefix("torch.")}}
        if run is not None and example is not None:
            figures["max_difference"], figures["output_scale"] = self._difference(run, example)
        files = {path.name: path.stat().st_size for path in weights}
        return ExportReport(self.format, files, stored_bytes(self.model), dense_bytes(self.model), **figures)

    def _difference(self, run: Runner, example: dict[str, Tensor]) -> tuple[float, float]:
        """The largest difference to the original over several batch sizes, and the largest output."""
        difference, scale = 0.0, 0.0
        for size in BATCHES:
            inputs = {name: torch.cat([tensor, tensor[:1]])[-size:] for name, tensor in example.items()}
            expected, found = _outputs(self.original, inputs), run(inputs)
            for name, value in expected.items():
                difference = max(difference, float((found[name].double() - value.double()).abs().max()))
                scale = max(scale, float(value.double().abs().max()))
        limit = TOLERANCE if self.model.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
        if self.exact and not difference <= limit * scale:
            raise ValueError(
                f"what was exported computes something else than {type(self.original).__name__}: outputs differ by "
                f"{difference:.2g}, the largest is {scale:.2g}"
            )
        return difference, scale


@torch.no_grad()
def _outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    moved = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
    with evaluation(model):
        return {name: value.cpu() for name, value in named_outputs(model, moved).items()}


def _runner(model: nn.Module) -> Runner:
    return lambda inputs: _outputs(model, inputs)  # type: ignore[arg-type]


def _example(model: PreTrainedModel, given: Mapping[str, Tensor] | None, *, required: bool = True) -> Any:
    if given is not None:
        return {
            name: tensor.to("cpu", model.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in given.items()
        }
    try:
        return example_inputs(model)
    except ValueError:
        if required:
            raise
        return None
