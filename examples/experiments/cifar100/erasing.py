"""Random erasing (Zhong et al. 2017, arXiv 1708.04896): a rectangle of some images becomes noise."""

import math

import torch
from torch import Generator, Tensor

__all__ = ["random_boxes", "random_erasing"]

ATTEMPTS = 10


def random_erasing(
    images: Tensor, generator: Generator, noise_generator: Generator, *, probability: float, area: tuple[float, float]
) -> Tensor:
    """Replaces a rectangle by noise of mean 0 and variance 1 in each image with that probability (timm's "pixel").

    Args:
        images: Normalised images, `[N, 3, H, W]`.
        generator: Of the rectangles; on the CPU.
        noise_generator: Of the noise; on the device of the images.
        probability: Of an image to lose a rectangle.
        area: Range of the rectangle's share of the area.
    """
    height, width = images.shape[2:]
    boxes = random_boxes(len(images), height, width, area, generator)
    boxes[torch.rand(len(images), generator=generator) >= probability] = 0
    left, top, box_width, box_height = boxes.to(images.device).view(-1, 4, 1, 1).unbind(1)
    x, y = torch.arange(width, device=images.device), torch.arange(height, device=images.device).unsqueeze(1)
    inside = (x >= left) & (x < left + box_width) & (y >= top) & (y < top + box_height)  # [N, H, W]
    noise = torch.randn(images.shape, generator=noise_generator, device=images.device, dtype=images.dtype)
    return torch.where(inside.unsqueeze(1), noise, images)


def random_boxes(count: int, height: int, width: int, area: tuple[float, float], generator: Generator) -> Tensor:
    """Rectangles `[N, 4]` (left, top, width, height), the logarithm of height / width uniform between 0.3 and 1 / 0.3.

    A rectangle that fits is drawn in at most ten attempts; where none did it is empty.
    """
    areas = height * width * (area[0] + (area[1] - area[0]) * torch.rand(count, ATTEMPTS, generator=generator))
    aspects = (math.log(0.3) * (1 - 2 * torch.rand(count, ATTEMPTS, generator=generator))).exp()
    heights, widths = (areas * aspects).sqrt().round().long(), (areas / aspects).sqrt().round().long()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(1, keepdim=True)
    box_height, box_width = (sizes.gather(1, first).squeeze(1) * fits.any(1) for sizes in (heights, widths))
    left = (torch.rand(count, generator=generator) * (width - box_width + 1)).long()
    top = (torch.rand(count, generator=generator) * (height - box_height + 1)).long()
    return torch.stack([left, top, box_width, box_height], 1)
