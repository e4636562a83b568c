"""Small real image sets as `datasets.Dataset`s with fixed splits: digits and Fashion-MNIST."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ImageData", "load_image_data", "read_idx"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
HUB_FASHION_MNIST = "zalando-datasets/fashion_mnist"
FASHION_NAMES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
SPLIT_SEED = 0  # the splits are part of the data set: no run may draw others

Images = NDArray[np.uint8]  # [N, height, width]
Labels = NDArray[np.int64]  # [N]


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Grey images with fixed splits. Rows give `pixel_values` `[1, size, size]` and `labels`.

    Attributes:
        name: What the set is called.
        size: Height and width of an image.
        label_names: Name of each class.
        mean: Mean pixel of the training images, on a scale from 0 to 1; pixels are normalised with it.
        std: Their standard deviation.
        train: Training images; digits are shifted by up to one pixel, anew each time one is read.
        validation: For every choice.
        test: For the final figures only.
    """

    name: str
    size: int
    label_names: list[str]
    mean: float
    std: float
    train: Dataset
    validation: Dataset
    test: Dataset


def load_image_data(source: str = "digits") -> ImageData:
    """Loads `"digits"`, `"fashion_mnist"` (Debian's package, else the Hub), or a folder with IDX files.

    Digits: scikit-learn's 1,797 images of 8 x 8, 1,200 to train, 237 to validate and 360 to test, stratified.
    Fashion-MNIST and folders with the four files of MNIST: the last 5,000 training images (a tenth, if there are fewer
    than 50,000) validate.

    Raises:
        FileNotFoundError: `source` is none of these, or a file is missing.
        ValueError: A file is no IDX file or cut off.
    """
    if source == "digits":
        return _digits()
    if source == "fashion_mnist":
        found = DEBIAN_FASHION_MNIST.is_dir()
        return _from_arrays(source, *(_idx_folder(DEBIAN_FASHION_MNIST) if found else _hub()), FASHION_NAMES)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the data must be 'digits', 'fashion_mnist' or a folder with IDX files, got {source!r}"
        )
    arrays = _idx_folder(folder)
    return _from_arrays(folder.name, *arrays, [str(label) for label in range(int(arrays[1].max()) + 1)])


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Reads an IDX file of bytes (the format of MNIST), gzipped if its name ends in .gz.

    Raises:
        ValueError: The file is no IDX file of bytes, or holds fewer or more bytes than its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path}: not an IDX file of bytes (it must begin with 00 00 08, got {raw[:4].hex(' ')})")
    shape = [int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(1, 1 + raw[3])]
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if len(body) != np.prod(shape):
        raise ValueError(f"{path}: its header announces {shape}, {np.prod(shape)} bytes, but {len(body)} follow")
    return body.reshape(shape)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images: Images = (digits.data.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    labels: Labels = digits.target.astype(np.int64)
    rest, test = train_test_split(np.arange(1797), test_size=360, random_state=SPLIT_SEED, stratify=labels)
    train, validation = train_test_split(rest, test_size=237, random_state=SPLIT_SEED, stratify=labels[rest])
    splits: list[tuple[Images, Labels]] = [(images[chosen], labels[chosen]) for chosen in (train, validation, test)]
    return _image_data("digits", [str(digit) for digit in range(10)], splits, shift=1)


def _from_arrays(
    name: str, images: Images, labels: Labels, test_images: Images, test_labels: Labels, label_names: list[str]
) -> ImageData:
    held_out = 5000 if len(images) >= 50_000 else len(images) // 10
    splits = [
        (images[:-held_out], labels[:-held_out]),
        (images[-held_out:], labels[-held_out:]),
        (test_images, test_labels),
    ]
    return _image_data(name, label_names, splits, shift=0)


def _idx_folder(folder: Path) -> tuple[Images, Labels, Images, Labels]:
    def read(stem: str) -> NDArray[np.uint8]:
        found = [path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()]
        if not found:
            raise FileNotFoundError(f"{folder}: neither {stem} nor {stem}.gz is there")
        return read_idx(found[0])

    images, test_images = read("train-images-idx3-ubyte"), read("t10k-images-idx3-ubyte")
    labels, test_labels = read("train-labels-idx1-ubyte"), read("t10k-labels-idx1-ubyte")
    for kind, pictures, names in (("train", images, labels), ("t10k", test_images, test_labels)):
        if pictures.ndim != 3 or pictures.shape[1] != pictures.shape[2] or names.shape != pictures.shape[:1]:
            raise ValueError(
                f"{folder}: {kind} needs square images [N, size, size] and labels [N], got {list(pictures.shape)} and "
                f"{list(names.shape)}"
            )
    return images, labels.astype(np.int64), test_images, test_labels.astype(np.int64)


def _hub() -> tuple[Images, Labels, Images, Labels]:
    loaded = datasets.load_dataset(HUB_FASHION_MNIST)
    parts: list[NDArray[Any]] = []
    for split in ("train", "test"):
        parts.append(np.stack([np.asarray(image) for image in loaded[split]["image"]]))
        parts.append(np.asarray(loaded[split]["label"], dtype=np.int64))
    return parts[0], parts[1], parts[2], parts[3]


def _image_data(name: str, label_names: list[str], splits: list[tuple[Images, Labels]], shift: int) -> ImageData:
    size = splits[0][0].shape[-1]
    mean, std = float(splits[0][0].mean() / 255), float(splits[0][0].std() / 255)
    # Bytes, not Array2D or Image: those take 5 to 10 ms to decode a batch, as long as a training step.
    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=label_names)})

    def transform(augment: int) -> Any:
        def apply(batch: dict[str, Any]) -> dict[str, Any]:
            pixels = np.frombuffer(b"".join(batch["image"]), np.uint8).reshape(-1, 1, size, size)
            pixels = (_shifted(torch.from_numpy(pixels / np.float32(255)), augment) - mean) / std
            return {"pixel_values": list(pixels), "labels": batch["label"]}

        return apply

    train, validation, test = (
        Dataset.from_dict(
            {"image": [image.tobytes() for image in images], "label": labels}, features=features
        ).with_transform(transform(augment))
        for (images, labels), augment in zip(splits, (shift, 0, 0), strict=True)
    )
    return ImageData(
        name=name, size=size, label_names=label_names, mean=mean, std=std, train=train, validation=validation, test=test
    )


def _shifted(images: Tensor, reach: int) -> Tensor:
    """Each image `[N, 1, size, size]` moved by up to `reach` pixels along both axes; what enters is black."""
    if reach == 0:
        return images
    count, _, size, _ = images.shape
    padded = torch.nn.functional.pad(images, (reach,) * 4)
    rows, columns = (torch.randint(2 * reach + 1, (count, 1)) + torch.arange(size) for _ in range(2))  # [N, size]
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]
