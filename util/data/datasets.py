"""Data sets by name: each builder gives an `Source`, which decodes one image at a time.

A new data set is one builder under `@DATASETS.register("name")`. Keep long listings in numpy arrays
(see `util.data.listing.Names`) and let the source pickle small: each worker may get a copy.
"""

import difflib
import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from util.data.folders import imagefolder
from util.data.hub import hugging_face
from util.data.images import PathLike
from util.data.packed import packed
from util.data.sets.cifar import cifar10, cifar100
from util.data.sets.garments import SIZE as GARMENTS_SIZE
from util.data.sets.garments import GarmentImages, GarmentScenes
from util.data.sets.photos import photos
from util.data.sets.places import places365
from util.data.sets.stl10 import stl10, stl10_unlabeled
from util.data.source import ArraySource, Source
from util.data.splits import NOTHING_HELD_OUT, HoldOut
from util.errors import BadInput, needs
from util.names import Registry
from util.progress import say_once

SPLITS = ("train", "val")


DIGITS_VAL = 297
DIGITS_STATS = ((0.3052,), (0.3749,))


def digits(split: str, data_path: PathLike | None) -> Source:
    """scikit-learn's handwritten digits, 8x8 gray: 1,500 to train, the last 297 held out."""
    bunch = needs("sklearn.datasets", "scikit-learn").load_digits()
    part = slice(None, -DIGITS_VAL) if split == "train" else slice(-DIGITS_VAL, None)
    images = np.round(bunch.images[part] * (255 / 16)).astype(np.uint8)
    classes = [str(digit) for digit in range(10)]
    return ArraySource("digits", split, (images, bunch.target[part]), DIGITS_STATS, classes)


FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_FILES = {"train": "train", "val": "t10k"}
FASHION_STATS = ((0.2860,), (0.3530,))
# fmt: off
FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
]
# fmt: on


def fashion_mnist(split: str, data_path: PathLike | None) -> ArraySource:
    """Fashion-MNIST, 28x28 gray: 60,000 to train, the 10,000 of its test set as val.

    Looked for in `data_path` (the four idx files, gzipped or not, there or in torchvision's
    FashionMNIST/raw), in Debian's package dataset-fashion-mnist, then downloaded by torchvision
    into `data_path` or ./data.
    """
    folders = [FASHION_DEBIAN]
    if data_path is not None:
        folders = [Path(data_path), Path(data_path) / "FashionMNIST/raw", FASHION_DEBIAN]
    images_name = f"{FASHION_FILES[split]}-images-idx3-ubyte"
    folder = next((f for f in folders if find_idx(f, images_name).is_file()), None)
    if folder is None:
        folder = download_fashion_mnist(Path("data" if data_path is None else data_path), folders)
    images = read_idx(find_idx(folder, images_name), ndim=3)
    labels_file = find_idx(folder, f"{FASHION_FILES[split]}-labels-idx1-ubyte")
    labels = read_idx(labels_file, ndim=1)
    if len(labels) != len(images) or not len(labels) or labels.max() >= len(FASHION_CLASSES):
        raise BadInput(
            f"{labels_file} holds {len(labels)} labels up to {labels.max(initial=0)} for "
            f"{len(images)} images; expected one of 0..9 each: the files are of different sets"
        )
    return ArraySource("fashion_mnist", split, (images, labels), FASHION_STATS, FASHION_CLASSES)


def garment_scenes(split: str, data_path: PathLike | None, size: int) -> GarmentScenes:
    """Scenes of a split from its own garments and photographs; `data_path` is Fashion-MNIST's."""
    return GarmentScenes(fashion_mnist(split, data_path), photos(split, None), size)


def garments(split: str, data_path: PathLike | None, size: int = GARMENTS_SIZE) -> Source:
    """Scenes of garments on photographs, without their masks; see `util.data.sets.garments`."""
    return GarmentImages(garment_scenes(split, data_path, size))


def download_fashion_mnist(root: Path, searched: list[Path]) -> Path:
    """Have torchvision download into root; the folder with the idx files."""
    try:
        torchvision.datasets.FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise BadInput(
            f"no Fashion-MNIST in {', '.join(map(str, searched))}, and its download into {root} "
            f"failed ({error}); install Debian's dataset-fashion-mnist, or give --data_path FOLDER "
            "with the four idx files"
        ) from error
    return root / "FashionMNIST/raw"


def find_idx(folder: Path, name: str) -> Path:
    """The plain file where there is one, or else the gzipped one."""
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"


