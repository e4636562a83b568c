"""The command line `kron-hf`."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["main"]

# What the user can cause; anything else is a bug and keeps its traceback.
USER_ERRORS = (OSError, ValueError)
DATA_OPTIONS = (
    *("dataset", "dataset_config", "dataset_revision", "image_column", "label_column"),
    *("train_split", "validation_split", "test_split", "metric", "metric_options"),
)
EXPORTERS = {"onnx", "onnxruntime", "onnxscript"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `kron-hf` and returns its exit status: 0, or 1 after an error that the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] in (["train"], ["compress"]):
            {"train": _train, "compress": _compress}[words[0]](words[1:])
        else:
            options = _parser().parse_args(words)
            return options.command(options) or 0
    except USER_ERRORS as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        extra = "export" if (error.name or "").partition(".")[0] in EXPORTERS else "demo"
        return _fail(f"this command needs {error.name}: pip install 'kron_hf[{extra}]'")
    except KeyboardInterrupt:
        return _fail("interrupted")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kron-hf", description="Kronecker-sparse layers for Hugging Face models.")
    parser.add_argument("--version", action="version", version=f"kron_hf {version('kron_hf')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, save, reload and compare a small dense and Kronecker ViT")
    demo.add_argument("--output-dir", default="kron-demo", metavar="DIR", help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.set_defaults(command=_demo)

    # Their options are transformers' as well and take seconds to import: `main` hands them on.
    commands.add_parser("train", help="train an image classifier on your data, with every option of Trainer")
    commands.add_parser("compress", help="make a trained image classifier smaller, and compare the two")

    summary = commands.add_parser("summary", help="parameters, sparsity and FLOPs of a saved model")
    summary.add_argument("model", metavar="DIR_OR_ID", help="directory of a saved model, or its id on the Hub")
    summary.add_argument("--json", action="store_true", help="print JSON instead of a table")
    summary.set_defaults(command=_summary)
    _add_verify(commands.add_parser("verify", help="count again what the card of a saved model claims"))
    inspect = commands.add_parser("inspect", help="look at a saved model: masks, sparsity and sizes of its layers")
    inspect.add_argument("model", metavar="DIR_OR_ID", help="directory of a saved model, or its id on the Hub")
    inspect.add_argument("--html", required=True, metavar="FILE", help="write one page that needs nothing else")
    inspect.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    inspect.add_argument("--base", metavar="DIR_OR_ID", help="base model of an adapter that names none")
    inspect.set_defaults(command=_inspect)
    _add_export(commands.add_parser("export", help="write a saved model in the form in which it is to be run"))
    _add_bench(commands.add_parser("bench", help="how fast the layers of a model are, measured against nn.Linear"))
    return parser


def _add_verify(verify: argparse.ArgumentParser) -> None:
    add = verify.add_argument
    add("model", metavar="DIR_OR_ID", help="directory of a saved model, or its id on the Hub")
    add(
        "--sha256",
        action="append",
        default=[],
        metavar="[FILE=]HEX",
        help="checksum that a file must have, of the weights if none is named; may be given again",
    )
    add("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    add("--base", metavar="DIR_OR_ID", help="base model of an adapter that names none")
    add("--json", action="store_true", help="print JSON instead of a table")
    data = verify.add_argument_group("data to measure the metrics on, as for kron-hf train")
    for name in DATA_OPTIONS:
        data.add_argument(f"--{name.replace('_', '-')}", metavar="NAME")
    verify.set_defaults(command=_verify)


def _add_export(export: argparse.ArgumentParser) -> None:
    add = export.add_argument
    add("model", metavar="DIR_OR_ID", help="directory of a saved model, or its id on the Hub")
    add(
        "--to",
        required=True,
        choices=("dense", "onnx", "torch-export", "compact"),
        help="dense: for plain transformers; onnx, torch-export: a graph of the factors; compact: without zeros",
    )
    add("--output-dir", required=True, metavar="DIR", help="a new directory")
    add("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    add("--overwrite", action="store_true", help="replace an earlier export in DIR; anything else there never is")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="cast the model first (default: as it was saved)")
    add("--int8", action="store_true", help="with --to onnx: weights of 8 bits, by onnxruntime's dynamic quantisation")
    add("--json", action="store_true", help="print JSON instead of text")
    export.set_defaults(command=_export)


def _add_bench(bench: argparse.ArgumentParser) -> None:
    add = bench.add_argument
    add(
        "--model",
        required=True,
        metavar="ID_OR_DIR",
        help="a model, dense or with Kronecker layers; only its config is read",
    )
    add("--choose", action="store_true", help="measure nothing: print which way is chosen for each layer, and why")
    add("--training", action="store_true", help="with --choose: for forward and backward, not for the forward alone")
    add(
        "--block-size",
        nargs="+",
        type=int,
        metavar="N",
        help="of a dense model, one number or two: out in (default: 16)",
    )
    add("--rank", type=int, metavar="R", help="of a dense model (default: 4)")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="of a dense model, or all-linear (default: attention and MLP)",
    )
    add(
        "--tokens",
        type=_positive,
        default=4096,
        metavar="N",
        help="batch size times sequence length (default: %(default)s)",
    )
    add(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32", help="default: %(default)s"
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--repeats", type=_positive, default=9, metavar="N", help="runs of each layer, in turn (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")
    bench.set_defaults(command=_bench)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _demo(options: argparse.Namespace) -> None:
    from kron_hf.demo.run import run_demo

    run_demo(options.output_dir, seed=options.seed, write=_write)


def _train(words: list[str]) -> None:
    from kron_hf.demo.quiet import quiet_transformers
    from kron_hf.train.run import run_train

    with quiet_transformers():
        run_train(words, write=_write)


def _compress(words: list[str]) -> None:
    from kron_hf.compress.run import run_compress
    from kron_hf.demo.quiet import quiet_transformers

    with quiet_transformers():
        run_compress(words, write=_write)


def _summary(options: argparse.Namespace) -> None:
    import json

    from kron_hf.demo.quiet import quiet_transformers
    from kron_hf.summary import kron_summary

    with quiet_transformers():
        summary = kron_summary(_load(options.model))
    _write(json.dumps(summary.to_dict(), indent=2) if options.json else str(summary))


def _verify(options: argparse.Namespace) -> int:
    import json

    from kron_hf.command.options import DataOptions
    from kron_hf.demo.quiet import quiet_transformers
    from kron_hf.verify.run import verify

    given = {name: getattr(options, name) for name in DATA_OPTIONS if getattr(options, name) is not None}
    if given and "dataset" not in given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} goes with --dataset")
    with quiet_transformers():
        report = verify(
            options.model,
            sha256=options.sha256,
            data=DataOptions(**given) if given else None,
            base=options.base,
            revision=options.revision,
        )
    _write(json.dumps(report.to_dict(), indent=2) if options.json else str(report))
    return 0 if report.holds else 1


def _inspect(options: argparse.Namespace) -> None:
    from kron_hf.demo.quiet import quiet_transformers
    from kron_hf.page.run import write_page

    with quiet_transformers():
        write_page(options.model, Path(options.html), revision=options.revision, base=options.base)
    _write(f"Wrote {options.html}")


def _export(options: argparse.Namespace) -> None:
    import json

    import torch

    from kron_hf.command.record import check_overwritten
    from kron_hf.demo.quiet import quiet_transformers
    from kron_hf.deploy.beside import PROCESSOR_FILES, ProcessorFiles
    from kron_hf.deploy.exporting import export
    from kron_hf.deploy.folder import check_target
    from kron_hf.verify.source import find_directory, load_model

    if options.overwrite:
        check_overwritten(options.model, options.output_dir)
    check_target(Path(options.output_dir), overwrite=options.overwrite)  # before a large model is read
    with quiet_transformers():
        directory = find_directory(options.model, options.revision, also=PROCESSOR_FILES)
        if (directory / "adapter_config.json").is_file():
            raise ValueError(f"{options.model} is an adapter; export what merge_and_unload() makes of it and its base")
        model: Any = load_model(directory)
        report = export(
            model,
            options.output_dir,
            options.to,
            processor=ProcessorFiles(directory),
            dtype=options.dtype and getattr(torch, options.dtype),
            int8=options.int8,
            overwrite=options.overwrite,
        )
    _write(json.dumps(report.to_dict(), indent=2) if options.json else str(report))


def _bench(options: argparse.Namespace) -> None:
    from kron_hf.bench.run import BenchOptions, run_bench
    from kron_hf.demo.quiet import quiet_transformers

    sizes, names = options.block_size, options.target_modules
    if sizes is not None and len(sizes) > 2:
        raise ValueError(f"--block-size takes one number or two (out, in), got {sizes}")
    if options.training and not options.choose:
        raise ValueError("--training goes with --choose; what is measured is forward and backward anyway")
    conversion = {
        "block_size": sizes and (sizes[0] if len(sizes) == 1 else tuple(sizes)),
        "rank": options.rank,
        "target_modules": "all-linear" if names == ["all-linear"] else names,
    }
    given = {name: value for name, value in conversion.items() if value is not None}
    how = BenchOptions(
        choose=options.choose,
        training=options.training,
        tokens=options.tokens,
        dtype=options.dtype,
        device=options.device,
        repeats=options.repeats,
        as_json=options.json,
    )
    with quiet_transformers():
        run_bench(options.model, _read_config(options.model), given, how, _write)


def _load(name: str) -> "nn.Module":
    """The saved model, with its head; reads no weights of a model without Kronecker layers."""
    from kron_hf.checkpoint.reading import clean_errors
    from kron_hf.model import model_class_for
    from kron_hf.verify.source import load_model

    if Path(name, "adapter_config.json").is_file():
        return load_model(Path(name))
    config = _read_config(name)
    method = getattr(config, "quantization_config", None)
    if not isinstance(method, dict) or method.get("quant_method") != "kron":
        raise ValueError(f"{name}: this model has no Kronecker layers (its config.json names none)")
    model_class = model_class_for(config, with_head=False)
    with clean_errors(name):
        # Where a config names no dtype transformers would read it from the weights, before they are checked.
        return model_class.from_pretrained(name, dtype=config.dtype or "float32", use_safetensors=True)


def _read_config(name: str) -> Any:
    from huggingface_hub import constants

    from kron_hf.checkpoint.reading import read_config
    from kron_hf.escaping import one_line

    # A local path must not become a question to the Hub.
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise NotADirectoryError(f"{name} is no directory")
    if Path(name).is_dir() and not any(Path(name, file).is_file() for file in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"{name} holds no saved model: config.json is missing")
    try:
        return read_config(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        reason = one_line(str(error)).replace(constants.HF_HUB_CACHE, "the cache")
        raise OSError(f"{name} is no directory here, and no model on the Hub could be read: {reason}") from error


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _fail(message: str) -> int:
    from kron_hf.escaping import one_line

    if os.environ.get("RANK", "0") == "0":  # one of many processes speaks
        sys.stderr.write(f"kron-hf: error: {one_line(message)}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
