"""Finds the checkpoint that a killed training can be resumed from."""

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

__all__ = ["last_checkpoint"]

_NAME = re.compile(r"checkpoint-(\d+)")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")  # Trainer's, FSDP's, DeepSpeed's
_SHARDED = ("pytorch_model_fsdp*", "global_step*")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a training, for `trainer.train(resume_from_checkpoint=...)`.

    The stock `Trainer` writes checkpoints in place, so that the last one of a killed run may be broken;
    `transformers.trainer_utils.get_last_checkpoint` takes it all the same. This looks into the files: JSON that parses,
    safetensors and zip archives that are not cut off, an optimizer. `KronTrainer` never leaves a broken one.

    Args:
        output_dir: `TrainingArguments.output_dir` of that run.

    Returns:
        The path of the checkpoint, or None if there is none that is complete.

    Example:
        >>> last_checkpoint("no-such-run") is None
        True
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return None
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return next((str(path) for step, path in sorted(found, reverse=True) if _is_complete(path, step)), None)


def _is_complete(directory: Path, step: int) -> bool:
    try:
        state = json.loads((directory / "trainer_state.json").read_text(encoding="utf-8"))
        return state["global_step"] == step and _has_weights(directory) and _has_optimizer(directory)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def _has_weights(directory: Path) -> bool:
    index = directory / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    files = sorted({directory / name for name in shards} | set(directory.rglob("*.safetensors")))
    for file in files:
        with safe_open(file, framework="pt"):  # compares the length of the file with its header
            pass
    for file in directory.rglob("*config.json"):
        json.loads(file.read_text(encoding="utf-8"))
    return bool(files) or any(any(directory.glob(pattern)) for pattern in _SHARDED)


def _has_optimizer(directory: Path) -> bool:
    archives = [path for path in directory.iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    found = any(any(directory.glob(pattern)) for pattern in _OPTIMIZERS)
    return found and all(zipfile.is_zipfile(path) for path in archives)
