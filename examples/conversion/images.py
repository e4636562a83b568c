"""Images in and out of the domain of the task, as a DINOv2 backbone takes them: three channels, ImageNet's scale.

In domain: Fashion-MNIST. Out of it: crops of photographs that scikit-image and scikit-learn bring along, half of them
to calibrate on, the other half to judge by.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kron_hf.data.grey import load_grey_set

__all__ = ["SIZE", "fashion", "photograph_crops"]

SIZE = 56  # pixels a side: 4 x 4 patches of 14
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
CALIBRATION = ("astronaut", "brick", "camera", "coffee", "grass", "ihc", "moon", "motorcycle_left", "china")
JUDGING = ("chelsea", "coins", "gravel", "hubble_deep_field", "page", "retina", "rocket", "motorcycle_right", "flower")


def fashion(part: str, start: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, 56, 56]` and labels `[N]` of Fashion-MNIST's `"train"` or `"test"` part, in their own order."""
    grey = load_grey_set("fashion_mnist")
    images, labels = grey.train if part == "train" else grey.test
    stop = None if count is None else start + count
    pixels = torch.tensor(images[start:stop])[:, None].float() / 255
    resized = interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (resized.expand(-1, 3, -1, -1) - MEAN) / STD, torch.tensor(labels[start:stop]).long()


def photograph_crops(part: str, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Crops of photographs, and which photograph each is of.

    Args:
        part: `"calibration"`; or of the other photographs `"train"`, from their left halves, or `"test"`, from the
            right ones.
        count: How many.
        seed: Of their places and sizes.
    """
    names = CALIBRATION if part == "calibration" else JUDGING
    generator = np.random.default_rng([seed, ("calibration", "train", "test").index(part)])
    photographs = [_half(_photograph(name), part) for name in names]
    labels = np.arange(count) % len(names)
    crops = torch.cat([_crop(photographs[label], generator) for label in labels])
    return (crops - MEAN) / STD, torch.tensor(labels).long()


def _photograph(name: str) -> Tensor:
    """`[1, 3, height, width]` in [0, 1]."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels: Any = load_sample_image(f"{name}.jpg")
    else:
        from PIL import Image

        found = find_spec("skimage")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("the photographs come with scikit-image: pip install scikit-image")
        folder = Path(found.origin).parent / "data"
        path = next(path for path in (folder / f"{name}.png", folder / f"{name}.jpg") if path.exists())
        pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.tensor(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


def _half(photograph: Tensor, part: str) -> Tensor:
    middle = photograph.shape[-1] // 2
    return {"calibration": photograph, "train": photograph[..., :middle], "test": photograph[..., middle:]}[part]


def _crop(photograph: Tensor, generator: np.random.Generator) -> Tensor:
    height, width = photograph.shape[-2:]
    side = int(generator.integers(min(height, width) // 3, min(height, width) + 1))
    top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
    crop = photograph[..., top : top + side, left : left + side]
    return interpolate(crop, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
