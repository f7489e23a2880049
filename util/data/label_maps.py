"""Label maps: one class index per pixel, read, checked, coloured and written."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.images import PathLike, read_stored
from util.errors import BadInput
from util.files import save_png

IGNORE = 255
MOST_CLASSES = 255
# Formats that keep values as they are; a JPEG would blur the borders into other classes.
MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".gif")
LOSSY = ("JPEG", "MPO", "JPEG2000")
OVERLAY_SHARE = 0.5


class BadPair(BadInput):
    """An image and a label map that cannot be learnt from; the message names the file."""


def read_label_map(
    path: PathLike, max_pixels: int | None = None, data: bytes | None = None
) -> np.ndarray:
    """A label map from a gray or palette picture, of which the indices count and not the colours.

    Args:
        max_pixels: see `util.data.images.read_image`.
        data: the file's contents, which are then not read.

    Returns:
        [H, W] of uint8, or of a wider integer where the file has more than 8 bits.

    Raises:
        BadImage: missing or damaged.
        BadPair: not one channel of whole numbers, or stored with loss.
    """
    image = read_stored(path, max_pixels, data)
    if image.format in LOSSY or image.info.get("compression") == "jpeg":
        raise BadPair(
            f"the mask {os.fspath(path)} is a {image.format} with lossy compression, whatever its "
            "name ends in: its values are blurred; expected PNG, made from the original labels"
        )
    if image.mode not in ("L", "P", "1", "I", "I;16"):
        raise BadPair(
            f"the mask {os.fspath(path)} is a picture of mode {image.mode}; expected one channel "
            "of class indices (gray or palette): convert colours to indices first"
        )
    values = np.array(image)
    return values.astype(np.uint8) if values.dtype == bool else values


def check_label(values: np.ndarray, num_classes: int, path: str, *, first: int = 0) -> np.ndarray:
    """Values of a file to classes counted from 0: uint8 [H, W], `IGNORE` where nothing counts.

    Args:
        values: [H, W], of `read_label_map`.
        first: the value that stands for class 0; what is below it is ignored (ADE20K: 1).

    Raises:
        BadPair: a value that is no class; with the file, the value and where it stands.
    """
    wrong = (values != IGNORE) & ((values < 0) | (values >= num_classes + first))
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        below = f"0 to {first - 1} and " if first else ""
        raise BadPair(
            f"the mask {path} holds the value {int(values[row, column])} (row {row}, column "
            f"{column}); expected classes {first} to {num_classes - 1 + first}, with {below}"
            f"{IGNORE} ignored; mend the mask, give the count of classes with --nb_classes, or say "
            "what its values stand for, for example --label_map 0:0 255:1"
        )
    label = values.astype(np.uint8)
    if first:
        ignored = (label < first) | (label == IGNORE)
        label = np.where(ignored, IGNORE, label - np.uint8(first)).astype(np.uint8)
    return label


def palette(num_classes: int) -> np.ndarray:
    """A colour for each class, uint8 [K, 3]: PASCAL VOC's, in which the first class is black.

    The bits of the class number are dealt to red, green and blue in turn, the lowest to the highest
    bit of a colour; so neighbours differ much.
    """
    classes = np.arange(num_classes)[:, None]
    colours = np.zeros((num_classes, 3), dtype=np.int64)
    for bit in range(8):
        colours |= ((classes >> (3 * bit + np.arange(3))) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def coloured(label: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A label map in its colours: uint8 [H, W, 3]; what is ignored is white."""
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(colours)] = colours
    return table[label]


def overlay(image: np.ndarray, label: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The colours of a label map laid over its image, half and half.

    Args:
        image: uint8 [H, W, 3].
        label: uint8 [H, W].
        colours: uint8 [K, 3].

    Returns:
        uint8 [H, W, 3].
    """
    share = OVERLAY_SHARE
    mixed = (1 - share) * image.astype(np.float32) + share * coloured(label, colours)
    return np.round(mixed).astype(np.uint8)


def save_label_map(path: Path, label: np.ndarray, colours: np.ndarray) -> Path:
    """Write class indices as a palette PNG: programs read indices, people see colours."""
    picture = Image.fromarray(label).convert("L")
    picture.putpalette(coloured(np.arange(256, dtype=np.uint8), colours).tobytes())
    return save_png(path, picture)
