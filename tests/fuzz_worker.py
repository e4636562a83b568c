"""Loads mutated checkpoints, one seed after the other, in a process with little memory.

`fuzz_worker.py checkpoint FIRST COUNT`, or `selection` (a checkpoint in the middle of one) or `adapter`.

Prints a line of JSON for each input. Findings, that is what should never happen, are in "bad".
"""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz_adapters import mutate_adapter
from fuzz_checkpoints import mutate

Door = Callable[[Path, int], tuple[str, str | None]]

SECONDS = 15  # of processor time
MEMORY = 1_250_000_000  # bytes of address space beyond what importing torch and transformers has taken


class Hang(BaseException):
    """An input took too long."""


def alarm(signum: int, frame: FrameType | None) -> None:
    raise Hang


def address_space() -> int:
    """Bytes that this process has taken; builds of torch for CUDA take more than those for the CPU."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def dense_model() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved(folder: Path, sizes: dict[str, Any], **options: Any) -> dict[str, bytes]:
    from kron_hf import KronConfig, get_kron_model

    get_kron_model(dense_model(), KronConfig(**sizes, rank=1)).save_pretrained(folder, **options)
    return contents(folder)


def saved_adapter(folder: Path) -> dict[str, bytes]:
    from peft import get_peft_model

    from kron_hf import KronConfig

    config = KronConfig(block_size=(4, 8), rank=1, init_weights="random", modules_to_save=["classifier"])
    get_peft_model(dense_model(), config).save_pretrained(folder)
    return contents(folder)


def stored_tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    one_file = folder / "model.safetensors"
    shards = {"model.safetensors"} if one_file.exists() else set(json.loads(index.read_text())["weight_map"].values())
    outside = [shard for shard in shards if folder.resolve() not in (folder / shard).resolve().parents]
    if outside:
        raise AssertionError(f"loaded from {outside}")
    return {key: tensor for shard in sorted(shards) for key, tensor in load_file(folder / shard).items()}


def wrong_factors(model: Any, folder: Path) -> list[str]:
    """Factors of a loaded model that are not those of its files."""
    import torch

    from kron_hf import KronLinear

    stored, wrong = stored_tensors(folder), []
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KronLinear)}
    for name, layer in layers.items():
        source = name if f"{name}.s" in stored else name.removeprefix("vit.")
        for key, value in layer.named_parameters():
            expected = stored[f"{source}.{key}"].to(value.dtype)
            if value.is_meta or not torch.allclose(value, expected, rtol=0, atol=0, equal_nan=True):
                wrong.append(f"{name}.{key}")
    entries = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"].values()
    mapped = sum(len(entry.get("candidates", [entry])) for entry in entries)
    return wrong if len(layers) == mapped else [*wrong, f"{len(layers)} layers for {mapped} in the map"]


def ours(error: BaseException) -> bool:
    """Whether our code was on the stack when an error was raised."""
    return any("kron_hf" in Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__))


def claims_labels(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text())["num_labels"] > 2**17
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def bad_message(message: str, folder: Path) -> str | None:
    if not message.isprintable():
        return "unprintable or of several lines"
    if len(message) > 1500:
        return f"of {len(message)} characters"
    if str(folder) in message:
        return "with the path of the folder"
    named = re.search(r"\.json|\.safetensors|tensor|module|checkpoint|shard|adapter|^[\w.]+(\[.+\])?:? ", message)
    return None if named else "without the name of a file, tensor, module or field"


def judged(error: Exception, folder: Path) -> tuple[str, str | None]:
    kind = type(error).__name__
    if not ours(error):
        return f"stock {kind}", None
    if not isinstance(error, (OSError, ValueError)):
        return f"ours {kind}", "".join(traceback.format_exception(error)[-8:])
    fault = bad_message(str(error), folder)
    return f"refused {kind}", fault and f"a message {fault}: {error!s:.2000}"


def by_from_pretrained(folder: Path, seed: int) -> tuple[str, str | None]:
    """Outcome of plain transformers with kron_hf imported, and what is bad about it."""
    from transformers import AutoModelForImageClassification

    if claims_labels(folder):
        return "not tried: transformers makes a dict of any num_labels", None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a question about foreign code
            model = AutoModelForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=seed % 3 == 0)
    except Exception as error:
        return judged(error, folder)
    if not hasattr(model.config, "quantization_config"):
        return "dense", None
    try:
        wrong = wrong_factors(model, folder)
    except Exception as error:
        wrong = [repr(error)]
    return "loaded", f"not as in the files: {wrong}" if wrong else None


def by_summary(folder: Path, seed: int) -> tuple[str, str | None]:
    """Outcome of `kron-hf summary`, and what is bad about it; its warnings go to this process's stderr."""
    from transformers.utils import logging

    from kron_hf.cli import main

    out, err = io.StringIO(), io.StringIO()
    logging.set_verbosity_warning()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["summary", str(folder)])
    except Exception:
        return "traceback", traceback.format_exc()[-2000:]
    finally:
        logging.set_verbosity(logging.CRITICAL)
    if status == 0:
        clean = all(line.isprintable() for line in out.getvalue().split("\n"))
        return "loaded", None if clean and not err.getvalue() else "unprintable characters, or something on stderr"
    message = err.getvalue().removesuffix("\n")
    clean = message.startswith("kron-hf: error: ") and message.isprintable() and len(message) < 1200
    return "refused", None if clean and not out.getvalue() else f"not one printable line: {message!r:.2000}"


