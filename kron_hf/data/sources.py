"""Loads labelled images from the Hub, a folder of images or of IDX files, or by the names the demo knows."""

from pathlib import Path
from typing import Any

from kron_hf.data.grey import load_grey_set
from kron_hf.data.idx import holds_idx_files
from kron_hf.data.splits import ArrayImages, ImageSplits, LabelledImages, StoredImages, hold_out
from kron_hf.escaping import one_line

__all__ = ["load_any_images", "load_splits"]

GREY_SETS = ("digits", "fashion_mnist")
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


def load_splits(
    source: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str = "test",
    validation_fraction: float = 0.1,
) -> ImageSplits:
    """Loads a data set for image classification.

    Args:
        source: `"digits"`, `"fashion_mnist"`, a folder with the IDX files of MNIST, a folder of images (`train/CLASS/`,
            `validation/CLASS/`, `test/CLASS/`, or `CLASS/` alone), a folder saved by `datasets`, or an id on the Hub.
        config_name: Configuration of a data set on the Hub.
        revision: Revision of a data set on the Hub.
        token: Token for the Hub.
        image_column: Name of the column of images; None finds it.
        label_column: Name of the column of labels; None finds it.
        train_split: Name of the split to train on.
        validation_split: Name of the split to choose by. None: `validation` or a usual variant of that name; where
            there is none, a part of the training split is held out, never of the test split.
        test_split: Name of the split for the final figures; it may be missing or without labels.
        validation_fraction: Share of the training images to hold out.

    Raises:
        OSError: The data cannot be found or read.
        ValueError: No images, no or one class, a column or split that is not there.
    """
    folder = Path(source)
    if source in GREY_SETS or (folder.is_dir() and holds_idx_files(folder)):
        return _checked(_from_grey(source), source)
    loaded = _load(source, config_name, revision, token)
    rows = loaded.get(train_split)
    if rows is None:
        raise ValueError(f"{source} has no split {train_split!r}; its splits are {sorted(loaded)}; pass --train-split")
    if validation_split is not None and validation_split not in loaded:
        raise ValueError(f"{source} has no split {validation_split!r}; its splits are {sorted(loaded)}")
    image_column = _image_column(rows, source, image_column)
    label_column = _label_column(rows, source, label_column)
    names = _label_names(rows, label_column)

    def labelled(split: str) -> LabelledImages:
        return _labelled(loaded[split], f"{source}, split {split!r}", image_column, label_column, names)

    train, notes = labelled(train_split), []
    validation_split = validation_split or next((name for name in VALIDATION_NAMES if name in loaded), None)
    if validation_split is None:
        train, validation = hold_out(train, validation_fraction)
        notes.append(f"no validation split: {len(validation)} of the training images are held out for it")
    else:
        validation = labelled(validation_split)
    test = labelled(test_split) if test_split in loaded else None
    if test is None or len(test) == 0:
        notes.append(f"no labelled test split {test_split!r}: the final figures are those of the validation images")
    splits = ImageSplits(
        name=folder.resolve().name if folder.is_dir() else source,
        label_names=[str(name) for name in names],
        train=train,
        validation=validation,
        test=test or None,
        notes=notes,
    )
    return _checked(splits, source)


def load_any_images(source: str, *, token: str | None = None, option: str = "--dataset") -> tuple[str, LabelledImages]:
    """The images of a data set that needs no labels, and what it is called: its test split, if it has one.

    Args:
        source: As for `load_splits`.
        token: Token for the Hub.
        option: Of the command line, for errors.

    Raises:
        OSError: The data cannot be found or read.
        ValueError: There are no images.
    """
    folder = Path(source)
    if source in GREY_SETS or (folder.is_dir() and holds_idx_files(folder)):
        splits = _from_grey(source)
        return splits.name, splits.test or splits.validation
    loaded = _load(source, None, None, token, option)
    rows = loaded[next((name for name in ("test", *VALIDATION_NAMES) if name in loaded), next(iter(loaded)))]
    images = _stored(rows, _image_column(rows, source, None))
    if not len(rows):
        raise ValueError(f"{source} holds no images")
    name = folder.resolve().name if folder.is_dir() else source
    return name, LabelledImages(images, [0] * len(rows), range(len(rows)))


def _stored(rows: Any, column: str) -> StoredImages:
    import datasets

    return StoredImages(rows.cast_column(column, datasets.Image(decode=False)), column)


