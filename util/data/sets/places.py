"""Places365-Standard: torchvision's layout, or one folder per class."""

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from util.data.folders import FolderSource, folder_by_class
from util.data.images import PathLike
from util.data.listing import Names
from util.data.source import Source
from util.errors import BadInput

CATEGORIES = "categories_places365.txt"
FILE_LISTS = {"train": "places365_train_standard.txt", "val": "places365_val.txt"}
IMAGES = {"train": "data_{}_standard", "val": "val_{}"}
SIZES = ("large", "256")
LAYOUT = (
    f"torchvision's layout ({CATEGORIES}, {FILE_LISTS['train']}, {FILE_LISTS['val']}, and "
    "data_large_standard and val_large, or data_256_standard and val_256) or DATA/train/<class>/* "
    "and DATA/val/<class>/*, and --data_path DATA"
)
FETCH = (
    "torchvision.datasets.Places365(DATA, split, small=True, download=True) fetches the first, for "
    "the splits train-standard and val"
)


def places365(split: str, data_path: PathLike | None) -> Source:
    """Places365-Standard: 1,803,460 images to train, 36,500 to validate, 365 scenes.

    In torchvision's layout the large images are taken where both splits have them, or else those of
    256x256. Nothing is downloaded by itself: the small images are 26 GB. Statistics are ImageNet's.
    """
    if data_path is None:
        raise BadInput(f"the data set places365 needs a folder, and none was given: {LAYOUT}")
    root = Path(data_path).expanduser()
    if (root / FILE_LISTS[split]).is_file():
        return by_file_list(split, root)
    if (root / split).is_dir():
        return folder_by_class("places365", split, root / split, LAYOUT)
    raise BadInput(
        f"{root} has neither {FILE_LISTS[split]} nor {split}/; expected {LAYOUT}; {FETCH}"
    )


def by_file_list(split: str, root: Path) -> FolderSource:
    """One split in torchvision's layout, in the order of its file list."""
    there = {
        name: [size for size in SIZES if (root / IMAGES[name].format(size)).is_dir()]
        for name in IMAGES
    }
    if not there[split]:
        raise BadInput(f"{root} has no {IMAGES[split].format('large')}; expected {LAYOUT}; {FETCH}")
    # Of one size if possible: the small images are squeezed to squares, the large ones are not.
    size = next((s for s in there["train"] if s in there["val"]), there[split][0])

    classes = {label: name for name, label in read_pairs(root / CATEGORIES)}
    if sorted(classes) != list(range(len(classes))):
        raise BadInput(f"{root / CATEGORIES} does not number its classes from 0 on")

    labels = array("i")

    def files() -> Iterator[str]:
        for name, label in read_pairs(root / FILE_LISTS[split]):
            labels.append(label)
            yield name.lstrip("/")

    names = Names.of(files())
    label_array = np.array(labels, dtype=np.int32)
    if not len(names) or label_array.max() >= len(classes):
        raise BadInput(
            f"{root / FILE_LISTS[split]} lists {len(names)} images with labels up to "
            f"{label_array.max(initial=0)}; expected some, of the {len(classes)} classes of "
            f"{CATEGORIES}"
        )
    folder = root / IMAGES[split].format(size)
    in_order = [classes[label] for label in range(len(classes))]
    return FolderSource("places365", split, folder, names, label_array, in_order)


def read_pairs(path: Path) -> Iterator[tuple[str, int]]:
    """(name, number) of each line of a list.

    Raises:
        BadInput: the file is missing or a line is something else.
    """
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                name, label = line.split() if line.count(" ") == 1 else ("", "")
                if not label.isdecimal():
                    raise BadInput(
                        f"{path} has a line {line[:80]!r}; expected a name and a class number: "
                        "fetch the file again"
                    )
                yield name, int(label)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}; expected {LAYOUT}") from error
