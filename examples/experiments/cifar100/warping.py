"""Geometric operations on a batch whose images have different arguments: crops with resizing, and affine warps.

An affine map is `[N, 2, 3]`: it takes a point `(x, y)` of the output, in pixels with the origin at the corner of the
image, to the point of the input whose value it gets, as in Pillow's `Image.transform`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = ["WARPS", "random_resized_crop", "resize_crops", "warp"]

ATTEMPTS = 10


def rotate(degrees: Tensor, height: int, width: int) -> Tensor:
    """Counter-clockwise around the middle."""
    angle = -degrees.double() * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return _maps(cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def shear_x(factor: Tensor, height: int, width: int) -> Tensor:
    """Moves each row by `factor` times its distance from the top."""
    return _maps(1, factor, 0, 0, 1, 0)


def shear_y(factor: Tensor, height: int, width: int) -> Tensor:
    """Moves each column by `factor` times its distance from the left."""
    return _maps(1, 0, 0, factor, 1, 0)


def translate_x(share: Tensor, height: int, width: int) -> Tensor:
    """Moves by a share of the width."""
    return _maps(1, 0, share * width, 0, 1, 0)


def translate_y(share: Tensor, height: int, width: int) -> Tensor:
    """Moves by a share of the height."""
    return _maps(1, 0, 0, 0, 1, share * height)


WARPS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "rotate": rotate,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
}


def warp(images: Tensor, maps: Tensor, fill: Tensor) -> Tensor:
    """Warps uint8 images bilinearly; what comes from outside of the image is `fill` `[3]`."""
    height, width = images.shape[2:]
    x, y = _sources(maps.to(images.device), height, width)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    warped = _sample(images, x, y, "bilinear")
    return torch.where(inside.unsqueeze(1), warped, fill.to(warped).view(1, 3, 1, 1))


def random_resized_crop(
    images: Tensor, size: int, scale: tuple[float, float], ratio: tuple[float, float], flip: float, generator: Generator
) -> Tensor:
    """Cuts a random part out of each uint8 image, mirrors some, and resizes to `[N, 3, size, size]`.

    Args:
        images: `[N, 3, H, W]`.
        size: Height and width of the result.
        scale: Range of the part's share of the area.
        ratio: Range of width / height, of which the logarithm is uniform.
        flip: Probability of mirroring.
        generator: On the CPU.
    """
    count, _, height, width = images.shape
    area = height * width * _uniform((count, ATTEMPTS), *scale, generator)
    aspect = _uniform((count, ATTEMPTS), math.log(ratio[0]), math.log(ratio[1]), generator).exp()
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)  # the first that fits; where none does, the whole image
    any_fits = fits.any(1)
    crop_width = torch.where(any_fits, widths.gather(1, first).squeeze(1), width)
    crop_height = torch.where(any_fits, heights.gather(1, first).squeeze(1), height)
    left = (torch.rand(count, generator=generator) * (width - crop_width + 1)).floor()
    top = (torch.rand(count, generator=generator) * (height - crop_height + 1)).floor()
    mirrored = torch.rand(count, generator=generator) < flip
    return resize_crops(images, torch.stack([left, top, crop_width, crop_height], 1), mirrored, size)


def resize_crops(images: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Resizes the boxes `[N, 4]` (left, top, width, height) of uint8 images to `[N, 3, size, size]`, bicubic.

    Raises:
        ValueError: The images are larger than `size`: this reads single points, and so would alias.
    """
    if max(images.shape[2:]) > size:
        raise ValueError(
            f"images of {list(images.shape[2:])} are larger than image_size {size}; they are only enlarged"
        )
    left, top, width, height = boxes.double().unbind(1)
    step = width / size
    maps = _maps(
        torch.where(mirrored, -step, step), 0, torch.where(mirrored, left + width, left), 0, height / size, top
    )
    return _sample(images, *_sources(maps.to(images.device), size, size), "bicubic")


def _sources(maps: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where the centres of the output's pixels come from; without matrix products, which autocast would round."""
    x = torch.arange(width, device=maps.device).view(1, 1, -1) + 0.5
    y = torch.arange(height, device=maps.device).view(1, -1, 1) + 0.5
    rows = maps.float()[..., None, None]
    return (
        rows[:, 0, 0] * x + rows[:, 0, 1] * y + rows[:, 0, 2],
        rows[:, 1, 0] * x + rows[:, 1, 1] * y + rows[:, 1, 2],
    )


def _sample(images: Tensor, x: Tensor, y: Tensor, mode: str) -> Tensor:
    height, width = images.shape[2:]
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], -1)
    values = F.grid_sample(images.float(), grid, mode=mode, padding_mode="border", align_corners=False)
    return values.round().clamp(0, 255).to(torch.uint8)


def _maps(*entries: Tensor | float) -> Tensor:
    tensors = torch.broadcast_tensors(*(torch.as_tensor(entry, dtype=torch.float64) for entry in entries))
    return torch.stack(tensors, -1).view(-1, 2, 3)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)
