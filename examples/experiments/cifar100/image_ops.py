"""The colour operations of RandAugment as Pillow computes them, for a batch whose images have different arguments.

Images are uint8 `[N, 3, H, W]`, an argument is `[N]`. Rounding is Pillow's, since timm, whose recipes these are, works
on Pillow images.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["COLOUR_OPS"]

SMOOTH = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13  # PIL.ImageFilter.SMOOTH


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretches each channel to 0..255; one of a single value stays."""
    flat = images.flatten(2)
    low, high = (bound.double().unsqueeze(2) for bound in flat.aminmax(dim=2))  # [N, 3, 1]
    scale = 255 / (high - low).clamp(min=1)
    values = torch.arange(256, device=images.device)
    table = (values * scale - low * scale).clamp(0, 255)
    return _look_up(images, torch.where(high > low, table, values))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Evens out the histogram of each channel."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    last = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - last) // 255  # [N, 3, 1]
    before = counts.cumsum(2) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where(step > 0, table, torch.arange(256, device=images.device)))


def invert(images: Tensor, _: Tensor) -> Tensor:
    """The negative."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest bits of each value."""
    return images & _spread(256 - 2 ** (8 - bits.long())).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts the values from the threshold on."""
    return torch.where(images < _spread(threshold), images, 255 - images)


def solarize_add(images: Tensor, addend: Tensor) -> Tensor:
    """Adds to the values below 128."""
    return torch.where(images < 128, (images + _spread(addend)).clamp(max=255).to(torch.uint8), images)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Saturation: 0 is grey, 1 changes nothing."""
    return _blend(_luminance(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """0 is the mean grey of the image, 1 changes nothing."""
    return _blend((_luminance(images).float().mean((1, 2, 3), keepdim=True) + 0.5).floor(), images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """0 is black, 1 changes nothing."""
    return _blend(torch.zeros_like(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """0 is smoothed, 1 changes nothing."""
    kernel = SMOOTH.to(images.device).expand(3, 1, 3, 3)
    smooth = images.float()
    smooth[..., 1:-1, 1:-1] = (F.conv2d(smooth, kernel, groups=3) + 0.5).floor()  # Pillow leaves the border
    return _blend(smooth, images, factor)


def _luminance(images: Tensor) -> Tensor:
    """The grey value of each pixel, `[N, 1, H, W]` (ITU-R 601-2, in Pillow's integers)."""
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    start = degenerate.float()
    return (start + _spread(factor.float()) * (images.float() - start)).clamp(0, 255).to(torch.uint8)


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """`table[n, c, value]` for each pixel."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def _spread(argument: Tensor) -> Tensor:
    return argument.view(-1, 1, 1, 1)


COLOUR_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "invert": invert,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
}
