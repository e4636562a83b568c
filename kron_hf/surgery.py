"""Replaces linears and convolutions by Kronecker layers, and back."""

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from tqdm.auto import tqdm

from kron_hf.checkpoint import carry_trained_mark, detach_kron_config
from kron_hf.escaping import printable
from kron_hf.kron_kinds import kron_kind
from kron_hf.kron_layer import KronLayer
from kron_hf.selection.candidates import KronCandidates, converted_layers
from kron_hf.targets import Target, pretrained_parts, refuse_adapters

EXACT = 1 - 1e-6  # share of the energy above which a fit counts as exact: rounding in float32

__all__ = ["make_layers", "replace_modules", "to_dense"]


def make_layers(targets: list[Target], init_weights: str) -> dict[str, KronLayer | KronCandidates]:
    """Builds the Kronecker layer of every target, "random" or "nearest"; the model is not touched yet.

    A target with candidates becomes a `KronCandidates`, which starts "random".

    Raises:
        ValueError: A weight to be replaced is not finite, or is on the meta device where its values are needed; or
            candidates are to be "nearest".
    """
    make = {"random": _random_layer, "nearest": _nearest_layer}[init_weights]
    energies: list[tuple[float, float]] = []
    layers: dict[str, KronLayer | KronCandidates] = {}
    # The bar only appears when the decomposition takes a while.
    for target in tqdm(targets, desc="Kronecker factors", unit="layer", delay=1.0, leave=False):
        _check_finite(target)
        layer = make(target, energies)
        for name, parameter in layer.named_parameters():
            replaced = target.module.bias if name == "bias" else target.module.weight
            parameter.requires_grad_(replaced is not None and replaced.requires_grad)
        layers[target.name] = layer
    if energies:
        total = sum(energy for energy, _ in energies)
        retained = sum(kept for _, kept in energies) / total if total else 1.0
        if retained < EXACT:
            warnings.warn(
                f"init_weights='nearest' kept {retained:.1%} of the energy of the replaced weights "
                f"(relative error {(1 - retained) ** 0.5:.2f}); expect to train the model again",
                stacklevel=4,
            )
    return layers


def replace_modules(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Puts every layer in the place its name says."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def to_dense(model: nn.Module) -> nn.Module:
    """Turns every Kronecker layer back into `nn.Linear` or `nn.Conv2d`, in place, and returns the model.

    What the model then saves loads in plain transformers, without kron_hf. For a `PeftModel` call its
    `merge_and_unload()`.

    Raises:
        ValueError: The model is a single layer or carries PEFT adapters.
    """
    if isinstance(model, KronLayer | KronCandidates):
        raise ValueError("to_dense needs a model that contains Kronecker layers; for a single one use layer.to_dense()")
    refuse_adapters(model)
    # A layer that the model holds under two names stays one layer.
    names = converted_layers(model, remove_duplicate=False)
    dense = {layer: layer.to_dense() for layer in names.values()}
    for layer, module in dense.items():
        carry_trained_mark(layer, module)
    replace_modules(model, {name: dense[layer] for name, layer in names.items()})
    for part in pretrained_parts(model).values():
        detach_kron_config(part)
    return model


def _random_layer(target: Target, energies: list[tuple[float, float]]) -> KronLayer | KronCandidates:
    module = target.module
    layer: KronLayer | KronCandidates = (
        KronCandidates.like(module, target.candidates)
        if target.candidates
        else kron_kind(module, target.name).like(module, target.block_size, target.rank)
    )
    weight = module.weight.detach()
    variance = 0.0 if weight.is_meta else float(weight.float().var(correction=0))
    if variance > 0:
        layer.reset_factors(variance)
    return layer


def _nearest_layer(target: Target, energies: list[tuple[float, float]]) -> KronLayer:
    if target.candidates:
        raise ValueError(f"{printable(target.name)}: candidates start with init_weights='random', got 'nearest'")
    if target.module.weight.is_meta:
        raise ValueError(
            f"{printable(target.name)}: init_weights='nearest' needs its values, but the weight is on the meta device"
        )
    weight = target.module.weight.detach()
    layer = kron_kind(target.module, target.name).like(target.module, target.block_size, target.rank)
    retained = layer.fit_nearest(weight)
    energy = float(weight.float().square().sum())
    energies.append((energy, retained * energy))
    return layer


def _check_finite(target: Target) -> None:
    weight = target.module.weight
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{printable(target.name)}: its weight holds NaN or infinite values")
