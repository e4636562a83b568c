"""Labelled images in splits: one shape for whatever source they come from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kron_hf.escaping import one_line

__all__ = ["ArrayImages", "ImageSplits", "LabelledImages", "StoredImages", "hold_out"]

SPLIT_SEED = 0  # as in the grey sets: splits are part of the data, so no run may draw others


class ImageSource(Protocol):
    """Images by index, decoded when they are read."""

    def __getitem__(self, index: int, /) -> Image.Image: ...


@dataclass(frozen=True)
class ArrayImages:
    """Grey images in memory, `[N, height, width]`."""

    pixels: NDArray[np.uint8]

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


@dataclass(frozen=True)
class StoredImages:
    """The image column of a `datasets.Dataset`, cast to `Image(decode=False)`."""

    rows: Any
    column: str

    def __getitem__(self, index: int) -> Image.Image:
        stored = self.rows[index][self.column]
        if stored is None:
            raise ValueError(f"image {index} in column {self.column!r} is missing (null)")
        name = repr(stored["path"]) if stored["path"] else f"number {index} in column {self.column!r}"
        try:
            with Image.open(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"])) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {name} cannot be read: {one_line(str(error))}") from error


@dataclass(frozen=True)
class LabelledImages:
    """Some of the images of a source, in a fixed order, with the index of their class."""

    source: ImageSource
    labels: list[int]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Image.Image, int]:
        index = self.indices[position]
        return self.source[index], self.labels[index]

    def keep(self, positions: Sequence[int]) -> "LabelledImages":
        """The images at these positions."""
        return LabelledImages(self.source, self.labels, [self.indices[position] for position in positions])


@dataclass(frozen=True, kw_only=True)
class ImageSplits:
    """What a training needs: the classes, and images to train, to choose by and, if there are any, to test.

    Attributes:
        name: What the data set is called; never a path.
        label_names: Name of each class.
        train: Training images.
        validation: For every choice.
        test: For the final figures only.
        notes: What was decided about the splits, for the user.
    """

    name: str
    label_names: list[str]
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages | None
    notes: list[str] = field(default_factory=list)


def hold_out(images: LabelledImages, fraction: float) -> tuple[LabelledImages, LabelledImages]:
    """Cuts a share of each class off for validation, at least one image of it; always the same ones.

    Raises:
        ValueError: `fraction` is outside (0, 1), or a class has a single image, which cannot be in both.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the validation fraction must be between 0 and 1, got {fraction!r}")
    labels = np.asarray([images.labels[index] for index in images.indices])
    generator = np.random.RandomState(SPLIT_SEED)
    held: list[int] = []
    for label in np.unique(labels):
        positions = generator.permutation(np.flatnonzero(labels == label))
        if len(positions) < 2:
            raise ValueError(
                f"class {label} has one training image, so none can be held out for validation; name a validation split"
            )
        held += positions[: min(len(positions) - 1, max(1, round(fraction * len(positions))))].tolist()
    chosen = set(held)
    rest = [position for position in range(len(images)) if position not in chosen]
    return images.keep(rest), images.keep(sorted(held))