MOST_IDX = 2**30  # bytes; the largest set of the family, EMNIST, holds 638 million


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an idx file of bytes (the MNIST family's format), gzipped where its name ends in .gz.

    Returns:
        uint8 array of `ndim` dimensions.

    Raises:
        BadInput: missing, truncated, corrupt, too long, or of another type or shape.
    """
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    start = 4 + 4 * ndim
    try:
        with opener(path, "rb") as file:
            head = file.read(start)
            # Magic: two zero bytes, 8 for unsigned bytes, the number of dimensions; then
            # big-endian sizes.
            if head[:4] != bytes([0, 0, 8, ndim]) or len(head) < start:
                raise BadInput(
                    f"{path} is no idx file of bytes in {ndim} dimensions (first {head[:4]!r})"
                )
            shape = tuple(int(n) for n in np.frombuffer(head, ">u4", count=ndim, offset=4))
            expected = math.prod(shape)
            if expected > MOST_IDX:
                raise BadInput(
                    f"{path} says that it holds {' x '.join(map(str, shape))} bytes; at most "
                    f"{MOST_IDX:,} are read"
                )
            data = file.read(expected + 1)  # no more: of a gzip file a few MB may become GB
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"cannot read {path}: {error}; fetch the file again") from error
    if len(data) != expected:
        found = start + len(data) if len(data) < expected else "more"
        raise BadInput(f"{path} holds {found} bytes, but its sizes {shape} need {start + expected}")
    return np.frombuffer(data, np.uint8).reshape(shape)


SYNTHETIC_LENGTH = {"train": 256, "val": 64}


class SyntheticSource(Source):
    """Gradients, discs and stripes in random colours, each a function of (split, index) alone."""

    def __init__(self, split: str, channels: int, size: tuple[int, int]) -> None:
        mean, std = (0.5,) * channels, (0.23,) * channels
        super().__init__("synthetic", split, mean, std, ["gradient", "discs", "stripes"])
        self.size = size

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return np.arange(len(self)) % len(self.classes)

    def __len__(self) -> int:
        return SYNTHETIC_LENGTH[self.split]

    def with_channels(self, channels: int) -> Source:
        if channels < 1:
            raise BadInput(f"channels is {channels}; synthetic images need at least 1")
        return SyntheticSource(self.split, channels, self.size)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng((SPLITS.index(self.split), index))
        label = index % len(self.classes)
        y, x = np.mgrid[0 : 1 : self.size[0] * 1j, 0 : 1 : self.size[1] * 1j]  # [H, W] each
        cover = self.shape(rng, self.classes[label], y, x)[..., None]  # [H, W, 1]
        low, high = rng.random((2, self.channels))
        image = np.round(255 * (low + (high - low) * cover)).astype(np.uint8)  # [H, W, C]
        if self.channels == 1:
            return Image.fromarray(image[..., 0]), label
        if self.channels == 3:
            return Image.fromarray(image), label
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), label

    @staticmethod
    def shape(rng: np.random.Generator, kind: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """How much of the second colour each pixel takes: [H, W], 0 to 1."""
        angle = rng.uniform(0, 2 * np.pi)
        along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        ramp = along / np.sqrt(2) + 0.5
        if kind == "gradient":
            return ramp
        if kind == "stripes":
            return 0.3 * ramp + 0.35 * (1 + np.sin(2 * np.pi * rng.uniform(2, 8) * along))
        cover = 0.5 * ramp
        for cy, cx, radius in rng.uniform((0, 0, 0.08), (1, 1, 0.3), size=(6, 3)):
            cover = np.where((y - cy) ** 2 + (x - cx) ** 2 < radius**2, rng.random(), cover)
        return cover


def synthetic(split: str, data_path: PathLike | None, size: tuple[int, int] = (96, 96)) -> Source:
    """Drawn images of any size and number of channels, for tests and for trying a machine."""
    return SyntheticSource(split, 3, size)


Builder = Callable[..., Source]

DATASETS: Registry[Builder] = Registry(
    "data set",
    {
        "imagefolder": imagefolder,
        "places365": places365,
        "stl10": stl10,
        "stl10_unlabeled": stl10_unlabeled,
        "cifar10": cifar10,
        "cifar100": cifar100,
        "photos": photos,
        "digits": digits,
        "fashion_mnist": fashion_mnist,
        "garments": garments,
        "synthetic": synthetic,
    },
)

# What --data_path may begin with in place of a folder; what follows goes to the builder.
PLACES: dict[str, Builder] = {"packed:": packed, "hf:": hugging_face}
DEFAULT = "imagefolder"


def find_place(data_path: PathLike | None) -> str | None:
    """Which of `PLACES` a path begins with, None: it is a folder."""
    return next((place for place in PLACES if str(data_path).startswith(place)), None)


def build_dataset(
    name: str,
    split: str,
    data_path: PathLike | None = None,
    channels: int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_pixels: int | None = None,
    hold_out: HoldOut = NOTHING_HELD_OUT,
    **options: object,
) -> Source:
    """One split of a data set.

    Args:
        name: a key of `DATASETS`.
        split: "train" or "val".
        data_path: where the files are; unused by the sets that come inside a package. packed:DIR
            and hf:NAME_OR_DIR say what they hold themselves; the name stays at its default.
        channels: turn pictures into gray (1) or RGB (3); None leaves them as the set has them.
        mean, std: one number for all channels or one for each, in units of 0..1; None: the set's.
        max_pixels: an image file of more is not decoded; None: see `util.data.pixel_limits`.
        hold_out: images of train that stand in for val.
        options: further keywords of the builder (synthetic: size).

    Raises:
        BadInput: unknown name or split, missing or broken files, channels that the set cannot give,
            impossible statistics.
    """
    if name not in DATASETS:
        nearness = {n: difflib.SequenceMatcher(None, name.lower(), n).ratio() for n in DATASETS}
        names = ", ".join(sorted(nearness, key=lambda n: -nearness[n]))
        raise BadInput(f"unknown data set {name!r}; the valid ones, nearest first: {names}")
    if split not in SPLITS:
        raise BadInput(f"unknown split {split!r} of {name}; expected train or val")
    builder, place = DATASETS[name], find_place(data_path)
    if place is not None:
        if name != DEFAULT:
            raise BadInput(
                f"--data_path {data_path} says what it holds; leave --dataset {name} out"
            )
        builder, data_path = PLACES[place], str(data_path)[len(place) :]
    unused = Path(str(data_path)) / "val"
    if hold_out.fraction is not None and builder is imagefolder and unused.is_dir():
        say_once(f"note: {unused} is not used: --val_fraction holds out images of train")
    source = hold_out.open(lambda part: builder(part, data_path, **options), split)
    if channels is not None:
        source = source.with_channels(channels)
    return source.with_max_pixels(max_pixels).with_stats(mean, std)
