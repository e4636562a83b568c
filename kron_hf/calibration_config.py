"""`CalibrationConfig`: how a model is fitted to data; the sub-config of `KronConfig.calibration_config`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from kron_hf.config_checks import BlockSize, checked_block_sizes, checked_number, is_int
from kron_hf.escaping import shown
from kron_hf.module_map import MAX_CANDIDATES

__all__ = ["CalibrationConfig"]

READOUTS = (None, "cls", "all")


@dataclass
class CalibrationConfig:
    """How layers are fitted to calibration data, and what is offered when a budget chooses their shapes.

    Args:
        readout: Which tokens the features are read at. `"cls"`: the first one, and the others count in each fit by how
            much its features depend on them, from gradients. `"all"`: all count alike. None: `"cls"` where the head
            reads that token alone.
        ridge: Added to the diagonal of the inputs' covariance in a fit, times its mean; at least 0.
        sweeps: Sweeps of the alternating least squares over A and B; low rank needs none.
        held_out: Share of the examples, in [0, 1), by which a budget's options are compared, when each has been fitted
            to the others; about 512 examples of the calibration data take part. 0: by those that they were fitted to.
            What is chosen is then fitted to all.
        menu_shapes: Block sizes that a budget chooses from, as in `KronConfig.block_size`; dense is always offered.
            None: low rank and blocks of 4 x 64, or what comes nearest to it in a layer.
        flops_weight: Weight of the other cost. With `target_params` an option is offered to a layer only if none that
            is lower in `params share + flops_weight * FLOPs share` has as small an error. The budget itself always
            limits what it names. With `target_flops` the two change places; with `max_error` that sum is what becomes
            least.
        batch_size: Rows of a batch, where calibration data is a dataset and no loader.
        target_sparsity: Share of zero blocks, in [0, 1): the layers are fitted, lose the blocks whose outputs matter
            least, counted over all layers, and what remains is fitted again. Take a higher rank than without. None: no
            block is removed.
        seed: Of everything that is drawn.

    Raises:
        ValueError: A value is out of range or of the wrong kind.

    Example:
        >>> CalibrationConfig(menu_shapes=[(1, -1), (4, 64), 16]).sweeps
        8
    """

    readout: Literal["cls", "all"] | None = field(default=None, metadata={"help": "Which tokens count."})
    ridge: float = field(default=1e-4, metadata={"help": "Added to the covariance's diagonal, times its mean."})
    sweeps: int = field(default=8, metadata={"help": "Sweeps of the alternating least squares."})
    held_out: float = field(default=0.25, metadata={"help": "Share of the examples that compare options."})
    menu_shapes: list[BlockSize] | None = field(default=None, metadata={"help": "Block sizes to choose from."})
    flops_weight: float = field(default=0.0, metadata={"help": "Weight of the other cost in the choice."})
    batch_size: int = field(default=32, metadata={"help": "Rows of a batch of a dataset."})
    target_sparsity: float | None = field(default=None, metadata={"help": "Share of zero blocks."})
    seed: int = field(default=0, metadata={"help": "Of everything that is drawn."})

    def __post_init__(self) -> None:
        if self.readout not in READOUTS:
            raise ValueError(f"readout must be one of {READOUTS}, got {shown(self.readout)}")
        self.ridge = checked_number("ridge", self.ridge)
        self.held_out = checked_number("held_out", self.held_out, below=1)
        self.flops_weight = checked_number("flops_weight", self.flops_weight)
        if self.target_sparsity is not None:
            self.target_sparsity = checked_number("target_sparsity", self.target_sparsity, below=1)
        if self.menu_shapes is not None:
            self.menu_shapes = checked_block_sizes("menu_shapes", self.menu_shapes, MAX_CANDIDATES)
        for name in ("sweeps", "batch_size"):
            if not is_int(value := getattr(self, name)) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {shown(value)}")
        if not is_int(self.seed) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an int in [0, 2**32), got {shown(self.seed)}")

    @classmethod
    def from_dict(cls, values: dict[Any, Any]) -> Self:
        """Of the plain values that JSON holds.

        Raises:
            ValueError: A key is unknown, or a value as above.
        """
        if unknown := sorted(map(str, values.keys() - {item.name for item in fields(cls)})):
            raise ValueError(f"calibration_config has keys that this kron_hf does not know: {shown(unknown)}")
        return cls(**values)
