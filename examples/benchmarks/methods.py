"""The ways that are compared: each makes a model out of a dense one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.cases import Case
from examples.benchmarks.vec_parallel import replace_layers
from kron_hf import KronConfig, KronConv2d, KronLinear, fold_for_inference, get_kron_model
from kron_hf.ops.backend import BACKENDS, forced
from kron_hf.ops.convolution import Way, kron_conv2d
from kron_hf.ops.geometry import Convolution
from kron_hf.targets import find_targets

__all__ = ["CONVOLUTION_WAYS", "METHODS", "PATHS", "Method"]

Build = Callable[[nn.Module, Case, list[str] | None], nn.Module]


@dataclass(frozen=True)
class Method:
    """A way to have a layer or a model.

    Attributes:
        build: Makes it of the dense model, in place or not, for a case and the names of the modules (see `Subject`).
        label: For people.
        forward_only: Whether it cannot be trained.
        subjects: What it serves: `"layer"`, `"conv"` and `"model"`.
        backend: The way of computing that Kronecker layers are forced to take; None is the cost model's choice.
        device: The only device that it runs on; None is any.
        compiled: Whether it runs under `torch.compile`.
    """

    build: Build
    label: str
    forward_only: bool = False
    subjects: tuple[str, ...] = ("layer", "model")
    backend: str | None = None
    device: Literal["cpu", "cuda"] | None = None
    compiled: bool = False

    def forcing(self) -> AbstractContextManager[None]:
        """Within it Kronecker layers take its way."""
        return nullcontext() if self.backend is None else forced(self.backend)


def _kron_config(case: Case, modules: list[str] | None) -> KronConfig:
    assert case.block_size is not None
    assert case.rank is not None
    return KronConfig(
        block_size=case.block_size, rank=case.rank, target_modules=modules, init_weights="random", modules_to_save=None
    )


def _kron(model: nn.Module, case: Case, modules: list[str] | None) -> nn.Module:
    get_kron_model(model, _kron_config(case, modules))
    if case.sparsity:
        for layer in model.modules():
            if isinstance(layer, KronLinear):
                _prune(layer, case.sparsity)
    return model


def _prune(layer: KronLinear, sparsity: float) -> None:
    """Makes that share of blocks zero for good, half of them in empty rows: as where rows were pruned as groups."""
    dead = torch.zeros(layer.s.shape, dtype=torch.bool, device=layer.s.device)
    rows = round(layer.out_blocks * sparsity / 2)
    dead[:rows] = True
    rest = dead.flatten()[rows * layer.in_blocks :]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))
    rest[order[: round(sparsity * dead.numel()) - rows * layer.in_blocks].to(rest.device)] = True
    layer.freeze_mask(dead)


def _folded(model: nn.Module, case: Case, modules: list[str] | None) -> nn.Module:
    return fold_for_inference(_kron(model, case, modules))


def _vec_parallel(model: nn.Module, case: Case, modules: list[str] | None) -> nn.Module:
    return replace_layers(_kron(model, case, modules))


def _compiled(build: Build) -> Build:
    return lambda model, case, modules: torch.compile(build(model, case, modules))  # type: ignore[return-value]


class _BlockSparse(nn.Module):
    """The masked weight in torch's BSR format."""

    def __init__(self, layer: KronLinear) -> None:
        super().__init__()
        self.weight = layer.dense_weight().detach().to_sparse_bsr(layer.block_size)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _bsr(model: nn.Module, case: Case, modules: list[str] | None) -> nn.Module:
    layer = _kron(model, case, modules).get_submodule("fc")
    assert isinstance(layer, KronLinear)
    return nn.Sequential(_BlockSparse(layer))


class _OneWay(nn.Module):
    """A Kronecker convolution that is computed in one way."""

    def __init__(self, layer: KronConv2d, way: Way) -> None:
        super().__init__()
        self.layer = layer
        self.way: Way = way
        self.geometry = Convolution(layer.kernel_size, layer.stride, layer.padding)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return kron_conv2d(x, layer.masked_s() * layer.a, layer.b, layer.bias, self.geometry, self.way)


