"""Pairs of image and label map of Hugging Face: `--data_path hf:NAME_OR_DIR[?key=value&...]`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from util.data.hub import open_split
from util.data.images import IMAGENET_MEAN, IMAGENET_STD, decode_image, read_image
from util.data.label_maps import MOST_CLASSES, read_label_map
from util.data.label_values import (
    Maps,
    check_meanings,
    check_two_classes,
    checked,
    count_classes,
    numbered,
    parse_label_map,
)
from util.data.source import Source
from util.errors import BadInput, needs

OPTIONS = ("image", "mask", "first", "config", "train", "val")
SYNTAX = (
    "hf:NAME_OR_DIR, for example hf:my/folder?image=picture&mask=labels&first=1; the keys are "
    + ", ".join(OPTIONS)
)
MASK_NAMES = ("annotation", "mask", "label", "segmentation", "labels")


class HubPairs(Source):
    """One split of a Hugging Face data set, read pair by pair; statistics are ImageNet's.

    Args:
        name: as given, for messages.
        images, masks: the split, two `datasets.Dataset` of one column each, files that they do not
            decode.
        classes: names of the classes.
        first: the value in a mask that stands for class 0, see `check_label`.
        meanings: classes by stored value, see `parse_label_map`; None: values are classes.
    """

    target = "mask"

    def __init__(
        self,
        name: str,
        split: str,
        images: Any,
        masks: Any,
        classes: Sequence[str],
        first: int,
        meanings: dict[int, int] | None,
    ) -> None:
        super().__init__(f"hf:{name}", split, IMAGENET_MEAN, IMAGENET_STD, classes)
        self.images, self.masks, self.first, self.meanings = images, masks, first, meanings

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        (image,), most = self.images[index].values(), self.max_pixels
        if image["bytes"] is None:
            picture = read_image(image["path"], 3, paired=True, max_pixels=most)
        else:
            picture = decode_image(image["bytes"], self.file_name(index), 3, most)
        values = self.mask(index)
        names = self.file_name(index), self.mask_name(index)
        return picture, checked(
            values, picture, names, len(self.classes), self.first, self.meanings
        )

    def mask(self, index: int) -> np.ndarray:
        """The values of a label map as they are stored: [H, W]."""
        (mask,) = self.masks[index].values()
        path = mask["path"] if mask["bytes"] is None else self.mask_name(index)
        return read_label_map(path, self.max_pixels, mask["bytes"])

    def mask_name(self, index: int) -> str:
        """For messages."""
        return f"{self.file_name(index)}, mask"

    def maps(self) -> Maps:
        """All label maps."""
        for index in range(len(self)):
            yield self.mask_name(index), partial(self.mask, index)


def hugging_face_pairs(
    split: str,
    place: str,
    num_classes: int | None,
    label_map: Sequence[str] | None = None,
    max_pixels: int | None = None,
) -> Source:
    """One split of a data set on the hub, or of a folder, whose rows are an image and its mask.

    Without a number of classes and `label_map`, all masks of the training split are read to count
    them.

    Args:
        place: NAME_OR_DIR, then optionally ? and key=value pairs: `image` and `mask` name columns,
            `first` the value of class 0 (ADE20K: 1), `config` the hub's configuration, `train` and
            `val` the splits to take as such.
        num_classes, label_map, max_pixels: see `build_segmentation_set`.

    Raises:
        BadInput: it cannot be loaded, or has no such split or column.
    """
    meanings = parse_label_map(label_map)
    source = _open(split, place, [], meanings, max_pixels)
    notes: list[str] = []
    if num_classes is None and meanings is None:
        train = source if split == "train" else _open("train", place, [], meanings, max_pixels)
        counted, notes = count_classes(train.maps())
        num_classes = counted - source.first
    source.classes = numbered(num_classes, meanings)
    if not 0 < len(source.classes) <= MOST_CLASSES:
        raise BadInput(f"hf:{place}: {len(source.classes)} classes; expected 1 to {MOST_CLASSES}")
    check_meanings(meanings, len(source.classes))
    if not source.first:
        maps, count = source.maps(), len(source.classes)
        notes += check_two_classes(maps, count, meanings, split, source.name)
    source.notes = notes
    return source


def _open(
    split: str,
    place: str,
    classes: Sequence[str],
    meanings: dict[int, int] | None,
    max_pixels: int | None,
) -> HubPairs:
    name, data, options = open_split(split, place, OPTIONS, SYNTAX)
    datasets = needs("datasets", "datasets")
    there = [c for c, feature in data.features.items() if type(feature).__name__ == "Image"]
    mask = options.get("mask") or next((c for c in MASK_NAMES if c in there), None)
    others = [column for column in there if column != mask]
    image = options.get("image") or ("image" if "image" in others else next(iter(others), None))
    if mask not in there or image not in others:
        raise BadInput(
            f"hf:{name} has the columns of images {', '.join(there) or '(none)'}; expected an "
            f"image and its mask; name them: hf:{name}?image=COLUMN&mask=COLUMN"
        )
    first = options.get("first", "0")
    if not first.isdecimal() or int(first) >= MOST_CLASSES:
        raise BadInput(f"hf:{place}: first={first} is not a value of a mask")
    files = datasets.Image(decode=False)
    images, masks = (
        data.select_columns([column]).with_format(None).cast_column(column, files)
        for column in (image, mask)
    )
    source = HubPairs(name, split, images, masks, classes, int(first), meanings)
    source.max_pixels = max_pixels
    return source