def _checked(splits: ImageSplits, source: str) -> ImageSplits:
    for kind, images in (("training", splits.train), ("validation", splits.validation)):
        if len(images) == 0:
            raise ValueError(f"{source} holds no {kind} images")
    present = sorted({splits.train.labels[index] for index in splits.train.indices})
    if len(present) < 2:
        found = [splits.label_names[label] for label in present]
        raise ValueError(
            f"{source}: a classifier needs images of two classes or more, the training images have {found}"
        )
    return splits


def _from_grey(source: str) -> ImageSplits:
    grey = load_grey_set(source)
    train, validation, test = (
        LabelledImages(ArrayImages(images), labels.tolist(), range(len(labels)))
        for images, labels in (grey.train, grey.validation, grey.test)
    )
    return ImageSplits(
        name=grey.name, label_names=grey.label_names, train=train, validation=validation, test=test or None
    )


def _load(
    source: str, config_name: str | None, revision: str | None, token: str | None, option: str = "--dataset"
) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    folder = Path(source)
    if folder.is_file():
        raise NotADirectoryError(f"{option} {source} is a file; name the folder that holds it")
    # A local path must not become a question to the Hub.
    if (source.startswith((".", "/", "~")) or source.count("/") > 1) and not folder.is_dir():
        raise FileNotFoundError(f"{option} {source}: there is no such folder")
    try:
        if folder.is_dir() and (folder / "dataset_dict.json").is_file():
            return _by_name(datasets.load_from_disk(str(folder)))
        loaded = datasets.load_dataset(source, config_name, revision=revision, token=token)
    except DatasetGenerationError as error:
        raise ValueError(f"{option} {source} cannot be read: {one_line(str(error.__cause__ or error))}") from error
    except (OSError, DatasetsError, ValueError) as error:
        where = (
            "holds no images that can be read" if folder.is_dir() else "is no folder here, nor could the Hub give it"
        )
        reason = one_line(str(error))
        raise OSError(f"{option} {source} {where}: {reason}") from error
    return _by_name(loaded)


def _by_name(loaded: Any) -> dict[str, Any]:
    return {str(name): rows for name, rows in loaded.items()}


def _image_column(rows: Any, source: str, given: str | None) -> str:
    import datasets

    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if given is not None:
        if given not in columns:
            raise ValueError(f"{source}: --image-column {given!r} is no column of images; those are {columns}")
        return given
    if not columns:
        raise ValueError(f"{source} has no column of images; its columns are {rows.column_names}")
    found = next((name for name in IMAGE_COLUMNS if name in columns), columns[0])
    if len(columns) > 1 and found not in IMAGE_COLUMNS:
        raise ValueError(f"{source} has several columns of images, {columns}; pass --image-column")
    return found


def _label_column(rows: Any, source: str, given: str | None) -> str:
    import datasets

    if given is not None:
        if given not in rows.column_names:
            raise ValueError(f"{source} has no --label-column {given!r}; its columns are {rows.column_names}")
        return given
    classes = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    found = next((name for name in LABEL_COLUMNS if name in rows.column_names), classes[0] if classes else None)
    if found is None:
        raise ValueError(
            f"{source} has no column of labels (its columns are {rows.column_names}): in a folder of images each class "
            "has a subfolder of its own; else pass --label-column"
        )
    return found


def _label_names(rows: Any, column: str) -> list[Any]:
    """The classes in order: those that the data set names, else the sorted values of the training labels."""
    names = getattr(rows.features[column], "names", None)
    return list(names) if names is not None else sorted(set(rows[column]) - {None, -1})


def _labelled(rows: Any, where: str, image_column: str, label_column: str, names: list[Any]) -> LabelledImages:
    for column in (image_column, label_column):
        if column not in rows.column_names:
            raise ValueError(f"{where} has no column {column!r}; its columns are {rows.column_names}")
    images = _stored(rows, image_column)
    values = list(rows[label_column])
    if getattr(rows.features[label_column], "names", None) is None:
        index = {name: label for label, name in enumerate(names)}
        if unknown := sorted({repr(value) for value in values if value not in index and value not in (None, -1)}):
            raise ValueError(f"{where} has labels that the training split lacks: {unknown[:10]}")
        values = [index.get(value, -1) for value in values]
    elif rows.features[label_column].names != names:
        raise ValueError(f"{where} names other classes than the training split does")
    labels = [-1 if value is None else int(value) for value in values]
    # The Hub's test splits often have no labels: -1, or null.
    return LabelledImages(images, labels, [position for position, label in enumerate(labels) if label >= 0])
