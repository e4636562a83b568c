"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) as timm's `rand-m9-mstd0.5-inc1`, for a batch on any device."""

import torch
from image_ops import COLOUR_OPS
from torch import Generator, Tensor
from warping import WARPS, warp

__all__ = ["OPERATIONS", "argument", "rand_augment"]

OPERATIONS = (*COLOUR_OPS, *WARPS)
MAX_MAGNITUDE = 10.0
# At the largest magnitude: degrees, shear, share of the size.
LARGEST = {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45}


def rand_augment(
    images: Tensor,
    generator: Generator,
    *,
    magnitude: float,
    magnitude_std: float,
    operations: int,
    probability: float,
    fill: Tensor,
) -> Tensor:
    """Applies random operations to each uint8 image `[N, 3, H, W]`; each image has its own.

    Args:
        images: The images; they are not changed.
        generator: On the CPU.
        magnitude: How strong the operations are, 0 to 10: the `m` of timm's string.
        magnitude_std: Standard deviation of the magnitude, drawn for each image and operation: `mstd`.
        operations: Operations an image, drawn with replacement; they are applied one after the other.
        probability: Of each of them to be applied.
        fill: `[3]`, what warps put where the image does not reach.
    """
    images, count = images.clone(), len(images)
    for _ in range(operations):
        chosen = torch.randint(len(OPERATIONS), (count,), generator=generator)
        applied = torch.rand(count, generator=generator) < probability
        noise = torch.randn(count, generator=generator)
        negative = torch.rand(count, generator=generator) < 0.5
        level = (magnitude + magnitude_std * noise).clamp(0, MAX_MAGNITUDE) / MAX_MAGNITUDE
        for index, name in enumerate(OPERATIONS):
            rows = ((chosen == index) & applied).nonzero().squeeze(1)
            if len(rows):
                there = rows.to(images.device)
                values = argument(name, level[rows], negative[rows])
                images[there] = _apply(name, images[there], values, fill)
    return images


def argument(name: str, level: Tensor, negative: Tensor) -> Tensor:
    """The argument of an operation at a level in [0, 1]; all of them grow stronger with the level (`inc1`)."""
    signed = torch.where(negative, -level, level)
    if name in LARGEST:
        return signed * LARGEST[name]
    if name == "posterize":
        return (4 - (level * 4).floor()).clamp(min=1)  # no bit left would be black; Pillow refuses it
    if name == "solarize":
        return 256 - (level * 256).floor()
    if name == "solarize_add":
        return (level * 110).floor()
    if name in ("color", "contrast", "brightness", "sharpness"):
        return (1 + signed * 0.9).clamp(min=0.1)
    return level


def _apply(name: str, images: Tensor, values: Tensor, fill: Tensor) -> Tensor:
    if name in WARPS:
        return warp(images, WARPS[name](values, *images.shape[2:]), fill)
    return COLOUR_OPS[name](images, values.to(images.device))
