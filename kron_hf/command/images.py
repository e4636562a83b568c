"""The images that a command names."""

from kron_hf.command.options import DataOptions
from kron_hf.data.sources import load_splits
from kron_hf.data.splits import ImageSplits

__all__ = ["load_images"]


def load_images(options: DataOptions, token: str | None) -> ImageSplits:
    """Loads them.

    Raises:
        OSError: The data cannot be found or read.
        ValueError: No images, no or one class, a column or split that is not there.
    """
    return load_splits(
        options.dataset,
        config_name=options.dataset_config,
        revision=options.dataset_revision,
        token=token,
        image_column=options.image_column,
        label_column=options.label_column,
        train_split=options.train_split,
        validation_split=options.validation_split,
        test_split=options.test_split,
        validation_fraction=options.validation_fraction,
    )
