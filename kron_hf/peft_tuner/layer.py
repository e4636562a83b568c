"""The Kronecker layer of a PEFT adapter, in the place of the linear that it replaces."""

# PEFT types its own layers as wrappers of a base layer, which this one has not.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from kron_hf.checkpoint import mark_trained
from kron_hf.layers import KronLinear
from kron_hf.targets import Target

__all__ = ["KronTunerLayer", "StoredKronLinear", "refuse"]


def refuse(action: str, instead: str) -> NoReturn:
    """Raises the error of everything that needs the replaced weights."""
    raise NotImplementedError(
        f"{action} needs the base weights, but a Kronecker adapter replaces them and keeps no copy; {instead}"
    )


class StoredKronLinear(KronLinear):
    """A `KronLinear` on the meta device that waits for the tensors of a stored adapter.

    Memory is taken for tensors that a file holds, never for sizes that its config claims.
    """

    @classmethod
    def for_target(cls, target: Target) -> "StoredKronLinear":
        """The layer for a module, with its sizes, dtype and mode."""
        linear = target.linear
        sizes = (linear.in_features, linear.out_features, target.block_size, target.rank)
        with torch.device("meta"):
            layer = cls(*sizes, bias=linear.bias is not None, dtype=linear.weight.dtype)
        layer.register_buffer("weight", torch.empty(0, device=linear.weight.device, dtype=linear.weight.dtype))
        mark_trained(layer)
        return layer.train(linear.training)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, parameter in list(self.named_parameters()):
            stored = state_dict.get(prefix + name)
            if parameter.is_meta and stored is not None and stored.shape == parameter.shape:
                memory = torch.empty_like(parameter, device=self.weight.device)
                setattr(self, name, nn.Parameter(memory, requires_grad=parameter.requires_grad))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        mark_trained(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' loader sets parameters one by one, without load_state_dict, which freezes the mask elsewhere.
        arrives = name == "s" and isinstance(value, Tensor) and not value.is_meta and "s" in self._parameters
        arrives = arrives and self.s.is_meta
        super().__setattr__(name, value)
        if arrives:
            self.freeze_mask()


class KronTunerLayer(nn.Module, BaseTunerLayer):
    """Holds the `KronLinear` of one adapter under its name, as PEFT's state dicts expect; there is no base layer.

    Args:
        layer: The layer that stands in for a linear.
        adapter_name: Name of the adapter.
        module_name: Name of the replaced module, for errors.
    """

    adapter_layer_names = ("kron_layers",)

    def __init__(self, layer: KronLinear, adapter_name: str, module_name: str) -> None:
        super().__init__()
        # In an adapter file the empty buffer would only be in the way: without kron_hf the file does not load at all.
        layer.register_buffer("weight", layer.weight, persistent=False)
        self.kron_layers = nn.ModuleDict({adapter_name: layer})
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.adapter_name, self.module_name = adapter_name, module_name
        self._active_adapter = [adapter_name]
        self.merged_adapters = []
        self.train(layer.training)

    @property
    def layer(self) -> KronLinear:
        """The Kronecker layer."""
        layer = self.kron_layers[self.adapter_name]
        assert isinstance(layer, KronLinear)
        return layer

    @property
    def weight(self) -> Tensor:
        """As `KronLinear.weight`: empty, with the dtype and device of the layer."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, `[out_features]`."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` to `[..., out_features]`."""
        if not x.is_meta:
            self.check_loaded()
        return self.layer(x)

    def check_loaded(self) -> None:
        """Raises a ValueError if tensors of the adapter are still to come."""
        if missing := [name for name, parameter in self.layer.named_parameters() if parameter.is_meta]:
            raise ValueError(
                f"{self.module_name}: the adapter's {', '.join(missing)} were not loaded. A config with `modules` is "
                "that of a stored adapter: load its weights, or make a new adapter from a KronConfig without `modules`"
            )

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes the adapter trainable, or freezes it in inference mode; there is no other to switch to.

        Raises:
            ValueError: Another name, or none.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if names != [self.adapter_name]:
            raise ValueError(
                f"a Kronecker adapter replaces the base weights, so it is always active and the only one: set_adapter "
                f"takes {self.adapter_name!r}, got {adapter_names!r}; load the base model again for another adapter"
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Does nothing; an adapter that replaces weights cannot be disabled."""
        if not enabled:
            refuse("disabling the adapter", "load the base model again to run it without the adapter")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see `merge_and_unload`."""
        refuse("merging into a model that stays an adapter model", "call merge_and_unload() for a dense model")

    def unmerge(self) -> None:
        """Refused: nothing is ever merged."""
        refuse("unmerging", "load the base model and the adapter again")

    def delete_adapter(self, adapter_name: str) -> None:
        """Refused: nothing would be left."""
        refuse("deleting the adapter", "load the base model again")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Linear:
        """The dense layer of the same function."""
        if not merge:
            refuse("unload()", "load the base model again, or call merge_and_unload() for a dense model")
        linear = self.layer.to_linear()
        mark_trained(linear)
        return linear

    def __repr__(self) -> str:
        return f"kron.{super().__repr__()}"
