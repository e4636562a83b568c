"""The weight files of a Kronecker checkpoint, checked by their headers before anything is allocated."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from kron_hf.checkpoint.compact import check_packed, is_packed, packed_layer
from kron_hf.checkpoint.stored import StoredTensor, check_dtype
from kron_hf.escaping import one_line, plain, shorten, shown
from kron_hf.kron_layer import KronLayer
from kron_hf.selection.candidates import KronCandidates

__all__ = ["check_dtypes", "check_layer", "check_places", "check_unmapped", "read_headers"]


def check_places(files: list[str], folder: str) -> None:
    """Looks at the names of the weight files alone.

    Args:
        files: The weight files.
        folder: What `from_pretrained` was asked for; a local directory must hold all the files.

    Raises:
        FileNotFoundError: A file that the index names does not exist.
        ValueError: A file is no safetensors file or lies elsewhere.
    """
    for path in files:
        _check_place(path, folder)
        if not path.endswith(".safetensors"):
            raise ValueError(f"{_label(path)}: Kronecker checkpoints are safetensors files only")
        if not os.path.isfile(path):  # noqa: PTH113  # pathlib's raises on a name that is too long
            raise FileNotFoundError(f"{_label(path)}: this file of the checkpoint does not exist")


def read_headers(files: list[str]) -> dict[str, StoredTensor]:
    """The tensors of all weight files by name.

    Raises:
        ValueError: A file is not readable as safetensors, or has a tensor with an unprintable name.
    """
    stored: dict[str, StoredTensor] = {}
    for path in files:
        file = _label(path)
        try:
            with safe_open(path, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    tensor = handle.get_slice(key)
                    stored[key] = StoredTensor(file, tensor.get_shape(), tensor.get_dtype(), path)
        except SafetensorError as error:
            reason = one_line(str(error))
            raise ValueError(f"{file}: not a readable safetensors file, perhaps truncated ({reason})") from error
    for key, tensor in stored.items():
        # transformers logs the names of tensors that it does not know as they are.
        if not key.isprintable():
            raise ValueError(f"{tensor.file}: the name of tensor {shown(key)} holds unprintable characters")
    return stored


def check_unmapped(stored: Mapping[str, StoredTensor], mapped: set[str]) -> None:
    """Refuses files with Kronecker factors that would be ignored.

    Args:
        stored: What the files hold.
        mapped: The names of modules in the map, and those in the model that it stands for.

    Raises:
        ValueError: There are factors of another module.
    """
    for key, tensor in stored.items():
        compact = packed_layer(key)
        name = compact or key.removesuffix(".s")
        others = {f"{name}.b"} if compact else {f"{name}.a", f"{name}.b"}
        if name != key and name not in mapped and others <= stored.keys():
            raise ValueError(
                f"config.json: {tensor.file} holds Kronecker factors of {shown(name)}, which the map does not name"
            )


def check_layer(
    stored: Mapping[str, StoredTensor],
    name: str,
    in_map: str,
    layer: KronLayer | KronCandidates,
    files: list[str],
    *,
    compact: bool = False,
) -> None:
    """Compares an expected layer with what the files hold.

    Args:
        stored: What the files hold.
        name: The name of the layer in the model.
        in_map: The name that the map gives it.
        layer: The layer, on the meta device.
        files: The weight files, for errors.
        compact: Whether its factors may be stored without their zeros.

    Raises:
        ValueError: A tensor is missing, or has another shape or no floating-point dtype.
    """
    tensors = layer.state_dict()
    factors = [key.rpartition(".") for key in tensors if key.rpartition(".")[2] == "s"]
    inner = [f"{prefix}{dot}" for prefix, dot, _ in factors]  # of candidates, too
    # The backbone inside a headed model, saved by itself, writes its own tensor names beside the whole map.
    here = any(f"{name}.{prefix}s" in stored or is_packed(stored, f"{name}.{prefix}"[:-1]) for prefix in inner)
    module_name = name if here else in_map
    packed: set[str] = set()
    for prefix in inner if compact else ():
        if is_packed(stored, f"{module_name}.{prefix}"[:-1]):
            check_packed(stored, f"{module_name}.{prefix}"[:-1], list(tensors[f"{prefix}a"].shape))
            packed |= {f"{prefix}s", f"{prefix}a"}
    for key, expected in tensors.items():
        full = f"{module_name}.{key}"
        if key in packed or (full not in stored and not expected.numel()):
            continue  # the empty weight: Accelerate's files leave it out
        if full not in stored:
            listed = shorten(", ".join(map(_label, files)), 300)
            raise ValueError(f"{listed}: tensor {shown(full)} is missing")
        _check_tensor(full, stored[full], list(expected.shape))


def check_dtypes(stored: Mapping[str, StoredTensor], model: PreTrainedModel) -> None:
    """Refuses integers where the model has floating-point parameters; transformers would load them as they are."""
    for name, parameter in model.named_parameters():
        if name in stored and parameter.is_floating_point():
            check_dtype(name, stored[name])


def _check_tensor(name: str, tensor: StoredTensor, shape: list[int]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.file}: tensor {shown(name)} has shape {shown(tensor.shape)}, config.json requires {shape}"
        )
    check_dtype(name, tensor)


def _check_place(path: str, folder: str) -> None:
    if not folder or not Path(folder).is_dir():
        return
    # Links inside the folder are the user's own; normalised alone, "../" is not.
    inside, root = os.path.abspath(path), os.path.abspath(folder)  # noqa: PTH100
    if os.path.commonpath([inside, root]) != root:
        raise ValueError(f"model.safetensors.index.json: {_label(path)} lies outside of the checkpoint's directory")


def _label(path: str) -> str:
    return plain(Path(path).name)
