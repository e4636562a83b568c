"""IDX files, the format of MNIST."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["holds_idx_files", "read_idx", "read_idx_folder"]

Images = NDArray[np.uint8]  # [N, height, width]
Labels = NDArray[np.int64]  # [N]
TRAIN_IMAGES = "train-images-idx3-ubyte"


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Reads an IDX file of bytes, gzipped if its name ends in .gz.

    Raises:
        ValueError: The file is no IDX file of bytes, or holds fewer or more bytes than its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path}: not an IDX file of bytes (it must begin with 00 00 08, got {raw[:4].hex(' ')})")
    shape = [int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(1, 1 + raw[3])]
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if len(body) != np.prod(shape):
        raise ValueError(f"{path}: its header announces {shape}, {np.prod(shape)} bytes, but {len(body)} follow")
    return body.reshape(shape)


def holds_idx_files(folder: Path) -> bool:
    """Whether `read_idx_folder` is meant for this folder."""
    return any((folder / name).is_file() for name in (TRAIN_IMAGES, f"{TRAIN_IMAGES}.gz"))


def read_idx_folder(folder: Path) -> tuple[Images, Labels, Images, Labels]:
    """Training images and labels, test images and labels of a folder with the four files of MNIST.

    Raises:
        FileNotFoundError: One of the four is missing.
        ValueError: A file is no IDX file, cut off, or does not fit the others.
    """
    images, test_images = _read(folder, TRAIN_IMAGES), _read(folder, "t10k-images-idx3-ubyte")
    labels, test_labels = _read(folder, "train-labels-idx1-ubyte"), _read(folder, "t10k-labels-idx1-ubyte")
    for kind, pictures, names in (("train", images, labels), ("t10k", test_images, test_labels)):
        if pictures.ndim != 3 or pictures.shape[1] != pictures.shape[2] or names.shape != pictures.shape[:1]:
            raise ValueError(
                f"{folder}: {kind} needs square images [N, size, size] and labels [N], got {list(pictures.shape)} and "
                f"{list(names.shape)}"
            )
    return images, labels.astype(np.int64), test_images, test_labels.astype(np.int64)


def _read(folder: Path, stem: str) -> NDArray[np.uint8]:
    found = [path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: neither {stem} nor {stem}.gz is there")
    return read_idx(found[0])
