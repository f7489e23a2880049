"""Data sets of Hugging Face: `--data_path hf:NAME_OR_DIR[?key=value&...]`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image
from torch import Tensor

from util.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PathLike,
    decode_image,
    raising_bad_image,
    read_image,
)
from util.data.jpeg import decode_pixels, read_pixels
from util.data.pixel_limits import open_at_once
from util.data.source import Source
from util.errors import BadInput, needs

OPTIONS = ("image", "label", "config", "train", "val")
SYNTAX = (
    "hf:NAME_OR_DIR, for example hf:cifar10 or hf:my/folder?image=picture&label=kind; the keys are "
    + ", ".join(OPTIONS)
)
SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}
LABEL_NAMES = ("label", "labels", "target", "class")
SAVED = ("dataset_dict.json", "state.json")  # by save_to_disk


class HubSource(Source):
    """One split of a Hugging Face data set, read image by image; statistics are ImageNet's.

    Args:
        name: as given, for messages.
        data: the split, a `datasets.Dataset` of one column, images that it does not decode.
        labels: int32 [N].
        classes: names of the labels.
    """

    eval_margin = True

    def __init__(
        self, name: str, split: str, data: Any, labels: np.ndarray, classes: list[str]
    ) -> None:
        super().__init__(f"hf:{name}", split, IMAGENET_MEAN, IMAGENET_STD, classes)
        self.data, self.labels = data, labels
        (self.column,) = data.column_names
        self.labelled = bool(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        content = self.data[index][self.column]
        label, pil = int(self.labels[index]), self.decoder == "pil"
        if content["bytes"] is None:
            read = read_image if pil else read_pixels
            return read(content["path"], self.channels, max_pixels=self.max_pixels), label
        name, most = self.file_name(index), self.max_pixels
        if pil:
            return decode_image(content["bytes"], name, self.channels, most), label
        return decode_pixels(bytearray(content["bytes"]), name, self.channels, most), label

    def encoded(self, index: int) -> tuple[bytes, int]:
        content = self.data[index][self.column]
        data, path = content["bytes"], content["path"]
        if data is None:
            with raising_bad_image(path), open_at_once(path, self.max_pixels) as file:
                data = file.read()
        return data, int(self.labels[index])


def hugging_face(split: str, place: PathLike) -> Source:
    """One split of a data set on the hub, or of a folder (of images, of parquet, or saved to disk).

    Args:
        place: NAME_OR_DIR, then optionally ? and key=value pairs: `image` and `label` name columns,
            `config` the hub's configuration, `train` and `val` the splits to take as such.

    Raises:
        BadInput: it cannot be loaded, or has no such split or column.
    """
    name, data, options = open_split(split, str(place), OPTIONS, SYNTAX)
    datasets = needs("datasets", "datasets")
    image = image_column(data, options.get("image"), name)
    labels, classes = read_labels(data, options.get("label"), name)
    data = data.select_columns([image]).with_format(None)
    data = data.cast_column(image, datasets.Image(decode=False))
    return HubSource(name, split, data, labels, classes)


def open_split(
    split: str, place: str, keys: Sequence[str], syntax: str
) -> tuple[str, Any, dict[str, str]]:
    """What `NAME_OR_DIR?key=value&...` stands for: the name, the split's rows, and the options.

    Raises:
        BadInput: a key that is not among `keys`, or no such split.
    """
    name, _, query = place.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not name or set(options) - set(keys) or (query and not options):
        raise BadInput(f"--data_path hf:{place} is not {syntax}")
    splits = load(name, options.get("config"))
    wanted = (options[split],) if split in options else SPLITS[split]
    found = next((s for s in wanted if s in splits), None)
    if found is None:
        raise BadInput(
            f"hf:{name} has no split {' or '.join(wanted)} to take as {split}, but "
            f"{', '.join(splits)}; name one: hf:{name}?{split}=NAME"
        )
    return name, splits[found], options


def load(name: str, config: str | None) -> dict[str, Any]:
    """All splits of a data set, by name."""
    datasets = needs("datasets", "datasets")
    folder = Path(name).expanduser()
    saved = any((folder / file).is_file() for file in SAVED)
    try:
        if saved:
            data = datasets.load_from_disk(str(folder))
        else:
            data = datasets.load_dataset(str(folder) if folder.is_dir() else name, config)
    # Whatever its loaders and the network raise; there are dozens.
    except Exception as error:
        raise BadInput(
            f"Hugging Face datasets cannot load {name}: {' '.join(str(error).split())}; expected a "
            "data set's name on the hub, a folder of one, or what save_to_disk wrote"
        ) from error
    return dict(data) if isinstance(data, dict) else {"train": data}


def image_column(data: Any, wanted: str | None, name: str) -> str:
    """The column of images: the one that is asked for, or the only one of that type."""
    images = [
        column for column, feature in data.features.items() if type(feature).__name__ == "Image"
    ]
    if wanted is None and len(images) == 1:
        return images[0]
    if wanted is not None and wanted in images:
        return wanted
    raise BadInput(
        f"hf:{name} has the columns of images {', '.join(images) or '(none)'}"
        + (f", not {wanted}" if wanted else "")
        + f"; name one: hf:{name}?image=COLUMN"
    )


def read_labels(data: Any, wanted: str | None, name: str) -> tuple[np.ndarray, list[str]]:
    """Labels int32 [N] and their names; -1 and no names where there are none.

    Taken from the column that is asked for, or the only one of classes, or one of whole numbers
    that is called as labels are.
    """
    features = data.features
    classes = [column for column, f in features.items() if type(f).__name__ == "ClassLabel"]
    if wanted is None and len(classes) > 1:
        raise BadInput(
            f"hf:{name} has several columns of classes ({', '.join(classes)}); name one: "
            f"hf:{name}?label=COLUMN"
        )
    if wanted is not None and wanted not in features:
        raise BadInput(f"hf:{name} has no column {wanted}, but {', '.join(features)}")
    numbers = [c for c in LABEL_NAMES if "int" in str(getattr(features.get(c), "dtype", ""))]
    column = wanted or next(iter([*classes, *numbers]), None)
    if column is None:
        return np.full(len(data), -1, np.int32), []
    values = np.asarray(data.with_format("arrow")[:][column])
    if not np.issubdtype(values.dtype, np.integer):
        raise BadInput(
            f"the labels of hf:{name}, column {column}, are {values.dtype} and not whole numbers; "
            "in Python, class_encode_column makes them so"
        )
    values = values.astype(np.int32)
    names = getattr(features[column], "names", None)
    if values.min(initial=0) < 0:  # a test set whose labels are kept secret
        return np.full(len(values), -1, np.int32), []
    return values, names or [str(label) for label in range(int(values.max(initial=0)) + 1)]
