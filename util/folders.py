"""Files on disk, and the folder layout of ImageNet."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.errors import BadInput
from util.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageSource,
    PathLike,
    faults_of,
    open_at_once,
    read_image,
)
from util.jpeg import read_pixels
from util.listing import Names, list_images


class FolderSource(ImageSource):
    """Files on disk, decoded when asked for; statistics are ImageNet's.

    Args:
        name, split: as given to `build_dataset`.
        root: folder of the files.
        files: N paths relative to root.
        labels: int32 [N].
        classes: names of the labels.
    """

    eval_margin = True

    def __init__(
        self,
        name: str,
        split: str,
        root: Path,
        files: Names,
        labels: np.ndarray,
        classes: list[str],
    ) -> None:
        super().__init__(name, split, IMAGENET_MEAN, IMAGENET_STD, classes)
        self.root, self.files, self.labels = root, files, labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        read = read_image if self.decoder == "pil" else read_pixels
        return read(self.file_name(index), self.channels), int(self.labels[index])

    def encoded(self, index: int) -> tuple[bytes, int]:
        path = self.file_name(index)
        with faults_of(path), open_at_once(path) as file:
            return file.read(), int(self.labels[index])

    def file_name(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])


def folder_by_class(name: str, split: str, root: Path, layout: str) -> FolderSource:
    """The images of ROOT/<class>/; sub-folders are searched.

    Args:
        layout: what was expected and which flag gives it, for the message.

    Raises:
        BadInput: no such folder, or none that `list_images` takes.
    """
    if not root.is_dir():
        raise BadInput(f"no folder {root}; expected {layout}")
    try:
        listing = list_images(root)
    except BadInput as error:
        raise BadInput(f"{error}; expected {layout}") from error
    return FolderSource(name, split, root, listing.files, listing.labels, listing.classes)


def imagefolder(split: str, data_path: PathLike | None) -> ImageSource:
    """ImageNet's layout, DATA/train/<class>/* and DATA/val/<class>/*; sub-folders are searched."""
    layout = "DATA/train/<class>/*.jpeg, DATA/val/<class>/*.jpeg and --data_path DATA"
    if data_path is None:
        raise BadInput(f"the data set imagefolder needs a folder, and none was given: {layout}")
    return folder_by_class("imagefolder", split, Path(data_path).expanduser() / split, layout)


def image_files(path: Path, flag: str) -> list[Path]:
    """The file itself, or the images of a folder and its sub-folders, sorted.

    Args:
        flag: that named the path, for the message.

    Raises:
        BadInput: nothing there, or no images.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"{flag} {path} does not exist")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise BadInput(f"{flag} {path} holds no image files ({', '.join(IMG_EXTENSIONS)})")
    return files
