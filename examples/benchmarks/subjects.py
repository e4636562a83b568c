"""The layers and models that are measured, with random weights, and what they are run on."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.cases import Case, Conditions

__all__ = ["MODELS", "Subject", "build_subject"]


@dataclass(frozen=True)
class Subject:
    """What a method is applied to.

    Attributes:
        model: The dense one.
        modules: Names of the linears that methods replace or adapt; None is what `KronConfig` takes by default.
        run: A model's output for the fixed input.
        backward: Goes back from an output.
        inputs: The fixed input.
    """

    model: nn.Module
    modules: list[str] | None
    run: Callable[[nn.Module], Tensor]
    backward: Callable[[Tensor], None]
    inputs: Tensor


def build_subject(case: Case, conditions: Conditions) -> Subject:
    """The dense layer or model of a case, and its input."""
    torch.manual_seed(0)
    where: dict[str, Any] = {"device": conditions.device, "dtype": getattr(torch, conditions.dtype)}
    if case.features is None:
        return _model(case, conditions.batch, where)
    if case.kernel is None:
        return _layer("fc", nn.Linear(*case.features, **where), (conditions.tokens, case.features[0]), where)
    conv = nn.Conv2d(*case.features, case.kernel, case.stride, case.kernel // 2, **where)
    return _layer("conv", conv, (conditions.batch, case.features[0], case.image, case.image), where)


def _layer(name: str, layer: nn.Module, size: tuple[int | None, ...], where: dict[str, Any]) -> Subject:
    """With the gradient of the input, which all layers but the first need."""
    model = nn.Sequential(OrderedDict([(name, layer)]))
    x = torch.randn(size, **where)  # type: ignore[arg-type]
    with torch.no_grad():
        gradient = torch.randn_like(model(x))
    x.requires_grad_()

    def run(model: nn.Module) -> Tensor:
        x.grad = None
        return model(x)

    return Subject(model, [name], run, lambda out: out.backward(gradient), x)


def _model(case: Case, batch: int, where: dict[str, Any]) -> Subject:
    model = MODELS[case.subject]()
    config: Any = model.config
    model = model.to(**where)
    images = torch.randn(batch, config.num_channels, config.image_size, config.image_size, **where)
    labels = torch.randint(config.num_labels, (batch,), device=where["device"])

    def run(model: nn.Module) -> Tensor:
        return model(pixel_values=images).logits

    return Subject(model, None, run, lambda out: F.cross_entropy(out, labels).backward(), images)


def _vit(**sizes: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=sizes.pop("num_labels", 1000), **sizes))


def _swin_tiny() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(SwinConfig(num_labels=1000))  # its defaults are Swin-T at 224


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit-s/16": lambda: _vit(hidden_size=384, intermediate_size=1536, num_attention_heads=6),
    "vit-b/16": lambda: _vit(),
    "swin-t": _swin_tiny,
    "tiny-vit": lambda: _vit(  # for the tests
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_labels=10,
    ),
}  # fmt: skip
