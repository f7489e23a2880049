"""The values that a user's label maps hold: which class each stands for, and whether they make
sense as classes.

A map of 0 and 255 is mostly a mask of one foreground class, and by the convention that 255 is
ignored it would be a set of one class that nothing can get wrong.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from util.console import SHOWN, listed, shown
from util.data.images import BadImage
from util.data.label_maps import IGNORE, MOST_CLASSES, BadPair, check_label, read_label_map
from util.errors import BadInput

LARGEST = 2**31 - 1  # of a stored value
HINT = "--label_map 0:0 255:1"
Values = Mapping[int, int]


def label_pair(text: str) -> str:
    """An argparse type: `255:1` or `255:ignore`, a stored value and its class; as it was given."""
    value, _, meaning = text.partition(":")
    short = len(text) <= SHOWN  # Python makes no number of thousands of digits
    known = short and (meaning == "ignore" or (meaning.isdecimal() and int(meaning) < MOST_CLASSES))
    if not (known and value.isdecimal() and int(value) <= LARGEST):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not VALUE:CLASS or VALUE:ignore, such as 255:1 (classes 0 to "
            f"{MOST_CLASSES - 1}; in YAML in quotes)"
        )
    return text


def parse_label_map(pairs: Sequence[str] | None) -> dict[int, int] | None:
    """`--label_map` as stored value to class, `IGNORE` for what does not count; None: no such flag.

    Raises:
        BadInput: one value with two meanings, or fewer than two classes.
    """
    if pairs is None:
        return None
    values: dict[int, int] = {}
    for pair in pairs:
        value, _, meaning = pair.partition(":")
        one = IGNORE if meaning == "ignore" else int(meaning)
        if values.setdefault(int(value), one) != one:
            raise BadInput(f"--label_map gives the value {value} two meanings; expected one")
    if len(set(values.values()) - {IGNORE}) < 2:
        raise BadInput(
            f"--label_map {' '.join(pairs)} names fewer than two classes; the background is one "
            f"too, for example {HINT}"
        )
    return values


def apply_values(values: np.ndarray, meanings: Values, path: str) -> np.ndarray:
    """Stored values to classes: uint8 [H, W].

    Raises:
        BadPair: a value without a meaning; with the file, the value and where it stands.
    """
    stored, places = np.unique(values, return_inverse=True)
    for value in stored.tolist():
        if value not in meanings:
            row, column = (int(i) for i in np.argwhere(values == value)[0])
            raise BadPair(
                f"the mask {path} holds the value {value} (row {row}, column {column}), of which "
                f"--label_map says nothing; add {value}:CLASS or {value}:ignore"
            )
    table = np.array([meanings[value] for value in stored.tolist()], dtype=np.uint8)
    return table[places.reshape(values.shape)]


# Label maps to look through: of each its name, and what reads it.
Maps = Iterable[tuple[str, Callable[[], np.ndarray]]]


def find_label_maps(folder: Path, files: Iterable[str], max_pixels: int | None = None) -> Maps:
    """The label maps of a folder.

    Args:
        max_pixels: of a mask, see `util.data.pixel_limits`.
    """
    for name in files:
        path = str(folder / name)
        yield path, partial(read_label_map, path, max_pixels)


def count_classes(maps: Maps) -> tuple[int, list[str]]:
    """Classes of label maps that nothing names: their largest value and one. Reads all of them.

    Returns:
        the count, and what the reader should know of it.

    Raises:
        BadInput: values that are no class, by file and value; or too few of those below the largest
            for it to be a count.
    """
    first: dict[int, str] = {}  # of each value, a file that has it
    for name, read in maps:
        for value in np.unique(read()).tolist():
            if value != IGNORE and not 0 <= value < MOST_CLASSES:
                raise BadInput(
                    f"the mask {name} holds the value {value}; classes are 0 to "
                    f"{MOST_CLASSES - 1} and {IGNORE} is ignored; say what the values stand for, "
                    f"for example --label_map 0:0 {value}:1"
                )
            first.setdefault(value, name)
    found = sorted(set(first) - {IGNORE})
    count = found[-1] + 1 if found else 1
    if len(found) >= 2 and 2 * len(found) < count:
        raise BadInput(
            f"the mask {first[found[-1]]} holds the value {found[-1]}, which would make "
            f"{count} classes, but only {len(found)} values occur ({listed(found)}); say what they "
            f"stand for (--label_map {' '.join(f'{v}:{i}' for i, v in enumerate(found[:3]))} ...), "
            f"or give --nb_classes {count}"
        )
    missing = sorted(set(range(count)) - set(found))
    notes = [f"no training mask holds the class {listed(missing)}"] if missing else []
    return count, notes


def check_two_classes(
    maps: Maps,
    num_classes: int,
    meanings: Values | None,
    split: str,
    place: str,
) -> list[str]:
    """See that a split has more than one class; mostly its first mask says so.

    Args:
        num_classes: K, which somebody or the masks have said.
        meanings: of `parse_label_map`; None: values are classes, and `IGNORE` is ignored.
        place: where the masks are, for messages.

    Returns:
        what the reader should know: a validation set of one class.

    Raises:
        BadInput: one class, and all else ignored without anybody having said so; or training masks
            of one class.
    """
    seen: set[int] = set()
    ignored, some = None, False
    for name, read in maps:
        try:
            found = set(np.unique(read()).tolist())
        except (BadImage, BadPair):
            continue  # told when the pair is used
        some = True
        if meanings is not None:
            found = {meanings.get(value, IGNORE) for value in found}
        elif found - {IGNORE} - set(range(num_classes)):
            return []  # refused by value when the pair is used
        if IGNORE in found and ignored is None:
            ignored = name
        seen |= found - {IGNORE}
        if len(seen) > 1:
            return []
    if not some:
        return []
    only = f"the class {listed(sorted(seen))} alone" if seen else "no class"
    if ignored is not None and meanings is None:
        raise BadInput(
            f"the mask {ignored} holds the value {IGNORE}, which is ignored by convention, and "
            f"beside it all masks of {split} hold {only}: there is nothing to learn or to measure; "
            f"if {IGNORE} is a class, say so: {HINT} (if it is none: 0:0 1:1 {IGNORE}:ignore)"
        )
    if split == "train":
        raise BadInput(
            f"all masks of {split} in {place} hold {only}: there is nothing to learn; a segmenter "
            "needs two classes, and the background is one"
        )
    return [f"all masks of {split} hold {only}: mIoU says little"]


def checked(
    values: np.ndarray,
    image: Image.Image,
    names: tuple[str, str],
    num_classes: int,
    first: int,
    meanings: dict[int, int] | None,
) -> np.ndarray:
    """The values of a label map as classes of its image's pixels: uint8 [H, W].

    Args:
        names: of image and mask, for messages.
        first, meanings: see `check_label` and `parse_label_map`.

    Raises:
        BadPair: a value that is no class, or another size than the image's.
    """
    if meanings is not None:
        values = apply_values(values, meanings, names[1])
    label = check_label(values, num_classes, names[1], first=first)
    if label.shape != (image.height, image.width):
        raise BadPair(
            f"the mask {names[1]} is {label.shape[1]} x {label.shape[0]} pixels, its image "
            f"{names[0]} {image.width} x {image.height} (width x height); expected the same size"
        )
    return label


def numbered(num_classes: int | None, meanings: dict[int, int] | None) -> list[str]:
    """Names for so many classes, or for those that `label_map` speaks of."""
    if num_classes is None:
        num_classes = 1 + max(set((meanings or {}).values()) - {IGNORE})
    return [f"class {i}" for i in range(num_classes)]


def check_meanings(meanings: dict[int, int] | None, num_classes: int) -> None:
    """Refuse a `label_map` that speaks of classes that there are not."""
    beyond = [v for v in (meanings or {}).values() if v != IGNORE and v >= num_classes]
    if beyond:
        raise BadInput(f"--label_map names the class {beyond[0]}, but there are {num_classes}")
