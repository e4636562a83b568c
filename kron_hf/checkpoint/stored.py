"""What the header of a weight file says of a tensor, before it is read."""

from typing import NamedTuple

from kron_hf.escaping import shown

__all__ = ["StoredTensor", "check_dtype"]

FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")


class StoredTensor(NamedTuple):
    """What the header of a file says of one tensor.

    Attributes:
        file: The name of the file, as errors show it.
        shape: Shape of the tensor.
        dtype: As safetensors calls it, such as "F32".
        path: Where the file is.
    """

    file: str
    shape: list[int]
    dtype: str
    path: str


def check_dtype(name: str, tensor: StoredTensor, allowed: tuple[str, ...] = FLOAT_DTYPES) -> None:
    """Refuses integers where a model has floating-point parameters.

    Raises:
        ValueError: The dtype is another than those that are allowed.
    """
    if tensor.dtype not in allowed:
        raise ValueError(
            f"{tensor.file}: tensor {shown(name)} has dtype {tensor.dtype}, not one of {', '.join(allowed)}"
        )
