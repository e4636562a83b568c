"""`KronConfig`: what to replace by Kronecker-sparse layers, and how. A PEFT config that validates itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from typing import Any, Literal, Self

from peft import PeftConfig, TaskType

from kron_hf.calibration_config import CalibrationConfig
from kron_hf.config_checks import (
    BlockSize,
    checked_block_size,
    checked_block_sizes,
    checked_indices,
    checked_list,
    checked_names,
    checked_pattern,
    checked_rank,
    checked_share,
    is_int,
)
from kron_hf.escaping import shown
from kron_hf.module_map import MAX_CANDIDATES, ModuleMap, checked_module_map, entry_sizes
from kron_hf.peft_type import kron_peft_type

__all__ = ["BlockSize", "KronConfig"]

INIT_WEIGHTS = (None, "random", "nearest", "calibrated")
FORMAT_VERSION = 1
# What chooses modules; `modules` stands in their place.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
PATTERNS = ("block_size_pattern", "rank_pattern")
CANDIDATES = ("candidate_block_sizes", "candidate_ranks")
BUDGETS = ("target_params", "target_flops", "max_error")


@dataclass
class KronConfig(PeftConfig):
    """Configuration of Kronecker-sparse layers, `W = sum_{i=1..rank} (S * A_i) (x) B_i`.

    Names and matching rules are those of PEFT's configs.

    Args:
        block_size: Shape of a block of W, `(out, in)`, or one int for square blocks; channels, of a convolution. -1 in
            a pair is the whole dimension: `(1, -1)` is a plain low-rank layer. Must divide the layers it is used on.
        rank: Number of Kronecker terms, r in the paper; from 1 to `bo * bi`, of a convolution `bo * bi * kh * kw`.
        target_modules: Which `nn.Linear`s to replace. None: the attention and MLP projections of the architecture
            (on a plain `nn.Module`, as `"all-linear"`). `"all-linear"`: every linear but the output head. A list:
            names or name endings. Any other string: a regular expression for the whole name. An `nn.Conv2d` is
            replaced where it is named, by a list or an expression; depthwise and grouped ones cannot be.
        exclude_modules: Names or name endings (list), or a regular expression (str), to leave alone.
        layers_to_transform: Indices of the encoder layers to touch; only with a list of `target_modules`.
        layers_pattern: Name of the list that these indices count, if it is an unusual one.
        block_size_pattern: Block size of single modules: `{name ending or regular expression: block_size}`.
        rank_pattern: Rank of single modules, as `block_size_pattern`.
        candidate_block_sizes: Block sizes to choose from in one training, in place of `block_size`: a list of ints and
            pairs. Each module becomes the sum of one Kronecker layer for each of them (and for each of
            `candidate_ranks`), of which `BlockSizeCallback` leaves one. Only pairs inside the list are rectangles.
        candidate_ranks: Ranks to choose from, in place of `rank`, combined with every candidate block size.
        init_weights: How the factors start. `"random"`: variance-matched noise. `"nearest"`: the best fit to the
            replaced weight in the Frobenius norm (not for candidates). `"calibrated"`: fitted to the layer's outputs
            on data. None: calibrated if there is calibration data; else random for a model that was built from its
            config, and an error for one loaded from a checkpoint, since its weights would be lost.
        target_params: Budget in place of `block_size` and `rank`: calibration data chooses both for every layer, or
            leaves it dense, so that all layers together have at most this share of their dense parameters, in (0, 1].
            Counted as deployed: A, B and the bias, with S folded into A.
        target_flops: The same for their FLOPs.
        max_error: The same with the fewest parameters of which no layer's outputs are further off on held-out data:
            `||y - yhat|| / ||y - mean(y)||`, in (0, 1]. At most one of the three.
        calibration_config: A `CalibrationConfig`, or its values as a dict: how the layers are fitted to the data.
        modules_to_save: Names or name endings of modules to train and save whole beside a PEFT adapter, such as a new
            `"classifier"`. They are left dense.
        modules: `{module name: {"block_size": [bo, bi], "rank": r}}`, what the fields above come to on a model. A
            `PeftModel` fills it in and its adapter_config.json holds it, so that loading matches no patterns.
        format_version: Version of the layout of adapter_config.json.
        base_model_name_or_path: The model that `get_kron_model(config)` starts from.

    Raises:
        ValueError: A value is out of range or of the wrong kind.

    Example:
        >>> KronConfig(block_size=(4, 16), rank=2, rank_pattern={"fc2": 4}).block_size
        (4, 16)
    """

    block_size: BlockSize = field(default=16, metadata={"help": "Block shape (out, in), or one int for squares."})
    rank: int = field(default=4, metadata={"help": "Number of Kronecker terms."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to replace."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to touch."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    block_size_pattern: dict[str, BlockSize] = field(default_factory=dict, metadata={"help": "Block sizes by name."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks by name."})
    candidate_block_sizes: list[BlockSize] | None = field(default=None, metadata={"help": "Block sizes to try."})
    candidate_ranks: list[int] | None = field(default=None, metadata={"help": "Ranks to try."})
    init_weights: Literal["random", "nearest", "calibrated"] | None = field(
        default=None, metadata={"help": "How the factors start."}
    )
    target_params: float | None = field(default=None, metadata={"help": "Share of the dense parameters to stay below."})
    target_flops: float | None = field(default=None, metadata={"help": "Share of the dense FLOPs to stay below."})
    max_error: float | None = field(default=None, metadata={"help": "Largest relative error of a layer's outputs."})
    calibration_config: CalibrationConfig | dict[str, Any] | None = field(
        default=None, metadata={"help": "How layers are fitted to calibration data."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    modules: ModuleMap | None = field(default=None, metadata={"help": "Resolved block size and rank by module."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of this layout."})

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuses the keys of a file that this version does not know."""
        # Here and not in from_peft_type: PEFT's own loader would drop unknown keys with a warning before that.
        if "peft_type" in kwargs:
            _check_version(kwargs.get("format_version", FORMAT_VERSION))
            if unknown := sorted(kwargs.keys() - {item.name for item in fields(cls)}):
                raise ValueError(f"this adapter_config.json has keys that this kron_hf does not know: {shown(unknown)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(f"Invalid task type: {shown(self.task_type)}; it must be None or one of {[*TaskType]}")
        super().__post_init__()
        # JSON gives a plain string, Python code nothing or the enum's member.
        self._from_file = type(self.peft_type) is str
        if self.peft_type not in (None, kron_peft_type()):
            raise ValueError(f"KronConfig needs peft_type 'KRON', got {shown(self.peft_type)}")
        self.peft_type = kron_peft_type()
        _check_version(self.format_version)
        self.block_size = checked_block_size("block_size", self.block_size)
        self.rank = checked_rank("rank", self.rank, None if self._chooses() else self._closed(self.block_size))
        self._check_names()
        self._check_candidates()
        self._check_layer_selection()
        if isinstance(self.base_model_name_or_path, PathLike):
            self.base_model_name_or_path = fspath(self.base_model_name_or_path)
        if self.init_weights not in INIT_WEIGHTS:
            raise ValueError(f"init_weights must be one of {INIT_WEIGHTS}, got {shown(self.init_weights)}")
        if self._chooses() and self.init_weights not in (None, "random"):
            # Fitted one after the other the first would take what all could have, and win.
            raise ValueError(f"candidates start with init_weights='random', got {shown(self.init_weights)}")
        self._check_modules()
        self._check_calibration()
        self._check_inherited()

    @property
    def candidates(self) -> list[tuple[BlockSize, int]]:
        """What to choose from, `(block_size, rank)`: block sizes in their order, each with all ranks; else empty."""
        if not self._chooses():
            return []
        sizes = [self.block_size] if self.candidate_block_sizes is None else self.candidate_block_sizes
        ranks = [self.rank] if self.candidate_ranks is None else self.candidate_ranks
        return [(size, rank) for size in sizes for rank in ranks]

    @classmethod
    def from_modules(cls, modules: ModuleMap, **others: Any) -> Self:
        """Replaces just the modules of a resolved map; its `block_size` and `rank` are the most frequent ones.

        Raises:
            ValueError: The map is empty, or malformed.
        """
        sizes = Counter(size for entry in checked_module_map(modules).values() for size in entry_sizes(entry))
        ((block_size, rank), _), *_ = sizes.most_common(1)
        return cls(block_size=block_size, rank=rank, modules=modules, **others)

    @property
    def budget(self) -> str | None:
        """Which of `target_params`, `target_flops` and `max_error` is given."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    @property
    def needs_data(self) -> str | None:
        """What in this config only calibration data can give; None if nothing."""
        if self.budget is not None:
            return self.budget
        if self.init_weights == "calibrated":
            return "init_weights='calibrated'"
        return None if self.calibration_config is None else "calibration_config"

    def _closed(self, block_size: BlockSize) -> BlockSize | None:
        """The block size, if it alone limits the rank: blocks of a convolution, which must be named, hold more."""
        return block_size if self.modules is None and self.target_modules in (None, "all-linear") else None

    def _chooses(self) -> bool:
        return self.candidate_block_sizes is not None or self.candidate_ranks is not None

    def refuse_stored_patterns(self) -> None:
        """Called before the config is matched against a model: a pattern that was read from a file is never run.

        Raises:
            ValueError: The config was read from a file and selects modules by regular expressions.
        """
        if not self._from_file or self.modules is not None:
            return
        selections = {name: getattr(self, name) for name in SELECTION}
        runs = [name for name, value in selections.items() if isinstance(value, str) and value != "all-linear"]
        runs += [name for name in ("layers_pattern", *PATTERNS) if getattr(self, name) and name not in runs]
        if runs:
            raise ValueError(
                f"this config was read from a file and has patterns ({', '.join(runs)}); a pattern from a file is "
                "never run. Write the config as KronConfig(...) in code; adapters store the resolved names in `modules`"
            )

    def _check_names(self) -> None:
        regex = not self._from_file
        self.block_size_pattern = {
            name: checked_block_size(f"block_size_pattern[{shown(name)}]", size)
            for name, size in checked_pattern("block_size_pattern", self.block_size_pattern, regex).items()
        }
        for name, rank in checked_pattern("rank_pattern", self.rank_pattern, regex).items():
            checked_rank(f"rank_pattern[{shown(name)}]", rank)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            setattr(self, name, checked_names(name, getattr(self, name), regex))
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save must be None or a list of names, got {shown(self.modules_to_save)}")
        self.modules_to_save = checked_names("modules_to_save", self.modules_to_save, regex)  # type: ignore[assignment]

    def _check_candidates(self) -> None:
        if (sizes := self.candidate_block_sizes) is not None:
            self.candidate_block_sizes = checked_block_sizes("candidate_block_sizes", sizes, MAX_CANDIDATES)
        if (ranks := self.candidate_ranks) is not None:
            self.candidate_ranks = [
                checked_rank(f"candidate_ranks[{index}]", rank)
                for index, rank in enumerate(checked_list("candidate_ranks", ranks, MAX_CANDIDATES))
            ]
        if self._chooses():
            self._check_product()

    def _check_product(self) -> None:
        if given := [name for name in PATTERNS if getattr(self, name)]:
            raise ValueError(f"all modules have the same candidates; they exclude {', '.join(given)}")
        if not 2 <= len(self.candidates) <= MAX_CANDIDATES:
            size, rank = self.candidates[0]
            one = f"; to train with one, pass block_size={size} and rank={rank}"
            raise ValueError(
                f"candidate_block_sizes and candidate_ranks must give 2 to {MAX_CANDIDATES} candidates, got "
                f"{len(self.candidates)}{one if len(self.candidates) == 1 else ''}"
            )
        seen: set[tuple[BlockSize, int]] = set()
        for size, rank in self.candidates:
            pair = (size, size) if isinstance(size, int) else size
            if (pair, rank) in seen:
                raise ValueError(
                    f"candidate_block_sizes and candidate_ranks give blocks of {pair} at rank {rank} twice"
                )
            seen.add((pair, rank))
            checked_rank(f"the rank of a candidate of block_size {size}", rank, self._closed(size))

    def _check_layer_selection(self) -> None:
        self.layers_to_transform = checked_indices(self.layers_to_transform)
        if self.layers_to_transform is not None and not isinstance(self.target_modules, list):
            raise ValueError("layers_to_transform needs target_modules to be a list of names")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")

    def _check_modules(self) -> None:
        if self.modules is None:
            return
        self.modules = checked_module_map(self.modules)
        if given := [name for name in (*SELECTION, *PATTERNS, *CANDIDATES) if getattr(self, name)]:
            raise ValueError(f"modules already says which modules to replace; it excludes {', '.join(given)}")

    def _check_calibration(self) -> None:
        if isinstance(self.calibration_config, dict):
            self.calibration_config = CalibrationConfig.from_dict(self.calibration_config)
        if not isinstance(self.calibration_config, CalibrationConfig | None):
            raise ValueError(
                f"calibration_config must be None, a CalibrationConfig or a dict, got {shown(self.calibration_config)}"
            )
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        for name in budgets:
            setattr(self, name, checked_share(name, getattr(self, name)))
        if len(budgets) > 1:
            raise ValueError(f"{', '.join(budgets)}: give at most one of them, since each alone decides")
        given = [*budgets, *(["calibration_config"] if self.calibration_config is not None else [])]
        if given and self.init_weights not in (None, "calibrated"):
            raise ValueError(f"{given[0]} needs init_weights None or 'calibrated', got {shown(self.init_weights)}")
        if given and self._chooses():
            raise ValueError(f"{given[0]} is for calibration, which candidates are not fitted by")
        if budgets:
            self._check_nothing_chosen(budgets[0])

    def _check_nothing_chosen(self, budget: str) -> None:
        if others := [name for name in (*PATTERNS, "modules") if getattr(self, name)]:
            raise ValueError(f"{budget} chooses block sizes and ranks by data; it excludes {', '.join(others)}")
        defaults = {"block_size": KronConfig.block_size, "rank": KronConfig.rank}
        if others := [name for name, default in defaults.items() if getattr(self, name) != default]:
            raise ValueError(
                f"{budget} chooses block sizes and ranks by data; it excludes {', '.join(others)}. Say which block "
                "sizes it may choose from by calibration_config=CalibrationConfig(menu_shapes=[...])"
            )

    def _check_inherited(self) -> None:
        """What PEFT's own fields hold, which it does not check itself."""
        if not isinstance(self.inference_mode, bool):
            raise ValueError(f"inference_mode must be a bool, got {shown(self.inference_mode)}")
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"{name} must be None or a string, got {shown(value)}")
        if not isinstance(self.auto_mapping, dict | None):
            raise ValueError(f"auto_mapping must be None or a dict, got {shown(self.auto_mapping)}")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> KronConfig:
        """Builds the config from its own JSON keys; this class is the only one with `peft_type` "KRON"."""
        found = kwargs.setdefault("peft_type", "KRON")
        if found != "KRON":
            raise ValueError(f"this adapter_config.json has peft_type {shown(found)}; KronConfig needs 'KRON'")
        return cls(**kwargs)


def _check_version(value: Any) -> None:
    if not is_int(value) or value < 1:
        raise ValueError(f"format_version must be an int of at least 1, got {shown(value)}")
    if value > FORMAT_VERSION:
        raise ValueError(
            f"this adapter_config.json has format_version {shown(value)}, this kron_hf reads up to {FORMAT_VERSION}; "
            "upgrade kron_hf"
        )
