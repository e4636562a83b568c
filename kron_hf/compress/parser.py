"""Reads the command line and the argument files of `kron-hf compress`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import HfArgumentParser

from kron_hf.command.options import CheckpointOptions, DataOptions, LayerOptions, RunOptions
from kron_hf.command.parser import make_parser, parse_groups
from kron_hf.compress.arguments import ComparisonOptions, CompressionOptions, DenseOptions, HealingOptions

__all__ = ["Options", "build_parser", "parse_options"]

GROUPS: Any = (
    *(DenseOptions, CheckpointOptions, DataOptions, CompressionOptions, LayerOptions),
    *(HealingOptions, ComparisonOptions, RunOptions),
)
DESCRIPTION = """\
Makes a trained image classifier smaller: calibrates Kronecker layers to what it computes on your images, distils and
fine-tunes them, and compares the two. Killed, the same command goes on after the last stage that was finished (a new
head, the calibration) or the last checkpoint.
Options may stand in a JSON or YAML file, named first; the command line wins over it."""
EXAMPLES = """examples:
  kron-hf compress --model facebook/dinov2-small --image-size 56 --dataset fashion_mnist --target-params 0.25
  kron-hf compress --model runs/photos --dataset ./photos --max-error 0.2 --distill-steps 0 --finetune-steps 0
"""


class Options(NamedTuple):
    """The parsed groups."""

    dense: DenseOptions
    checkpoint: CheckpointOptions
    data: DataOptions
    compression: CompressionOptions
    layers: LayerOptions
    healing: HealingOptions
    comparison: ComparisonOptions
    run: RunOptions

    def conversion(self) -> dict[str, Any]:
        """The arguments for `KronConfig`."""
        return self.compression.conversion(self.layers)


def parse_options(arguments: Sequence[str]) -> Options:
    """Parses the command line; what it lacks comes from the argument file that it may begin with.

    Raises:
        ValueError: The file is no JSON or YAML mapping or has unknown keys, or options contradict each other.
        OSError: The file cannot be read.
    """
    options = Options(*parse_groups(build_parser(), GROUPS, arguments))
    options.conversion()  # whether they exclude each other
    return options


def build_parser() -> HfArgumentParser:
    """The parser."""
    return make_parser(GROUPS, "compress", description=DESCRIPTION, epilog=EXAMPLES)
