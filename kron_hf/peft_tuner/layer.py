"""The Kronecker layer of a PEFT adapter, in the place of the linear or convolution that it replaces."""

# PEFT types its own layers as wrappers of a base layer, which this one has not.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from typing import NoReturn

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from kron_hf.checkpoint import mark_trained
from kron_hf.kron_layer import KronLayer

__all__ = ["KronTunerLayer", "refuse"]

# What other code reads of the layer that was there.
SIZES = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")


def refuse(action: str, instead: str) -> NoReturn:
    """Raises the error of everything that needs the replaced weights."""
    raise NotImplementedError(
        f"{action} needs the base weights, but a Kronecker adapter replaces them and keeps no copy; {instead}"
    )


class KronTunerLayer(nn.Module, BaseTunerLayer):
    """Holds the Kronecker layer of one adapter under its name, as PEFT's state dicts expect; there is no base layer.

    Args:
        layer: The layer that stands in for a linear or a convolution.
        adapter_name: Name of the adapter.
        module_name: Name of the replaced module, for errors.
    """

    adapter_layer_names = ("kron_layers",)

    def __init__(self, layer: KronLayer, adapter_name: str, module_name: str) -> None:
        super().__init__()
        # In an adapter file the empty buffer would only be in the way: without kron_hf the file does not load at all.
        layer.register_buffer("weight", layer.weight, persistent=False)
        self.kron_layers = nn.ModuleDict({adapter_name: layer})
        for name in SIZES:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.adapter_name, self.module_name = adapter_name, module_name
        self._active_adapter = [adapter_name]
        self.merged_adapters = []
        self.train(layer.training)

    @property
    def layer(self) -> KronLayer:
        """The Kronecker layer."""
        layer = self.kron_layers[self.adapter_name]
        assert isinstance(layer, KronLayer)
        return layer

    @property
    def weight(self) -> Tensor:
        """As `KronLinear.weight`: empty, with the dtype and device of the layer."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, `[out]`."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """As the Kronecker layer."""
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
    ) -> nn.Linear | nn.Conv2d:
        """The dense layer of the same function."""
        if not merge:
            refuse("unload()", "load the base model again, or call merge_and_unload() for a dense model")
        dense = self.layer.to_dense()
        mark_trained(dense)
        return dense

    def __repr__(self) -> str:
        return f"kron.{super().__repr__()}"
