"""Reads the command line and the argument files of `kron-hf train`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import HfArgumentParser

from kron_hf.train.arguments import CommandArguments, DataOptions, KronOptions, ModelOptions, RunOptions

__all__ = ["Options", "build_parser", "parse_options"]

GROUPS: Any = (ModelOptions, DataOptions, KronOptions, RunOptions, CommandArguments)
SUFFIXES = (".json", ".yaml", ".yml")
DESCRIPTION = """\
Trains an image classifier with Kronecker layers, from scratch or from a checkpoint. Killed, the same command goes on
where the last complete checkpoint ends. Options may stand in a JSON or YAML file, named first; the command line wins
over it."""
EXAMPLES = """examples:
  kron-hf train --model-type vit --config-overrides image_size=32,patch_size=4,hidden_size=192,intermediate_size=768 \\
      --dataset uoft-cs/cifar100 --block-size 4 16 --target-sparsity 0.5 --num-train-epochs 20
  kron-hf train --model facebook/dinov2-small --init-weights nearest --dataset ./photos --output-dir runs/photos
  kron-hf train run.yaml --seed 1
  accelerate launch --config_file examples/accelerate/gpus.yaml -m kron_hf train run.yaml
"""


class Options(NamedTuple):
    """The parsed groups."""

    model: ModelOptions
    data: DataOptions
    kron: KronOptions
    run: RunOptions
    training: CommandArguments


def parse_options(arguments: Sequence[str]) -> Options:
    """Parses the command line; what it lacks comes from the argument file that it may begin with.

    Raises:
        ValueError: The file is no JSON or YAML mapping or has unknown keys, or options contradict each other.
        OSError: The file cannot be read.
    """
    parser = build_parser()
    given = list(arguments)
    if given and given[0].endswith(SUFFIXES):
        given = [*_from_file(Path(given[0])), *given[1:]]
    return Options(*parser.parse_args_into_dataclasses(_checked(parser, given), look_for_args_file=False))


def build_parser() -> HfArgumentParser:
    """The parser, our own groups first."""
    return HfArgumentParser(
        GROUPS,
        prog="kron-hf train",
        usage="kron-hf train [FILE.yaml] --model ID_OR_DIR --dataset ID_OR_DIR [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
    )


def _checked(parser: HfArgumentParser, given: list[str]) -> list[str]:
    """Ends with argparse's own message on what the parser does not know; transformers would raise."""
    _, unknown = parser.parse_known_args(given)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return given


def _from_file(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of options to values, got {type(values).__name__}")
    known = {item.name for group in GROUPS for item in fields(group) if item.init}
    names = {str(name).replace("-", "_"): value for name, value in values.items()}
    if isinstance(overrides := names.get("config_overrides"), dict):
        names["config_overrides"] = ",".join(f"{key}={value}" for key, value in overrides.items())
    if unknown := sorted(names.keys() - known):
        raise ValueError(f"{path} has options that kron-hf train does not know: {unknown}")
    return [word for name, value in names.items() if value is not None for word in (f"--{name}", *_words(value))]


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


class _Help(argparse.RawDescriptionHelpFormatter):
    """One spelling of each option and, at its end, the default."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "max_help_position": 34, "width": 118})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = next((name for name in action.option_strings if "-" in name[2:]), action.option_strings[0])
        if action.dest == "help":
            return "-h, --help"
        if action.nargs in (0, "?") or action.const is not None:
            return name
        return f"{name} {self._format_args(action, 'VALUE')}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar or 'VALUE'} ..."
        return super()._format_args(action, "VALUE")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "%(" not in text:
            text = text.replace("%%", "%").replace("%", "%%")  # transformers escapes some of its own
        shown = action.default not in (None, False, argparse.SUPPRESS, "", [])
        value = getattr(action.default, "value", action.default)
        return f"{text} (default: {value})" if shown and "(default" not in text else text
