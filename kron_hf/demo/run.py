"""`kron-hf demo` from end to end."""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from kron_hf.demo.evaluation import evaluate_in_fresh_process
from kron_hf.demo.images import ImageData, image_processor, load_image_data
from kron_hf.demo.quiet import quiet_transformers
from kron_hf.demo.report import comparison_table, draw_masks, named_masks, save_mask_picture
from kron_hf.demo.training import Recipe, Trained, search
from kron_hf.model_card import measure_latency, write_model_card
from kron_hf.summary import kron_summary

__all__ = ["check_output_dir", "run_demo"]

MARKER = "kron_hf_demo"


def run_demo(
    output_dir: str | Path = "kron-demo",
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    write: Callable[[str], Any] = print,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains a dense ViT and its Kronecker twin on the digits, saves, reloads and compares them.

    Both get the same images, steps and list of base learning rates; the validation images choose. The test images are
    read once, at the end, by a fresh process that loads what was saved.

    Args:
        output_dir: Gets the Kronecker model, `dense/`, `README.md`, `metrics.json` and `masks.png`.
        seed: Of the weights and the order of the images; the splits are fixed.
        recipe: Sizes and budget; None is the demo's.
        write: Takes each piece of the report.
        card: Further arguments of `write_model_card`, such as a licence.

    Returns:
        What `metrics.json` holds.

    Raises:
        FileExistsError: `output_dir` is a file, or holds anything but an earlier demo.
        RuntimeError: The saved models do not load, or are not those that were trained.
    """
    recipe, output_dir = recipe or Recipe(), Path(output_dir)
    check_output_dir(output_dir)
    begin = time.perf_counter()
    with _one_thread(), quiet_transformers():
        data = load_image_data("digits")
        write(_introduction(recipe, data))
        dense, kronecker = _train_both(recipe, data, seed)
        output_dir.mkdir(parents=True, exist_ok=True)
        # Marked before anything else is written, so that an interrupted demo can be run again.
        _write_metrics(output_dir, {MARKER: 1})
        directories = [output_dir / "dense", output_dir]
        for run, directory in zip((dense, kronecker), directories, strict=True):
            run[0].model.save_pretrained(directory)
            image_processor(data).save_pretrained(directory)
        write("Loading both in a fresh process ...")
        results = evaluate_in_fresh_process(directories)
        metrics = _metrics(recipe, data, dense, kronecker, results, directories) | {"seed": seed}
        _write_reports(
            output_dir, kronecker[0], card or {}, metrics | {"total_seconds": round(time.perf_counter() - begin, 1)}
        )
    write("\n" + comparison_table(metrics))
    write("(Layers as small as these gain no time from fewer FLOPs.)")
    masks = list(named_masks(kronecker[0].model).items())
    write("\nMasks of the last layers, each quarter of a character a block, blank = exactly zero:\n")
    write(draw_masks(dict(masks[-6:])))
    write(f"\nModel, model card, metrics.json and masks.png are in {output_dir}")
    return json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))


def check_output_dir(output_dir: Path) -> None:
    """Lets a new or empty directory pass, and one that an earlier demo wrote.

    Raises:
        FileExistsError: It is a file, or holds something else.
    """
    if not output_dir.exists():
        nearest = next(parent for parent in output_dir.absolute().parents if parent.exists())
        if not nearest.is_dir():
            raise FileExistsError(f"the output directory {output_dir} cannot be made: {nearest} is a file")
        return
    if not output_dir.is_dir():
        raise FileExistsError(f"the output directory {output_dir} is a file")
    metrics = output_dir / "metrics.json"
    if any(output_dir.iterdir()) and not (metrics.is_file() and f'"{MARKER}"' in metrics.read_text(encoding="utf-8")):
        raise FileExistsError(
            f"the output directory {output_dir} is not empty and was not written by kron-hf demo; name another one"
        )


def _introduction(recipe: Recipe, data: ImageData) -> str:
    return (
        f"scikit-learn's digits: {len(data.train)} images to train, {len(data.validation)} to validate, "
        f"{len(data.test)} to test.\nA ViT, dense and with Kronecker layers (block size {recipe.block_size}, rank "
        f"{recipe.rank}, target sparsity {recipe.target_sparsity}): each {recipe.steps(len(data.train))} steps "
        f"at base rates {', '.join(f'{rate:g}' for rate in recipe.learning_rates)}."
    )


def _train_both(recipe: Recipe, data: ImageData, seed: int) -> tuple[list[Trained], list[Trained]]:
    total = recipe.steps(len(data.train)) * len(recipe.learning_rates)
    runs: list[list[Trained]] = []
    for kronecker in (False, True):
        label = "Kronecker" if kronecker else "dense"
        with tqdm(total=total, desc=f"{label:>9}", unit="step", mininterval=0.5) as bar:
            runs.append(search(recipe, data, kronecker=kronecker, seed=seed, on_step=bar.update))
    return runs[0], runs[1]


def _metrics(
    recipe: Recipe,
    data: ImageData,
    dense: list[Trained],
    kronecker: list[Trained],
    results: list[dict[str, float]],
    directories: list[Path],
) -> dict[str, Any]:
    for run, result in zip((dense[0], kronecker[0]), results, strict=True):
        if run.validation_accuracy != result["validation"]:
            raise RuntimeError(
                f"the model loaded in a fresh process has validation accuracy {result['validation']:.4f}, the one "
                f"that was trained {run.validation_accuracy:.4f}"
            )
    summary = kron_summary(kronecker[0].model)
    sizes = [(directory / "model.safetensors").stat().st_size for directory in directories]
    return {
        MARKER: 1,
        "eval_accuracy": results[1]["test"],
        "dense_accuracy": results[0]["test"],
        "validation_accuracy": kronecker[0].validation_accuracy,
        "dense_validation_accuracy": dense[0].validation_accuracy,
        "sparsity": summary.sparsity,
        "trainable_params": summary.trained_params,
        "dense_params": summary.dense_params,
        "deployed_params": summary.deployed_params,
        "converted_trainable_params": summary.converted.trained_params,
        "converted_deployed_params": summary.converted.deployed_params,
        "converted_dense_params": summary.converted.dense_params,
        "forward_flops": summary.converted.forward_flops,
        "dense_forward_flops": summary.converted.dense_forward_flops,
        "training_flops": summary.converted.training_flops,
        "dense_training_flops": summary.converted.dense_training_flops,
        "seconds": round(sum(run.seconds for run in kronecker) / len(kronecker), 2),
        "dense_seconds": round(sum(run.seconds for run in dense) / len(dense), 2),
        "file_bytes": sizes[1],
        "dense_file_bytes": sizes[0],
        "learning_rate": kronecker[0].learning_rate,
        "dense_learning_rate": dense[0].learning_rate,
        "search": {"dense": _searched(dense), "kronecker": _searched(kronecker)},
        "block_size": recipe.block_size,
        "rank": recipe.rank,
        "target_sparsity": recipe.target_sparsity,
        "steps": recipe.steps(len(data.train)),
        "images": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _searched(runs: list[Trained]) -> list[dict[str, float]]:
    return [{"learning_rate": run.learning_rate, "validation_accuracy": run.validation_accuracy} for run in runs]


def _write_reports(output_dir: Path, kronecker: Trained, card: Mapping[str, Any], metrics: dict[str, Any]) -> None:
    save_mask_picture(kronecker.model, output_dir / "masks.png")
    told = ("block_size", "rank", "target_sparsity", "learning_rate", "steps", "seed")
    write_model_card(
        kronecker.model,
        output_dir,
        dataset="digits",
        split="test",
        metrics={"accuracy": metrics["eval_accuracy"]},
        training={key: metrics[key] for key in told},
        history=kronecker.history,
        latency=measure_latency(kronecker.model, batch_size=32),
        **card,
        overwrite=True,
    )
    _write_metrics(output_dir, metrics)


def _write_metrics(output_dir: Path, metrics: dict[str, Any]) -> None:
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: steps this small lose more to OpenMP's waiting than a second core gives, and repeat exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
