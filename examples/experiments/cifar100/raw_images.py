"""CIFAR-100 as the training reads it: raw pixels to train, model-ready ones to evaluate."""

from typing import Any

import numpy as np
import torch
from recipe import AugmentationSettings
from torch import Tensor
from torch.utils.data import Dataset
from transformers.utils.import_utils import is_torchvision_available

from kron_hf.data.splits import LabelledImages

__all__ = ["RawImages", "image_processor"]


class RawImages(Dataset[dict[str, Any]]):
    """Rows of `pixel_values`, uint8 `[3, H, W]`, and `labels`; whatever else happens to them, the device does."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        picture, label = self.images[index]
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
        return {"pixel_values": pixels, "labels": label}


def image_processor(settings: AugmentationSettings) -> Any:
    """The whole image, resized and normalised: what evaluation and the saved model use."""
    if is_torchvision_available():
        from transformers import ViTImageProcessor as Processor
    else:
        from transformers import ViTImageProcessorPil as Processor
    size = {"height": settings.image_size, "width": settings.image_size}
    return Processor(size=size, resample=3, image_mean=list(settings.mean), image_std=list(settings.std))
