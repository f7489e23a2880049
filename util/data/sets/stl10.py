"""STL-10, labelled and unlabelled, read from its binary files as they are."""

from pathlib import Path

import numpy as np
import torchvision
from PIL import Image

from util.data.images import PathLike, as_channels
from util.data.source import Source
from util.errors import BadInput

FOLDER = "stl10_binary"
# Images in each part; the files have no header that would say so.
COUNTS = {"train": 5000, "test": 8000, "unlabeled": 100_000}
SHAPE = (3, 96, 96)  # channel, column, row
IMAGE_BYTES = 3 * 96 * 96
AGAIN = "fetch the file again"
MEAN, STD = (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)
# fmt: off
CLASSES = [
    "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
]
# fmt: on


class Stl10Source(Source):
    """One part of STL-10; images are read from the file one by one, for the largest has 2.8 GB.

    Args:
        name, split: as given to `build_dataset`.
        path: of the file of images.
        labels: int64 [N].
    """

    def __init__(self, name: str, split: str, path: Path, labels: np.ndarray) -> None:
        super().__init__(name, split, MEAN, STD, CLASSES)
        self.path, self.labels = path, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek(index * IMAGE_BYTES)
            pixels = np.frombuffer(file.read(IMAGE_BYTES), np.uint8).reshape(SHAPE)
        image = Image.fromarray(np.ascontiguousarray(pixels.T))  # [row, column, channel]
        return as_channels(image, self.channels), int(self.labels[index])


def stl10(split: str, data_path: PathLike | None) -> Source:
    """STL-10, 96x96 RGB: its 5,000 labelled images to train, the 8,000 of its test set as val."""
    return read_part("stl10", split, {"train": "train", "val": "test"}[split], data_path)


def stl10_unlabeled(split: str, data_path: PathLike | None) -> Source:
    """STL-10 to pretrain on: its 100,000 unlabelled images (label -1); val as in `stl10`."""
    return read_part(
        "stl10_unlabeled", split, {"train": "unlabeled", "val": "test"}[split], data_path
    )


def read_part(name: str, split: str, part: str, data_path: PathLike | None) -> Source:
    """Look in `data_path` or ./data, itself or its stl10_binary, else download there (2.6 GB)."""
    root = Path("data" if data_path is None else data_path).expanduser()
    images = f"{part}_X.bin"
    folder = next((f for f in (root, root / FOLDER) if (f / images).is_file()), None)
    if folder is None:
        try:
            torchvision.datasets.STL10(str(root), split="test", download=True)
        except (OSError, RuntimeError) as error:
            raise BadInput(
                f"no {images} in {root} or {root / FOLDER}, and the download failed ({error}); "
                f"give --data_path FOLDER with the {FOLDER} of {torchvision.datasets.STL10.url}"
            ) from error
        folder = root / FOLDER
    labels = np.full(COUNTS[part], -1)
    check_size(folder / images, COUNTS[part] * IMAGE_BYTES)
    if part != "unlabeled":
        check_size(folder / f"{part}_y.bin", COUNTS[part])
        labels = np.fromfile(folder / f"{part}_y.bin", np.uint8).astype(np.int64) - 1
        if labels.min() < 0 or labels.max() >= len(CLASSES):
            raise BadInput(f"{folder / f'{part}_y.bin'} holds labels outside 1..10; {AGAIN}")
    source = Stl10Source(name, split, folder / images, labels)
    source.labelled = part != "unlabeled"
    return source


def check_size(path: Path, expected: int) -> None:
    """Raise BadInput for a missing file, or one of another size."""
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise BadInput(f"{path} holds {size} bytes, but STL-10's has {expected}; {AGAIN}")
