"""Images as a model takes them."""

import random
from typing import Any

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from kron_hf.data.splits import LabelledImages

__all__ = ["Examples", "check_channels"]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def check_channels(channels: int) -> None:
    """Refuses a number of channels that images cannot be converted to.

    Raises:
        ValueError: It is not 1, 3 or 4.
    """
    if channels not in MODES:
        raise ValueError(f"the model takes images of {channels} channels; they can be made with {sorted(MODES)}")


class Examples(Dataset[dict[str, Any]]):
    """Rows of `pixel_values` `[channels, height, width]` and `labels`, computed when they are read.

    What is random is a function of the seed, the epoch and the index alone: a resumed training reads what the
    uninterrupted one would have read, on any number of workers and processes.

    Args:
        images: The images.
        processor: transformers image processor.
        channels: Channels of the model; grey images become colour images and the reverse.
        flip: Whether to mirror half of the images, others in each epoch.
        seed: Of the choice which.
    """

    def __init__(
        self, images: LabelledImages, processor: Any, channels: int, *, flip: bool = False, seed: int = 0
    ) -> None:
        check_channels(channels)
        self.images, self.processor, self.channels = images, processor, channels
        self.flip, self.seed = flip, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        """Names the pass over the data that begins, for workers that run already, too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A batch at once: the processor's cost is mostly per call."""
        mode, pictures = MODES[self.channels], list[Image.Image]()
        labels: list[int] = []
        for index in indices:
            picture, label = self.images[index]
            picture = picture if picture.mode == mode else picture.convert(mode)
            pictures.append(ImageOps.mirror(picture) if self._is_flipped(index) else picture)
            labels.append(label)
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]

    def _is_flipped(self, index: int) -> bool:
        return self.flip and random.Random(f"{self.seed} {int(self._epoch)} {index}").random() < 0.5
