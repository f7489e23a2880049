"""Segmentation sets by name: each gives an image and the class of every pixel, by index.

A new set is one builder and one line in `SEGMENTATION_SETS`.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.datasets import SPLITS, garment_scenes
from util.data.hub_pairs import hugging_face_pairs
from util.data.images import IMAGENET_MEAN, IMAGENET_STD, BadImage, PathLike, Stats, read_image
from util.data.label_maps import (
    IGNORE,
    MOST_CLASSES,
    BadPair,
    read_label_map,
)
from util.data.label_values import (
    check_meanings,
    check_two_classes,
    checked,
    count_classes,
    find_label_maps,
    numbered,
    parse_label_map,
)
from util.data.listing import Names
from util.data.pair_files import list_pairs
from util.data.sets.garments import MEAN as GARMENTS_MEAN
from util.data.sets.garments import SIZE as GARMENTS_SIZE
from util.data.sets.garments import STD as GARMENTS_STD
from util.data.sets.garments import GarmentScenes
from util.data.source import Source
from util.errors import BadInput
from util.names import Registry

LabelledImage = tuple[Image.Image, np.ndarray]

ADE_CLASSES = 150
ADE_FOLDERS = {"train": "training", "val": "validation"}
ADE_LAYOUT = (
    "ADEChallengeData2016/{images,annotations}/{training,validation} and --data_path "
    "ADEChallengeData2016"
)
FOLDER_LAYOUT = "DATA/{train,val}/{images,masks} with a mask NAME.png for each image NAME.*"
CLASSES_FILE, ADE_NAMES_FILE = "classes.txt", "objectInfo150.txt"


class SegmentationSource(Source):
    """RGB images of one split with their label maps, uint8 [H, W] of the same size."""

    target = "mask"

    def __getitem__(self, index: int) -> LabelledImage:
        raise NotImplementedError


class PairSource(SegmentationSource):
    """Files on disk: pictures, and label maps of the same names.

    Args:
        images, masks: folders.
        image_files, mask_files: N names in them.
        first: the value in a mask that stands for class 0, see `check_label`.
        meanings: classes by stored value, see `parse_label_map`; None: values are classes.
    """

    def __init__(
        self,
        name: str,
        split: str,
        classes: Sequence[str],
        folders: tuple[Path, Path],
        files: tuple[Names, Names],
        first: int,
        meanings: dict[int, int] | None = None,
    ) -> None:
        super().__init__(name, split, IMAGENET_MEAN, IMAGENET_STD, classes)
        (self.images, self.masks), (self.image_files, self.mask_files) = folders, files
        self.first, self.meanings = first, meanings

    def __len__(self) -> int:
        return len(self.image_files)

    def __getitem__(self, index: int) -> LabelledImage:
        image = read_image(self.file_name(index), 3, paired=True, max_pixels=self.max_pixels)
        path = os.path.join(self.masks, self.mask_files[index])
        values = read_label_map(path, self.max_pixels)
        names = self.file_name(index), path
        return image, checked(values, image, names, len(self.classes), self.first, self.meanings)

    def file_name(self, index: int) -> str:
        return os.path.join(self.images, self.image_files[index])


class GarmentPairs(SegmentationSource):
    """Scenes of garments, see `util.data.sets.garments`; background and ten classes."""

    def __init__(self, scenes: GarmentScenes) -> None:
        split = scenes.garments.split
        super().__init__("garments", split, GARMENTS_MEAN, GARMENTS_STD, scenes.classes)
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> LabelledImage:
        image, label = self.scenes.scene(index)
        return Image.fromarray(image), label


class UnlabelledSource(SegmentationSource):
    """A user's own images, of which every pixel is to be predicted.

    Args:
        files: of the images.
        classes: of the model.
        mean, std: of the set that the model learnt from; None: ImageNet's.
        strict: an image that cannot be decoded is an error; else it is black, and `read` says why.
    """

    def __init__(
        self,
        files: Sequence[Path],
        classes: Sequence[str],
        *,
        mean: Stats | None = None,
        std: Stats | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__("images", "val", mean or IMAGENET_MEAN, std or IMAGENET_STD, classes)
        self.files, self.strict = list(files), strict

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LabelledImage:
        try:
            image = self.read(index)
        except BadImage as error:
            if self.strict:  # no other image may take the place of one that was asked for
                raise BadPair(str(error)) from error
            image = Image.new("RGB", (16, 16))
        return image, np.full((image.height, image.width), IGNORE, dtype=np.uint8)

    def read(self, index: int) -> Image.Image:
        """The image, RGB.

        Raises:
            BadImage: it cannot be decoded.
        """
        return read_image(self.files[index], 3, max_pixels=self.max_pixels)

    def file_name(self, index: int) -> str:
        return str(self.files[index])


# ---- Files -------------------------------------------------------------------------------------


# ---- Builders ----------------------------------------------------------------------------------


def need_path(name: str, data_path: PathLike | None, layout: str) -> Path:
    """The folder of a set that needs one."""
    if data_path is None:
        raise BadInput(f"the data set {name} needs a folder, and none was given: {layout}")
    return Path(data_path).expanduser()


def ade20k(
    split: str, data_path: PathLike | None, num_classes: int | None, size: int | None
) -> SegmentationSource:
    """ADE20K of the MIT scene parsing challenge: 150 classes; value 0 in a mask is ignored."""
    root = need_path("ade20k", data_path, ADE_LAYOUT)
    inside = root / "ADEChallengeData2016"
    if inside.is_dir() and not (root / "images").exists():
        raise BadInput(f"{root} holds the folder ADEChallengeData2016; give --data_path {inside}")
    if num_classes not in (None, ADE_CLASSES):
        raise BadInput(f"--nb_classes {num_classes}, but ade20k has {ADE_CLASSES} classes")
    folders = (root / "images" / ADE_FOLDERS[split], root / "annotations" / ADE_FOLDERS[split])
    files = list_pairs(*folders, ADE_LAYOUT)
    return PairSource("ade20k", split, ade_names(root / ADE_NAMES_FILE), folders, files, first=1)


def ade_names(path: Path) -> list[str]:
    """The 150 names of the challenge's table, the first of each line's synonyms; or generated ones.

    The table's columns are separated by tabs: number from 1, four statistics, names.
    """
    names = [f"class {i + 1}" for i in range(ADE_CLASSES)]
    if not path.is_file():
        return names
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        columns = line.split("\t")
        number = columns[0].strip()
        if len(columns) > 1 and number.isdecimal() and 1 <= int(number) <= ADE_CLASSES:
            names[int(number) - 1] = re.split("[,;]", columns[-1])[0].strip()
    return names


def folder(
    split: str,
    data_path: PathLike | None,
    num_classes: int | None,
    size: int | None,
    label_map: Sequence[str] | None = None,
    max_pixels: int | None = None,
) -> SegmentationSource:
    """A user's own pairs: DATA/{train,val}/images and masks, value = class, 255 ignored.

    Names of the classes are the lines of DATA/classes.txt. Without that file, a number of classes
    and `label_map`, all masks of the training split are read to count them. Where values are not
    classes, `label_map` says what they stand for.
    """
    meanings = parse_label_map(label_map)
    root, notes = need_path("folder", data_path, FOLDER_LAYOUT), list[str]()
    folders = (root / split / "images", root / split / "masks")
    files = list_pairs(*folders, FOLDER_LAYOUT)
    listed = root / CLASSES_FILE
    if listed.is_file():
        text = listed.read_text(encoding="utf-8", errors="surrogateescape")
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if num_classes not in (None, len(names)):
            raise BadInput(f"--nb_classes {num_classes}, but {listed} names {len(names)} classes")
    else:
        if num_classes is None and meanings is None:
            train = root / "train"
            train_files = list_pairs(train / "images", train / "masks", FOLDER_LAYOUT)[1]
            num_classes, notes = count_classes(
                find_label_maps(train / "masks", train_files, max_pixels)
            )
        names = numbered(num_classes, meanings)
    if not 0 < len(names) <= MOST_CLASSES:
        raise BadInput(
            f"{listed} names {len(names)} classes; expected 1 to {MOST_CLASSES}, one a line"
        )
    check_meanings(meanings, len(names))
    maps = find_label_maps(folders[1], files[1], max_pixels)
    notes += check_two_classes(maps, len(names), meanings, split, str(folders[1]))
    source = PairSource("folder", split, names, folders, files, first=0, meanings=meanings)
    source.notes = notes
    return source


def garments(
    split: str, data_path: PathLike | None, num_classes: int | None, size: int | None
) -> SegmentationSource:
    """Scenes of Fashion-MNIST's garments on photographs; `size` pixels a side, 96 if None."""
    pairs = GarmentPairs(garment_scenes(split, data_path, size or GARMENTS_SIZE))
    if num_classes not in (None, len(pairs.classes)):
        raise BadInput(f"--nb_classes {num_classes}, but garments has {len(pairs.classes)} classes")
    return pairs


