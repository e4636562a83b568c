"""Reads the command line and the argument files of `kron-hf train`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import HfArgumentParser

from kron_hf.command.options import CheckpointOptions, DataOptions, RunOptions
from kron_hf.command.parser import make_parser, parse_groups
from kron_hf.train.arguments import CommandArguments, KronOptions, ModelOptions

__all__ = ["Options", "build_parser", "parse_options"]

GROUPS: Any = (ModelOptions, CheckpointOptions, DataOptions, KronOptions, RunOptions, CommandArguments)
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
    checkpoint: CheckpointOptions
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
    return Options(*parse_groups(build_parser(), GROUPS, arguments))


def build_parser() -> HfArgumentParser:
    """The parser, our own groups first."""
    return make_parser(GROUPS, "train", description=DESCRIPTION, epilog=EXAMPLES)
