"""One run: what the command line and the declared recipes come to."""

import argparse
import json
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from recipe import RECIPES, AugmentationSettings, Method, Model, Training, load_recipes

__all__ = ["Plan", "make_plan", "parse_arguments"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a run.

    Attributes:
        experiment: Name of the data set in the row of results.
        model_name: Of `recipes.yaml`.
        model: What that is.
        overrides: Sizes that differ from it.
        method_name: Of `recipes.yaml`.
        method: What that is, with the block size, rank and l1 of this run.
        training: How it is trained.
        augmentation: What happens to the images.
        target_sparsity: To train to; None for dense models, under l1 and while a block size is chosen.
        seed: Of everything that is random.
        base_rate: Learning rate at the declared global batch.
        per_device_batch: Images a process and forward pass.
        processes: How many there are.
        accumulation: Forward passes an optimizer step.
        max_steps: Optimizer steps, if not as many as the epochs have.
    """

    experiment: str
    model_name: str
    model: Model
    overrides: dict[str, Any]
    method_name: str
    method: Method
    training: Training
    augmentation: AugmentationSettings
    target_sparsity: float | None
    seed: int
    base_rate: float
    per_device_batch: int
    processes: int
    accumulation: int
    max_steps: int | None

    @property
    def global_batch(self) -> int:
        """Images an optimizer step."""
        return self.per_device_batch * self.processes * self.accumulation

    @property
    def learning_rate(self) -> float:
        """Scaled linearly to the real global batch."""
        return self.base_rate * self.global_batch / self.training.global_batch

    def steps_per_epoch(self, images: int) -> int:
        """Optimizer steps in a pass over so many images; the last one may have fewer of them."""
        batches = math.ceil(images / (self.per_device_batch * self.processes))
        return math.ceil(batches / self.accumulation)

    def steps(self, images: int) -> int:
        """Optimizer steps of the whole training."""
        return self.max_steps or round(self.training.epochs * self.steps_per_epoch(images))

    def warmup_steps(self, images: int) -> int:
        """Optimizer steps in which the learning rate rises."""
        return min(round(self.training.warmup_epochs * self.steps_per_epoch(images)), self.steps(images) // 2)

    def identity(self) -> dict[str, Any]:
        """The columns of a row of results that tell it from others."""
        size = self.method.block_size
        return {
            "experiment": self.experiment,
            "model": self.model_name,
            "method": self.method_name,
            "block_size": [size, size] if isinstance(size, int) else size and list(size),
            "rank": self.method.rank,
            "l1": self.method.l1,
            "options": self.method.options,
            "target_sparsity": self.target_sparsity,
            "seed": self.seed,
            "learning_rate": self.base_rate,
            "epochs": self.training.epochs,
            "max_steps": self.max_steps,
            "global_batch": self.global_batch,
        }

    def settings(self) -> dict[str, Any]:
        """All but how a step's images are spread over processes, which may change between the parts of a run."""
        spread = ("per_device_batch", "processes", "accumulation")
        kept = {key: value for key, value in asdict(self).items() if key not in spread}
        return json.loads(json.dumps({**kept, "global_batch": self.global_batch}))

    def name(self) -> str:
        """A folder's name for this run."""
        parts = self.identity()
        parts["block_size"] = parts["block_size"] and "x".join(map(str, parts["block_size"]))
        parts["options"] = "_".join(f"{key}-{value}" for key, value in self.method.options.items())
        shown = [f"{key}-{value}" for key, value in parts.items() if value not in (None, "")]
        return re.sub(r"[^\w.,+-]", "_", "_".join(shown))


def parse_arguments(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-tiny", help="vit-tiny, vit-base or swin-tiny")
    parser.add_argument("--method", default="kron_target", help="a method of recipes.yaml")
    parser.add_argument("--rank", type=int, help="of Kronecker layers")
    parser.add_argument("--block-size", type=int, nargs="+", help="one number or two: out, in")
    parser.add_argument("--target-sparsity", type=float)
    parser.add_argument("--l1", type=float, help="weight of the penalty, for kron_l1")
    parser.add_argument(
        "--method-options", type=json.loads, default={}, help="JSON: arguments of the method's callback"
    )
    parser.add_argument("--learning-rate", type=float, help="at the declared global batch; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--max-steps", type=int, help="overrides --epochs")
    parser.add_argument("--global-batch", type=int, help="images an optimizer step; the learning rate scales with it")
    parser.add_argument("--per-device-batch", type=int, default=64)
    parser.add_argument("--dataset", default="uoft-cs/cifar100", help="an id on the Hub or a folder in that format")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/cifar100"), help="each run has a folder there")
    parser.add_argument("--results", type=Path, help="default: results.jsonl in the output directory")
    parser.add_argument("--recipes", type=Path, default=RECIPES)
    parser.add_argument("--model-overrides", type=json.loads, default={}, help="JSON: sizes of the model's config")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--save-steps", type=int, help="checkpoints and validations; default: every 5 epochs")
    parser.add_argument("--num-workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--validation-only", action="store_true", help="leave the test images alone, for a search")
    parser.add_argument("--bf16", action="store_true", help="also set by the config of Accelerate")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> Plan:
    """Resolves the command line against the recipes.

    Raises:
        ValueError: A name is not declared, an option does not go with the method, or the batches do not add up.
    """
    recipes = load_recipes(options.recipes)
    training, augmentation = recipes.training, recipes.augmentation
    if options.epochs is not None:
        training = replace(training, epochs=options.epochs)
    if options.image_size is not None:
        augmentation = replace(augmentation, image_size=options.image_size)
    method = _method(_declared(recipes.methods, options.method, "method"), options)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    global_batch = training.global_batch if options.global_batch is None else options.global_batch
    rate = options.learning_rate if options.learning_rate is not None else method.rate(method.rank)
    has_target = method.kind == "baseline" or (method.kind == "kron" and method.l1 is None)
    if options.target_sparsity is not None and not has_target:
        raise ValueError(f"--target-sparsity does not go with {options.method}")
    target = training.target_sparsity if options.target_sparsity is None else options.target_sparsity
    return Plan(
        experiment="cifar100",
        model_name=options.model,
        model=_declared(recipes.models, options.model, "model"),
        overrides=options.model_overrides,
        method_name=options.method,
        method=method,
        training=training,
        augmentation=augmentation,
        target_sparsity=target if has_target else None,
        seed=options.seed,
        base_rate=rate,
        per_device_batch=options.per_device_batch,
        processes=processes,
        accumulation=_accumulation(global_batch, options.per_device_batch, processes),
        max_steps=options.max_steps,
    )


def _declared(known: dict[str, Any], name: str, kind: str) -> Any:
    if name not in known:
        raise ValueError(f"--{kind} {name!r} is not declared; there are {sorted(known)}")
    return known[name]


def _method(method: Method, options: argparse.Namespace) -> Method:
    given: dict[str, Any] = {}
    for name, allowed in (
        ("rank", method.rank is not None),
        ("block_size", method.block_size is not None),
        ("l1", method.l1 is not None),
    ):
        value = getattr(options, name)
        if value is None:
            continue
        if not allowed:
            raise ValueError(f"--{name.replace('_', '-')} does not go with --method {options.method}")
        given[name] = value
    if "block_size" in given:
        size = given["block_size"]
        if len(size) > 2:
            raise ValueError(f"--block-size takes one number or two (out, in), got {size}")
        given["block_size"] = size[0] if len(size) == 1 else tuple(size)
    if options.method_options and method.kind == "dense":
        raise ValueError(f"--method-options does not go with --method {options.method}")
    return replace(method, **given, options={**method.options, **options.method_options})


def _accumulation(global_batch: int, per_device_batch: int, processes: int) -> int:
    at_once = per_device_batch * processes
    if min(per_device_batch, global_batch) < 1:
        raise ValueError(f"batches must be positive, got {per_device_batch} a process and {global_batch} a step")
    if global_batch % at_once:
        raise ValueError(
            f"{global_batch} images a step cannot be made of {per_device_batch} on each of {processes} processes: "
            f"{at_once} does not divide it; change --per-device-batch or --global-batch"
        )
    return global_batch // at_once
