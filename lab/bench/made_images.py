"""Folders of images made for benchmarks, so that anyone can repeat them."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.sets.photos import photos
from util.errors import BadInput

# ImageNet's files: 500 x 375 is the commonest size, about 110 kB the mean.
LONG_SIDE, SHORT_SIDE, QUALITY = 500, 375, 90
CLASSES = 10
LINKS = 30_000  # of one file: ext4 allows 65,000


def jpegs_like_imagenet(count: int, seed: int = 0) -> Iterator[bytes]:
    """JPEG files: random crops of the bundled photographs, upright or lying, about 500 x 375.

    Sides vary by a tenth; each is a function of (seed, number).
    """
    images = photos("train", None).images
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        image = images[rng.integers(len(images))]
        sides = [round(side * rng.uniform(0.9, 1.1)) for side in (LONG_SIDE, SHORT_SIDE)]
        w, h = sides if rng.random() < 0.75 else sides[::-1]
        share = rng.uniform(0.5, 1.0) * min(image.width / w, image.height / h)
        cut_w, cut_h = int(w * share), int(h * share)
        left = int(rng.integers(image.width - cut_w + 1))
        top = int(rng.integers(image.height - cut_h + 1))
        box = (left, top, left + cut_w, top + cut_h)
        file = io.BytesIO()
        crop = image.resize((w, h), Image.Resampling.BICUBIC, box=box)
        crop.save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


def _new_folder(root: Path) -> None:
    """Refuse a folder with images: files of two makings would be mixed."""
    if (root / "train").exists():
        raise BadInput(f"{root} holds train/ already; name a new folder, or remove it")
    root.mkdir(parents=True, exist_ok=True)


def make_jpegs(root: Path, count: int) -> None:
    """Write ROOT/train/<class>/*.jpg.

    Raises:
        BadInput: there are images already.
    """
    _new_folder(root)
    for number, data in enumerate(jpegs_like_imagenet(count)):
        folder = root / "train" / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:07d}.jpg").write_bytes(data)


def make_tiny_files(root: Path, count: int, classes: int = 1000) -> None:
    """Write ROOT/train/<class>/*.jpg of 32 x 32 pixels; most are hard links to a few.

    Raises:
        BadInput: there are images already, or the file system has no hard links.
    """
    _new_folder(root)
    original = root
    for number in range(count):
        folder = root / "train" / f"n{number % classes:08d}"
        if number < classes:
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"image_{number:08d}.JPEG"
        if number % LINKS == 0:
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(path, quality=50)
            original = path
            continue
        try:
            os.link(original, path)
        except OSError as error:
            raise BadInput(f"cannot link {path}: {error.strerror}; name another folder") from None
