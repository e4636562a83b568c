"""Callbacks that wire the baselines into the stock `Trainer`."""

import warnings
from contextlib import ExitStack
from typing import Any, ClassVar

from accelerate.utils import extract_model_from_parallel
from transformers import TrainerControl, TrainerState, TrainingArguments

from kron_hf.baselines.group_lasso import ElasticGroupLasso, GroupLasso
from kron_hf.baselines.magnitude import GradualPruning, IterativePruning
from kron_hf.baselines.pruner import BlockPruner
from kron_hf.baselines.rigl import BlockRigL
from kron_hf.baselines.targets import block_layers
from kron_hf.callbacks import StatefulCallback
from kron_hf.checkpoint import tensor_names_kept
from kron_hf.config import BlockSize, KronConfig

__all__ = [
    "BlockPruningCallback",
    "BlockRigLCallback",
    "ElasticGroupLassoCallback",
    "GradualPruningCallback",
    "GroupLassoCallback",
    "IterativePruningCallback",
]


class BlockPruningCallback(StatefulCallback):
    """Prunes the blocks of a dense model under the stock `Trainer`: the base of the baselines' callbacks.

    Use one of its subclasses; they take the options of the algorithm that they wire. The schedule counts the optimizer
    steps of the whole training. Logs get a `sparsity`: the share of entries in zero blocks at that moment.

    A resumed training continues bit-equal, whether or not `restore_callback_states_from_checkpoint` is set; masks are
    in trainer_state.json. `load_best_model_at_end` may load a checkpoint from before the masks froze: that warns.
    What is saved is an ordinary dense model with exact zeros.

    Args:
        block_size: Shape of a block, `(out, in)`, or one int for square blocks.
        target_modules: Which linears to prune, as in `KronConfig`.
        config: A `KronConfig` instead of the two, of which block sizes and module names count.
        modules: `{module name: {"block_size": [bo, bi], "rank": 1}}` instead of the three: what checkpoints hold.
        target_sparsity: Share of entries in zero blocks to end with, in [0, 1).
        **options: Those of the algorithm, but for `layers` and `total_steps`.

    Raises:
        TypeError: The algorithm has no such option.
        ValueError: An option is out of range. What depends on the model and the number of steps is checked when the
            training begins.

    Example:
        >>> GradualPruningCallback((2, 4), target_sparsity=0.8, interval=20).state()["args"]["interval"]
        20
    """

    algorithm: ClassVar[type[BlockPruner]]

    def __init__(
        self,
        block_size: BlockSize | None = None,
        target_modules: list[str] | str | None = None,
        *,
        config: KronConfig | None = None,
        modules: dict[str, Any] | None = None,
        target_sparsity: float,
        **options: Any,
    ) -> None:
        ways = [given for given in (block_size, config, modules) if given is not None]
        if len(ways) != 1 or (target_modules is not None and block_size is None):
            raise ValueError(f"{type(self).__name__}: give a block_size, and target_modules if need be, or a config")
        if block_size is not None:
            config = KronConfig(block_size=block_size, rank=1, target_modules=target_modules)
        self.config = config or KronConfig(modules=modules)
        self.options = {"target_sparsity": target_sparsity, **options}
        if "total_steps" in options:
            raise TypeError(f"{type(self).__name__} takes the number of steps from the Trainer, not total_steps")
        self.algorithm.check_options(**self.options)
        self.pruner: BlockPruner | None = None
        self._names = ExitStack()  # in force during a training

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps in trainer_state.json: resolved names, no patterns."""
        args, saved = dict(self.options), None
        if self.pruner is not None:
            layers = self.pruner.layers.items()
            args["modules"] = {name: {"block_size": list(layer.block_size), "rank": 1} for name, layer in layers}
            saved = self.pruner.state_dict()
        # Trainer sets attributes when it restores callbacks itself; on_train_begin reads the file's copy either way.
        return {"args": args, "attributes": {"pruner_state": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the pruner, continues it if the training was resumed, and attaches it to the optimizer."""
        if self.pruner is not None:
            self.pruner.detach()  # a training that did not reach its end
        self._names.close()
        model = extract_model_from_parallel(kwargs["model"], keep_torch_compile=False)
        layers = block_layers(model, self.config)
        self.pruner = self.algorithm(layers, total_steps=state.max_steps, **self.options)
        if state.global_step > 0:
            self.pruner.load_state_dict(self._saved_state(state))
        else:
            self._check_alone(state)
        self.register(state)
        self._names.enter_context(tensor_names_kept(model))  # in the checkpoints
        self.pruner.attach(kwargs["optimizer"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds `sparsity` to the logs and to the history, into which Trainer has copied them before."""
        if self.pruner is None:
            return
        if "sparsity" not in kwargs["logs"]:  # under FSDP2 it costs an all-gather
            kwargs["logs"]["sparsity"] = self.pruner.sparsity
        if state.log_history:
            state.log_history[-1].setdefault("sparsity", kwargs["logs"]["sparsity"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detaches; warns if the training ended before the target or the best model loaded is from before it."""
        self._names.close()
        if self.pruner is None:
            return
        self.pruner.close()
        frozen, sparsity = self.pruner.frozen_sparsity, self.pruner.sparsity
        if frozen is not None and sparsity < frozen:
            warnings.warn(
                f"the model has sparsity {sparsity:.4f}, not target_sparsity={self.pruner.target_sparsity}: the best "
                f"checkpoint, {state.best_model_checkpoint}, is from before the masks froze; pass eval_delay to "
                "TrainingArguments so that only later ones are compared",
                stacklevel=2,
            )

    def _check_alone(self, state: TrainerState) -> None:
        own, kinds = type(self).__name__, {kind.__name__ for kind in BlockPruningCallback.__subclasses__()}
        if found := sorted(kinds & self.names_in(state) - {own}):
            raise ValueError(f"this training has {own} and {', '.join(found)}, which would prune against each other")

    def _saved_state(self, state: TrainerState) -> dict[str, Any]:
        """The pruner's state in the checkpoint.

        Raises:
            ValueError: There is none, or more than one, or it is malformed.
        """
        name, attributes = type(self).__name__, self.saved_attributes(state)
        if not attributes:
            raise ValueError(f"the checkpoint is of a training without {name}; begin a new training from its weights")
        if not isinstance(found := attributes.get("pruner_state"), dict):
            raise ValueError(f"trainer_state.json: the state of {name} is malformed")
        return found


class GroupLassoCallback(BlockPruningCallback):
    """`GroupLasso` under the stock `Trainer`; options `strength`, `scope`, `start`, `end`, `interval`."""

    algorithm = GroupLasso


class ElasticGroupLassoCallback(BlockPruningCallback):
    """`ElasticGroupLasso` under the stock `Trainer`; options `strength`, `l2`, `scope`, `start`, `end`, `interval`."""

    algorithm = ElasticGroupLasso


class BlockRigLCallback(BlockPruningCallback):
    """`BlockRigL` under the stock `Trainer`; options `distribution`, `drop_fraction`, `start`, `end`, `interval`."""

    algorithm = BlockRigL


class IterativePruningCallback(BlockPruningCallback):
    """`IterativePruning` under the stock `Trainer`; options `rounds`, `scope`, `start`, `end`."""

    algorithm = IterativePruning


class GradualPruningCallback(BlockPruningCallback):
    """`GradualPruning` under the stock `Trainer`; options `scope`, `start`, `end`, `interval`."""

    algorithm = GradualPruning
