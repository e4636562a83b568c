"""Sizes of compact files over dense ones, and ONNX files of the factors against those of the dense model.

    OMP_WAIT_POLICY=passive python examples/benchmarks/export.py [--block-size 16] [--rank 2] [--json FILE]

A ViT with random weights: sizes and times do not depend on their values, but for which blocks are zero. The files run
in onnxruntime in turn, and the lowest times are compared, so that other work on the machine meets all alike.
"""

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads that spin disturb what is measured

import onnxruntime
import torch
from transformers import ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, KronLinear, export, get_kron_model, to_dense
from kron_hf.bench.machine import machine
from kron_hf.demo.quiet import quiet_transformers
from kron_hf.deploy.graph import example_inputs, exported_program, named_outputs
from kron_hf.deploy.onnx_file import OnnxModel, quantize_onnx, write_onnx

SPARSITIES = (0.5, 0.8, 0.95)


def build(options: argparse.Namespace, sparsity: float) -> ViTForImageClassification:
    """A converted ViT of which the given share of the blocks of every layer is zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden_size, "intermediate_size": 4 * options.hidden_size}
    heads = {"num_hidden_layers": options.layers, "num_attention_heads": options.hidden_size // 64}
    vit = ViTForImageClassification(ViTConfig(**sizes, **heads, num_labels=1000))
    model = get_kron_model(vit, KronConfig(block_size=options.block_size, rank=options.rank))
    for layer in model.modules():
        if isinstance(layer, KronLinear):
            dead = torch.zeros(layer.s.numel(), dtype=torch.bool)
            dead[torch.randperm(dead.numel())[: round(sparsity * dead.numel())]] = True
            layer.freeze_mask(dead.view_as(layer.s))
    return model.eval()


def compact_sizes(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row for each sparsity."""
    rows = []
    for sparsity in SPARSITIES:
        model = build(options, sparsity)
        report = export(model, folder / f"compact-{sparsity}", "compact")
        rows.append({"sparsity": sparsity} | report.to_dict())
    return rows


def onnx_row(name: str, path: Path, reference: dict[str, torch.Tensor], inputs: Any) -> dict[str, Any]:
    """Size of a file, and the difference of its outputs to the model's."""
    logits = OnnxModel(path)(inputs)["logits"]
    scale = float(reference["logits"].abs().max())
    agree = float((logits.argmax(-1) == reference["logits"].argmax(-1)).float().mean())
    difference = float((logits - reference["logits"]).abs().max())
    return {
        "file": name, "bytes": path.stat().st_size, "max_difference": difference, "output_scale": scale,
        "same_class": agree,
    }  # fmt: skip


def onnx_files(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row for each file, with its time over that of the dense one."""
    model = build(options, options.onnx_sparsity)
    inputs = example_inputs(model)
    inputs = {name: torch.rand(options.batch, *tensor.shape[1:]) for name, tensor in inputs.items()}
    with torch.no_grad():
        reference = named_outputs(model, inputs)
    paths: dict[str, Path] = {}
    for name, one in (("dense", to_dense(copy.deepcopy(model))), ("kron", model)):
        paths[name] = folder / f"{name}.onnx"
        write_onnx(exported_program(one, example_inputs(model)), paths[name], list(inputs), list(reference))  # type: ignore[arg-type]
    for name in ("dense", "kron"):
        paths[f"{name}-int8"] = folder / f"{name}-int8.onnx"
        quantize_onnx(paths[name], paths[f"{name}-int8"])
    rows = [onnx_row(name, path, reference, inputs) for name, path in paths.items()]
    sessions = {name: OnnxModel(path, threads=options.threads) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(options.repeats):
        for name, session in sessions.items():
            begin = time.perf_counter()
            session(inputs)
            times[name].append(1e3 * (time.perf_counter() - begin))
    for row in rows:
        row["milliseconds"] = min(times[row["file"]])
        row["time_over_dense"] = row["milliseconds"] / min(times["dense"])
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Sizes and times of exported models.")
    for name, default in (("block-size", 16), ("rank", 2), ("hidden-size", 384), ("layers", 12), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--onnx-sparsity", type=float, default=0.8, help="of the ONNX files (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each ONNX file (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    with TemporaryDirectory() as name, quiet_transformers():
        sizes, files = compact_sizes(options, Path(name)), onnx_files(options, Path(name))
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    print(f"{machine('cpu')}, onnxruntime {onnxruntime.__version__}\n{settings}")
    for row in sizes:
        print(
            f"compact, {row['sparsity']:.0%} of the blocks zero: {row['bytes']:,} bytes, {row['ratio_to_dense']:.3f} "
            f"of dense, {row['bytes'] / row['saved_bytes']:.3f} of the same saved whole"
        )
    for row in files:
        print(
            f"{row['file']}.onnx: {row['bytes']:,} bytes, {row['milliseconds']:.1f} ms ({row['time_over_dense']:.2f} "
            f"of dense), largest difference {row['max_difference']:.1e} of {row['output_scale']:.1e}, same class "
            f"{row['same_class']:.0%}"
        )
    if options.json:
        content = {"settings": settings, "machine": machine("cpu"), "compact": sizes, "onnx": files}
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
