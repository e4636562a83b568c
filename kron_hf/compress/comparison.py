"""A compressed model beside the dense one."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from kron_hf.command.table import aligned
from kron_hf.compress.fidelity import AGREEMENT, FEATURE_ERROR, fidelity
from kron_hf.compress.task import Task
from kron_hf.data.splits import LabelledImages
from kron_hf.escaping import plain
from kron_hf.summary import kron_summary, model_flops
from kron_hf.summary.latency import alternating_milliseconds, machine

__all__ = ["BATCHES", "Comparison", "compare"]

BATCHES = (1, 32)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Figures of both models by name.

    Attributes:
        dense: Of the dense model: what was measured on the validation and test images, `params`, `layer_params` (of
            the layers that were converted), `flops` of one image, `file_bytes`, `milliseconds_1`, `milliseconds_32`.
        compressed: The same of the compressed one, S folded into A.
        stages: What was measured on the validation images after each stage.
        dataset: Name of the images.
        about_dense: What the dense model is, where that is not plain.
        measured_on: Machine of the milliseconds, and how many forwards their medians are of.
        fidelity: How near the two are on images of the task and on others, by their name (see `fidelity`).
    """

    dense: dict[str, float]
    compressed: dict[str, float]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    dataset: str = ""
    about_dense: str = ""
    measured_on: str = ""
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Comparison":
        """Of what `to_dict` gave."""
        return cls(**values)

    def __str__(self) -> str:
        rows = [("", "dense", "compressed", "ratio"), *(self._row(name) for name in self.dense)]
        about = f" (dense: {self.about_dense})" if self.about_dense else ""
        parts = [f"{plain(self.dataset)}{about}:", *self._stages(), aligned(rows), *self._fidelity()]
        return "\n".join([*parts, f"(milliseconds: medians in turn, measured now on this machine, {self.measured_on})"])

    def _stages(self) -> list[str]:
        """The first figure that is no loss, after each stage."""
        names = [name for name in self.dense if name.startswith("validation_") and not name.endswith("_loss")]
        if not names or not self.stages:
            return []
        steps = {"dense": self.dense, **self.stages}
        shown = ", ".join(f"{stage} {figures[names[0]]:.4f}" for stage, figures in steps.items())
        return [f"{_label(names[0])}: {shown}"]

    def _fidelity(self) -> list[str]:
        if not self.fidelity:
            return []
        rows = [("compressed beside dense", "same prediction", "error of the final tokens")]
        rows += [
            (plain(name), f"{values[AGREEMENT]:.4f}", f"{values[FEATURE_ERROR]:.4f}")
            for name, values in self.fidelity.items()
        ]
        return ["", aligned(rows)]

    def _row(self, name: str) -> tuple[str, ...]:
        before, after = self.dense[name], self.compressed[name]
        if name.startswith(("validation_", "test_")):
            return _label(name), f"{before:.4f}", f"{after:.4f}", ""
        style = ".2f" if name.startswith("milliseconds") else ","
        return _label(name), format(before, style), format(after, style), f"{after / before:.3f}"


def compare(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    task: Task,
    stages: dict[str, dict[str, float]],
    *,
    about_dense: str = "",
    others: tuple[str, LabelledImages] | None = None,
    other_images: int = 1000,
) -> Comparison:
    """Measures both models; the test images are read here and nowhere else.

    Args:
        dense: The dense model.
        model: The compressed one.
        task: The images.
        stages: Figures on the validation images after each stage: of the dense model, then of each that followed.
        about_dense: What the dense model is, where that is not plain.
        others: Name and images of another kind, on which the two are compared besides.
        other_images: How many of those, and of the task's own.
    """
    *_, last = stages
    figures = [dict(stages["dense"]), dict(stages[last])]
    for model_figures, each in zip(figures, (dense, model), strict=True):
        if task.splits.test is not None:
            model_figures |= task.measure(each, task.splits.test, "test")
    summary = kron_summary(model)
    figures[0] |= {"params": summary.dense_params, "layer_params": summary.converted.dense_params}
    figures[1] |= {"params": summary.deployed_params, "layer_params": summary.converted.deployed_params}
    pixels = task.examples(task.splits.validation)[0]["pixel_values"][None].to(model.device)
    for model_figures, each in zip(figures, (dense, model), strict=True):
        model_figures["flops"] = model_flops(each, {"pixel_values": pixels}, compute=True).forward
        model_figures["file_bytes"] = _file_bytes(each)
    counts: dict[int, int] = {}
    for size in BATCHES:
        batch = {"pixel_values": pixels.expand(size, -1, -1, -1).contiguous()}
        medians, counts[size] = alternating_milliseconds([dense.eval(), model.eval()], batch)
        for model_figures, milliseconds in zip(figures, medians, strict=True):
            model_figures[f"milliseconds_{size}"] = milliseconds
    runs = " and ".join(f"{count} forwards of {size}" for size, count in counts.items())
    return Comparison(
        dense=figures[0],
        compressed=figures[1],
        stages={name: values for name, values in stages.items() if name != "dense"},
        dataset=task.splits.name,
        about_dense=about_dense,
        measured_on=f"{machine(torch.device(model.device))}; {runs}",
        fidelity={} if others is None else _fidelities(dense, model, task, others, other_images),
    )


def _fidelities(
    dense: PreTrainedModel, model: PreTrainedModel, task: Task, others: tuple[str, LabelledImages], count: int
) -> dict[str, dict[str, float]]:
    own = task.splits.validation if task.splits.test is None else task.splits.test
    kind = "validation" if task.splits.test is None else "test"
    sets = {f"{task.splits.name}, {kind}": own, f"{others[0]}, out of domain": others[1]}
    size = task.options.batch_size
    return {name: fidelity(dense, model, task.some(images, count), batch_size=size) for name, images in sets.items()}


def _file_bytes(model: PreTrainedModel) -> int:
    """Of the weights as `save_pretrained` writes them."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _label(name: str) -> str:
    labels = {
        "params": "parameters, deployed",
        "layer_params": "  of the converted layers",
        "flops": "FLOPs an image",
        "file_bytes": "bytes of the file",
        **{f"milliseconds_{size}": f"milliseconds, batch {size}" for size in BATCHES},
    }
    return labels.get(name, plain(name.replace("_", " ")))
