"""A user's own images: what a classifier says of each, and the table that holds it."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from util.data.folders import FolderSource, image_files
from util.data.images import BadImage
from util.data.listing import Names
from util.data.randomness import Key
from util.data.source import Source
from util.errors import BadInput
from util.measure.accuracy import write_table

LIST = ".txt"


class Prediction(NamedTuple):
    """What is known of one image.

    Attributes:
        number: of the image, its index in the source.
        fault: why it cannot be decoded; empty: it can.
        classes: indices, the most likely first.
        probabilities: of these.
    """

    number: int
    fault: str
    classes: list[int]
    probabilities: list[float]


def find_images(path: Path, flag: str) -> tuple[Path, list[str]]:
    """The folder that names are relative to, and the names of the images, in a stable order.

    Args:
        path: a folder, whose sub-folders are searched; an image; or a text file of names, one a
            line and relative to the folder of the text, which are taken as they are.
        flag: that named the path, for the message.

    Raises:
        BadInput: nothing there, or no images.
    """
    if path.suffix.lower() != LIST or not path.is_file():
        files = image_files(path, flag)
        root = path if path.is_dir() else path.parent
        return root, [os.fspath(file.relative_to(root)) for file in files]
    try:
        # utf-8-sig: Windows begins a text with a mark.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise BadInput(f"cannot read {flag} {path}: {error.strerror}") from error
    # Not splitlines, which also ends a line at characters that a name may have.
    names = [name for line in text.split("\n") if (name := line.strip(" \t\r"))]
    if not names:
        raise BadInput(f"{flag} {path} names no images; expected one a line")
    return path.parent, names


def file_source(root: Path, names: Sequence[str]) -> Source:
    """Images of files, without labels."""
    labels = np.full(len(names), -1, dtype=np.int32)
    return FolderSource("images", "val", root, Names.of(names), labels, [])


class FileSamples(Dataset):
    """Images without labels; of one that cannot be decoded the reason, and no other in its place.

    Args:
        source: images by index.
        transform: image to uint8 [C, h, w].
        shape: (C, h, w).

    A sample is a dict:
        image: uint8 [C, h, w]; black where it cannot be decoded.
        index: int, the key's.
        fault: str, why it cannot be decoded; empty: it can.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Any], Tensor],
        shape: tuple[int, int, int],
    ) -> None:
        self.source, self.transform, self.shape = source, transform, shape

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        try:
            image, fault = self.transform(self.source[key.index][0]), ""
        except BadImage as error:
            image, fault = torch.zeros(self.shape, dtype=torch.uint8), error.reason or "unreadable"
        return {"x": image, "index": key.index, "fault": fault}


def write_predictions(
    path: Path, names: Sequence[str], found: Sequence[Prediction], classes: Sequence[str], top: int
) -> None:
    """Write a CSV file, a row for each image in the order of `names`, whole or not at all.

    The columns are file, class, probability, class_2, probability_2 ... and error; of an image that
    cannot be decoded all but the first and the last are empty.

    Args:
        classes: names, by index. top: how many classes a row holds.
    """
    head = ["file", "class", "probability"]
    head += [f"{what}_{i}" for i in range(2, top + 1) for what in ("class", "probability")]
    rows: list[list[str]] = [[*head, "error"]]
    for one in found:
        cells = [
            cell
            for label, share in zip(one.classes, one.probabilities, strict=True)
            for cell in (classes[label], f"{share:.6g}")
        ]
        rows.append([names[one.number], *(cells or [""] * 2 * top), one.fault])
    write_table(path, rows)


def names_of_classes(said: Sequence[str] | None, outputs: int) -> list[str]:
    """A name for each output of a head: those that a checkpoint says, for all others the index."""
    known = list(said or [])[:outputs]
    return known + [str(index) for index in range(len(known), outputs)]
