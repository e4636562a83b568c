"""Command lines of several groups of options, which may stand in an argument file."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

__all__ = ["make_parser", "parse_groups"]

SUFFIXES = (".json", ".yaml", ".yml")


def make_parser(groups: Sequence[Any], command: str, *, description: str, epilog: str) -> HfArgumentParser:
    """The parser of a command.

    Args:
        groups: Dataclasses, in the order in which the help shows them.
        command: Its name, as in `train`.
        description: Stands before the options.
        epilog: Stands after them.
    """
    return HfArgumentParser(
        groups,  # type: ignore[arg-type]
        prog=f"kron-hf {command}",
        usage=f"kron-hf {command} [FILE.yaml] --model ID_OR_DIR --dataset ID_OR_DIR [options]",
        description=description,
        epilog=epilog,
        formatter_class=_Help,
        allow_abbrev=False,
    )


def parse_groups(parser: HfArgumentParser, groups: Sequence[Any], arguments: Sequence[str]) -> tuple[Any, ...]:
    """An instance of each group; what the command line lacks comes from the argument file that it may begin with.

    Raises:
        ValueError: The file is no JSON or YAML mapping or has unknown keys, or options contradict each other.
        OSError: The file cannot be read.
    """
    given = list(arguments)
    if given and given[0].endswith(SUFFIXES):
        given = [*_from_file(Path(given[0]), groups, parser.prog), *given[1:]]
    return parser.parse_args_into_dataclasses(_checked(parser, given), look_for_args_file=False)


def _checked(parser: HfArgumentParser, given: list[str]) -> list[str]:
    """Ends with argparse's own message on what the parser does not know; transformers would raise."""
    _, unknown = parser.parse_known_args(given)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return given


def _from_file(path: Path, groups: Sequence[Any], prog: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of options to values, got {type(values).__name__}")
    known = {item.name for group in groups for item in fields(group) if item.init}
    names = {str(name).replace("-", "_"): value for name, value in values.items()}
    if isinstance(overrides := names.get("config_overrides"), dict):
        names["config_overrides"] = ",".join(f"{key}={value}" for key, value in overrides.items())
    if unknown := sorted(names.keys() - known):
        raise ValueError(f"{path} has options that {prog} does not know: {unknown}")
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
