"""Small sets of grey images with fixed splits: digits, Fashion-MNIST, folders with IDX files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kron_hf.data.idx import Images, Labels, read_idx_folder

__all__ = ["GreySet", "load_grey_set"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
HUB_FASHION_MNIST = "zalando-datasets/fashion_mnist"
FASHION_NAMES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
SPLIT_SEED = 0  # the splits are part of the data set: no run may draw others

Split = tuple[Images, Labels]


@dataclass(frozen=True, kw_only=True)
class GreySet:
    """Grey square images `[N, size, size]` and labels `[N]` of each split, and the name of each class."""

    name: str
    label_names: list[str]
    train: Split
    validation: Split
    test: Split


def load_grey_set(source: str = "digits") -> GreySet:
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
        return _from_arrays(source, *(read_idx_folder(DEBIAN_FASHION_MNIST) if found else _hub()), FASHION_NAMES)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the data must be 'digits', 'fashion_mnist' or a folder with IDX files, got {source!r}"
        )
    arrays = read_idx_folder(folder)
    classes = 1 + max((int(labels.max()) for labels in (arrays[1], arrays[3]) if len(labels)), default=-1)
    return _from_arrays(folder.resolve().name, *arrays, [str(label) for label in range(classes)])


def _digits() -> GreySet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images: Images = (digits.data.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    labels: Labels = digits.target.astype(np.int64)
    rest, test = train_test_split(np.arange(1797), test_size=360, random_state=SPLIT_SEED, stratify=labels)
    train, validation = train_test_split(rest, test_size=237, random_state=SPLIT_SEED, stratify=labels[rest])
    splits: list[Split] = [(images[chosen], labels[chosen]) for chosen in (train, validation, test)]
    names = [str(digit) for digit in range(10)]
    return GreySet(name="digits", label_names=names, train=splits[0], validation=splits[1], test=splits[2])


def _from_arrays(
    name: str, images: Images, labels: Labels, test_images: Images, test_labels: Labels, label_names: list[str]
) -> GreySet:
    held_out = 5000 if len(images) >= 50_000 else len(images) // 10
    end = len(images) - held_out
    return GreySet(
        name=name,
        label_names=label_names,
        train=(images[:end], labels[:end]),
        validation=(images[end:], labels[end:]),
        test=(test_images, test_labels),
    )


def _hub() -> tuple[Images, Labels, Images, Labels]:
    import datasets

    loaded = datasets.load_dataset(HUB_FASHION_MNIST)
    parts: list[NDArray[Any]] = []
    for split in ("train", "test"):
        parts.append(np.stack([np.asarray(image) for image in loaded[split]["image"]]))
        parts.append(np.asarray(loaded[split]["label"], dtype=np.int64))
    return parts[0], parts[1], parts[2], parts[3]
