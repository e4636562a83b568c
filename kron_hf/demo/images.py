"""Small real image sets as `datasets.Dataset`s with fixed splits: digits and Fashion-MNIST."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from kron_hf.command.processor import make_image_processor
from kron_hf.data.grey import load_grey_set

__all__ = ["ImageData", "image_processor", "load_image_data"]


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
    """Loads `"digits"`, `"fashion_mnist"` or a folder with IDX files; see `kron_hf.data.grey.load_grey_set`.

    Raises:
        FileNotFoundError: `source` is none of these, or a file is missing.
        ValueError: A file is no IDX file or cut off.
    """
    grey = load_grey_set(source)
    images = grey.train[0]
    size = images.shape[-1]
    mean, std = float(images.mean() / 255), float(images.std() / 255)
    # Bytes, not Array2D or Image: those take 5 to 10 ms to decode a batch, as long as a training step.
    names = grey.label_names
    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=names)})

    def transform(augment: int) -> Any:
        def apply(batch: dict[str, Any]) -> dict[str, Any]:
            pixels = np.frombuffer(b"".join(batch["image"]), np.uint8).reshape(-1, 1, size, size)
            pixels = (_shifted(torch.from_numpy(pixels / np.float32(255)), augment) - mean) / std
            return {"pixel_values": list(pixels), "labels": batch["label"]}

        return apply

    shift = 1 if source == "digits" else 0
    train, validation, test = (
        Dataset.from_dict(
            {"image": [image.tobytes() for image in images], "label": labels}, features=features
        ).with_transform(transform(augment))
        for (images, labels), augment in zip((grey.train, grey.validation, grey.test), (shift, 0, 0), strict=True)
    )
    return ImageData(
        name=grey.name,
        size=size,
        label_names=names,
        mean=mean,
        std=std,
        train=train,
        validation=validation,
        test=test,
    )


def image_processor(data: ImageData) -> Any:
    """The processor that makes the pixels of these images that the models are trained on."""
    config = SimpleNamespace(num_channels=1, image_size=data.size)
    like = SimpleNamespace(image_mean=[data.mean], image_std=[data.std])
    return make_image_processor(config, like=like)


def _shifted(images: Tensor, reach: int) -> Tensor:
    """Each image `[N, 1, size, size]` moved by up to `reach` pixels along both axes; what enters is black."""
    if reach == 0:
        return images
    count, _, size, _ = images.shape
    padded = torch.nn.functional.pad(images, (reach,) * 4)
    rows, columns = (torch.randint(2 * reach + 1, (count, 1)) + torch.arange(size) for _ in range(2))  # [N, size]
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]
