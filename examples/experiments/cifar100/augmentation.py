"""What happens to a batch of training images on the device that trains on it.

The recipe is timm's: random resized crop, mirroring, `rand-m9-mstd0.5-inc1`, normalisation, random erasing, mixup or
CutMix, label smoothing. Why not kornia (0.9), which has operations of these names: its RandAugment draws the operations
once for the whole batch, at one fixed magnitude (no `mstd`), without timm's probability of 0.5, and colour factors only
grow (`inc1` draws their direction); its mixup draws lambda uniformly, not from a Beta distribution; its erasing fills
with one value, not with noise; and all of it draws from torch's global generator.

What differs from timm: crops and warps are computed by torch (bicubic with a = -0.75 where Pillow has -0.5, and warps
bilinear where timm would draw or take the crop's), and a crop next to its border reads pixels around it.

Random numbers are a function of the seed, the optimizer step, the number of the batch within that step and the rank
alone: a resumed run draws what the uninterrupted one would have drawn, as long as the number of processes and images a
process is the same. Decisions are drawn on the CPU and so are equal on every device; the noise of erasing is drawn on
the device.
"""

import random
from dataclasses import dataclass

import torch
from erasing import random_erasing
from mixing import mix
from rand_augment import rand_augment
from recipe import AugmentationSettings
from torch import Generator, Tensor
from warping import random_resized_crop

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Turns raw training images into a batch for the model.

    Args:
        settings: Of all operations.
        num_labels: Number of classes, C.
        seed: Of all random numbers.
    """

    settings: AugmentationSettings
    num_labels: int
    seed: int = 0

    @torch.no_grad()
    def __call__(
        self, images: Tensor, labels: Tensor, *, step: int, micro_batch: int = 0, rank: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The batch that a process trains on.

        Args:
            images: uint8, `[N, 3, H, W]`.
            labels: Classes, `[N]`.
            step: Optimizer steps done.
            micro_batch: Batches since then.
            rank: Of the process.

        Returns:
            Normalised float32 images `[N, 3, image_size, image_size]`, and probabilities of the classes `[N, C]`.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Augmentation takes uint8 images [N, 3, H, W], got {images.dtype} {list(images.shape)}")
        options = self.settings
        key = random.Random(f"{self.seed} {step} {micro_batch} {rank}").getrandbits(63)
        generator, noise = Generator().manual_seed(key), Generator(images.device).manual_seed(key + 1)
        mean = torch.tensor(options.mean, device=images.device)
        images = random_resized_crop(
            images, options.image_size, options.crop_scale, options.crop_ratio, options.flip, generator
        )
        images = rand_augment(
            images,
            generator,
            magnitude=options.magnitude,
            magnitude_std=options.magnitude_std,
            operations=options.operations,
            probability=options.operation_probability,
            fill=(255 * mean).round(),
        )
        pixels = (images.float() / 255 - mean.view(3, 1, 1)) / torch.tensor(options.std, device=images.device).view(
            3, 1, 1
        )
        pixels = random_erasing(pixels, generator, noise, probability=options.erasing, area=options.erasing_area)
        return mix(
            pixels,
            labels,
            self.num_labels,
            generator,
            mixup=options.mixup,
            cutmix=options.cutmix,
            switch=options.switch,
            smoothing=options.label_smoothing,
        )