def by_get_kron_model(folder: Path, seed: int) -> tuple[str, str | None]:
    """Outcome of `get_kron_model(config)`, which takes dense checkpoints only, and what is bad about it."""
    from kron_hf import KronConfig, get_kron_model

    config = KronConfig(base_model_name_or_path=str(folder), init_weights="random", block_size=4, rank=1)
    try:
        get_kron_model(config)
    except (OSError, ValueError) as error:
        message = str(error)
        return f"refused {type(error).__name__}", None if message.isprintable() and len(message) < 1500 else message
    except Exception as error:
        return f"raised {type(error).__name__}", traceback.format_exc()[-2000:]
    return "converted", None


def by_peft(folder: Path, seed: int) -> tuple[str, str | None]:
    """Outcome of `PeftModel.from_pretrained`, and what is bad about it."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    try:
        model = PeftModel.from_pretrained(dense_model(), str(folder))
    except Exception as error:
        return judged(error, folder)
    stored, loaded = load_file(folder / "adapter_model.safetensors"), model.state_dict()
    factors = {key: value for key, value in loaded.items() if ".kron_layers." in key}
    wrong = [
        key
        for key, value in factors.items()
        if not torch.allclose(value, stored[key.replace(".default", "")].to(value.dtype), rtol=0, equal_nan=True)
    ]
    return "loaded", f"not as in the files: {wrong}" if wrong or not factors else None


def run(mutation: Any, seed: int, folder: Path) -> dict[str, Any]:
    """Tries a mutation at every door that it concerns."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in mutation.files.items():
        (folder / name).write_bytes(content)
    print(f"# seed {seed}", file=sys.stderr, flush=True)  # noqa: T201
    result: dict[str, Any] = {"seed": seed, "kind": mutation.kind, "detail": mutation.detail, "bad": []}
    before = peak_memory()
    for door in doors_for(mutation, seed):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(10 * SECONDS)
        try:
            result[door.__name__], fault = door(folder, seed)
        except Hang:
            result[door.__name__], fault = "hang", f"longer than {SECONDS} s\n{traceback.format_exc()[-1500:]}"
        except MemoryError:
            result[door.__name__], fault = "memory", traceback.format_exc()[-1500:]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
        if fault:
            result["bad"].append(f"{door.__name__}: {fault}")
    result["peak_mb"] = peak_memory()
    result["grown_mb"] = result["peak_mb"] - before
    return result


def peak_memory() -> int:
    """The most memory this process has held, in MB; getrusage would tell that of the process that started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1000


def doors_for(mutation: Any, seed: int) -> list[Door]:
    if any(name.startswith("adapter") for name in mutation.files):
        return [by_peft]
    # Our own loaders read the same files with the same checks; a share of the inputs is enough for them.
    is_claim = mutation.kind == "config: claims"
    doors: list[Door] = [by_from_pretrained, *([by_summary] if seed % 2 or is_claim else [])]
    return doors + ([by_get_kron_model] if seed % 4 == 0 and not is_claim else [])


def fuzz(what: str, first: int, count: int) -> None:
    """Runs the seeds from `first` on over checkpoints, of a finished model or in selection, or adapters."""
    import warnings

    import torch
    import transformers

    import kron_hf  # noqa: F401

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for timer in (signal.SIGPROF, signal.SIGALRM):  # of the process itself, and of a wait without work
        signal.signal(timer, alarm)
    with tempfile.TemporaryDirectory() as scratch:
        # A cache of a stranger's code must not be written outside.
        os.environ["HF_MODULES_CACHE"] = f"{scratch}/modules"
        sizes = {"candidate_block_sizes": [(4, 8), 4]} if what == "selection" else {"block_size": (4, 8)}
        whole = saved(Path(scratch, "whole"), sizes)
        sharded = saved(Path(scratch, "sharded"), sizes, max_shard_size="3KB")
        adapter = saved_adapter(Path(scratch, "adapter"))
        (Path(scratch) / "outside.safetensors").write_bytes(whole["model.safetensors"])
        dense_model()
        limit = address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for seed in range(first, first + count):
            mutation = mutate_adapter(seed, adapter) if what == "adapter" else mutate(seed, whole, sharded)
            print(json.dumps(run(mutation, seed, Path(scratch, "input"))), flush=True)  # noqa: T201


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