# What --data_path may begin with in place of a folder; what follows goes to the builder.
PLACES: dict[str, Callable[..., Source]] = {"hf:": hugging_face_pairs}
DEFAULT = "ade20k"

SEGMENTATION_SETS: Registry[Callable[..., Source]] = Registry(
    "segmentation set", {"ade20k": ade20k, "folder": folder, "garments": garments}
)


def build_segmentation_set(
    name: str,
    split: str,
    data_path: PathLike | None = None,
    *,
    num_classes: int | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    label_map: Sequence[str] | None = None,
    max_pixels: int | None = None,
) -> Source:
    """One split of a segmentation set.

    Args:
        name: a key of `SEGMENTATION_SETS`.
        split: "train" or "val".
        data_path: where the files are; hf:NAME_OR_DIR says what it holds itself, and the name stays
            at its default.
        num_classes: of a folder that does not name them.
        size: side of a scene that is made (garments), pixels; files have their own.
        mean, std: one number for all channels or one for each, in units of 0..1; None: the set's.
        label_map: of a folder, what the values in its masks stand for, see `label_pair`.
        max_pixels: an image or mask of more is not decoded; None: see `util.data.pixel_limits`.

    Raises:
        BadInput: unknown name or split, missing files, pairs that do not fit, values that make no
            sense as classes.
    """
    builder = SEGMENTATION_SETS.find(name)
    if split not in SPLITS:
        raise BadInput(f"unknown split {split!r} of {name}; expected train or val")
    own = {"label_map": label_map, "max_pixels": max_pixels}
    place = next((p for p in PLACES if str(data_path).startswith(p)), None)
    if place is not None:
        if name != DEFAULT:
            raise BadInput(
                f"--data_path {data_path} says what it holds; leave --dataset {name} out"
            )
        source = PLACES[place](split, str(data_path)[len(place) :], num_classes, **own)
    elif label_map is not None and name != "folder":
        raise BadInput(f"--label_map is for --dataset folder; {name} says what its values are")
    else:
        more = own if name == "folder" else {}
        source = builder(split, data_path, num_classes, size, **more)
    return source.with_max_pixels(max_pixels).with_stats(mean, std)


def check_pairs(source: Source, indices: Iterable[int], seen: set[int] | None = None) -> int:
    """Read these pairs, as `--check_data` asks; returns how many there are.

    Args:
        seen: takes the classes that their labels hold.

    Raises:
        BadInput: the first pair that cannot be learnt from; with its file.
    """
    count = 0
    for index in indices:
        _, label = source[index]
        if seen is not None:
            seen |= set(np.unique(label).tolist()) - {IGNORE}
        count += 1
    return count