def _one_way(way: Way) -> Build:
    def build(model: nn.Module, case: Case, modules: list[str] | None) -> nn.Module:
        layer = _kron(model, case, modules).get_submodule("conv")
        assert isinstance(layer, KronConv2d)
        return nn.Sequential(_OneWay(layer, way))

    return build


def _linears(model: nn.Module, case: Case, modules: list[str] | None) -> tuple[dict[str, nn.Linear], int]:
    """What Kronecker layers would replace, and how many parameters S, A and B of those would have."""
    config = _kron_config(case, modules)
    targets = {target.name: target for target in find_targets(model, config, compare_cost=False)}
    entries = 0
    for target in targets.values():
        (block_out, block_in), rank = target.block_size, target.rank
        blocks = target.linear.in_features * target.linear.out_features // (block_out * block_in)
        entries += (1 + rank) * blocks + rank * block_out * block_in
    return {name: target.linear for name, target in targets.items()}, entries


def _lora(model: nn.Module, case: Case, modules: list[str] | None) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    linears, wanted = _linears(model, case, modules)
    rank = max(1, round(wanted / sum(linear.in_features + linear.out_features for linear in linears.values())))
    return inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(linears)), model)


def _lokr(model: nn.Module, case: Case, modules: list[str] | None) -> nn.Module:
    from peft import LoKrConfig, inject_adapter_in_model

    linears, wanted = _linears(model, case, modules)
    choices = [(factor, rank) for factor in (2, 4, 8, 16, 32) for rank in range(1, 65)]
    factor, rank = min(choices, key=lambda choice: abs(_lokr_entries(linears, *choice) - wanted))
    config = LoKrConfig(r=rank, decompose_factor=factor, target_modules=list(linears))
    return inject_adapter_in_model(config, model)


def _lokr_entries(linears: dict[str, nn.Linear], factor: int, rank: int) -> int:
    """Parameters of PEFT's LoKr: a small full factor, and a large one of that rank unless it is small as well."""
    from peft.tuners.lokr.layer import factorization

    entries = 0
    for linear in linears.values():
        (small_out, out), (small_in, in_) = (
            factorization(n, factor) for n in (linear.out_features, linear.in_features)
        )
        entries += small_out * small_in + (rank * (out + in_) if rank < max(out, in_) / 2 else out * in_)
    return entries


def _dense(model: nn.Module, case: Case, modules: list[str] | None) -> nn.Module:
    return model


PATHS = tuple(name for name in BACKENDS if name in ("build-w", "fused") or name.count("-") == 3)


def _path(name: str) -> Method:
    device: Any = "cuda" if name == "fused" else None
    return Method(_kron, f"kron, {name}", backend=name, device=device)


EVERYTHING = ("layer", "conv", "model")
CONVOLUTION_WAYS: tuple[Way, ...] = get_args(Way)

METHODS: dict[str, Method] = {
    "dense": Method(_dense, "dense", subjects=EVERYTHING),
    "dense-compiled": Method(_compiled(_dense), "dense, torch.compile", compiled=True, subjects=EVERYTHING),
    "kron": Method(_kron, "kron", subjects=EVERYTHING),
    "kron-compiled": Method(_compiled(_kron), "kron, torch.compile", compiled=True, subjects=EVERYTHING),
    "kron-folded": Method(_folded, "kron, folded", forward_only=True, subjects=EVERYTHING),
    **{f"kron-{name}": _path(name) for name in PATHS},
    **{
        f"conv-{way.replace('_', '-')}": Method(_one_way(way), f"kron, {way.replace('_', '-')}", subjects=("conv",))
        for way in CONVOLUTION_WAYS
    },
    "vec-parallel": Method(_vec_parallel, "vec-parallel"),
    "lora": Method(_lora, "LoRA"),
    "lokr": Method(_lokr, "LoKr"),
    "bsr": Method(_bsr, "torch BSR", forward_only=True, subjects=("layer",)),
}
