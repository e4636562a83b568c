"""The images of an experiment as tensors, held in memory: small models are done with a batch before a loader is."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kron_hf.data.grey import Split, load_grey_set

__all__ = ["MNIST_FOLDER", "ImageTensors", "load_image_tensors"]

MNIST_FOLDER = Path("runs/mnist")  # where get_mnist.py puts it


@dataclass(frozen=True, kw_only=True)
class ImageTensors:
    """Each split as images `[N, 1, size, size]`, normalised with the training pixels, and labels `[N]`."""

    size: int
    classes: int
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_image_tensors(name: str, train_images: int | None = None) -> ImageTensors:
    """Loads `"mnist"` (from `MNIST_FOLDER`), or what `load_grey_set` knows; keeps the first `train_images`.

    Raises:
        FileNotFoundError: The images are not there.
    """
    if name == "mnist" and not MNIST_FOLDER.is_dir():
        raise FileNotFoundError(f"{MNIST_FOLDER} is missing; examples/experiments/get_mnist.py makes it")
    grey = load_grey_set(str(MNIST_FOLDER) if name == "mnist" else name)
    train = grey.train[0][:train_images], grey.train[1][:train_images]
    mean, std = float(train[0].mean()), float(train[0].std())

    def tensors(split: Split) -> tuple[Tensor, Tensor]:
        images, labels = (torch.tensor(array) for array in split)
        return (images[:, None].float() - mean) / std, labels

    return ImageTensors(
        size=train[0].shape[-1],
        classes=len(grey.label_names),
        train=tensors(train),
        validation=tensors(grey.validation),
        test=tensors(grey.test),
    )
