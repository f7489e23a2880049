"""Reading packed data sets: a few large files in place of a million small ones.

    DIR/train/packed.json       what it is: format, classes, statistics, shards with their checksums
              records.npy       one `RECORD` per image, memory-mapped
              names.npy, name_ends.npy   the images' names, as in `util.data.listing.Names`
              shard-00000.bin   images one after the other: JPEG, or raw pixels [H, W, C]
    DIR/val/...                 the same

Why not Arrow: a random read through Hugging Face `datasets` took 61 us here, through pyarrow alone
9, a slice of a mapped file 3; one raw image takes 200 in all.
"""

import hashlib
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data.images import PathLike, as_channels, decode_image
from util.data.jpeg import as_pixels, decode_pixels
from util.data.listing import Names
from util.data.manifest import (
    AGAIN,
    MANIFEST,
    NAME_ENDS,
    NAMES,
    RECORDS,
    TABLES,
    read_manifest,
    shard_name,
)
from util.data.source import Source
from util.errors import BadInput

RECORD = np.dtype(
    [
        ("shard", "<i4"), ("start", "<i8"), ("size", "<i8"), ("crc", "<u4"),
        ("label", "<i4"), ("height", "<i4"), ("width", "<i4"),
    ]
)  # fmt: skip
# Maps that a process keeps open; each holds a file descriptor, of which 1,024 are usual.
OPEN_SHARDS = 512


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=OPEN_SHARDS)
def mapped(path: str) -> np.ndarray:
    """A file as uint8 [N], read when touched. Changes stay in memory; nothing here makes any."""
    # Copy on write, for torch warns of arrays that cannot be written.
    return np.memmap(path, np.uint8, mode="c").view(np.ndarray)


class PackedSource(Source):
    """One split of a packed data set.

    It pickles small; files are opened in each process, when they are needed. The first time that a
    process meets an image, its checksum is compared.

    Args:
        root: DIR/train or DIR/val.

    Raises:
        BadInput: files that are missing, of another length, or damaged.
    """

    def __init__(self, root: Path, split: str) -> None:
        about = read_manifest(root)
        super().__init__(
            about["name"], split, tuple(about["mean"]), tuple(about["std"]), about["classes"]
        )
        self.eval_margin, self.labelled = about["eval_margin"], about["labelled"]
        self.root, self.format, self.kept_channels = root, about["format"], self.channels
        self.stored = stored_as(about["settings"])
        self.num_shards = len(about["shards"])
        check_files(root, about)
        check_tables(root, about)
        self._open()

    def _open(self) -> None:
        # As plain arrays: a memmap makes another memmap of each record, slowly.
        self.records = np.load(self.root / RECORDS, mmap_mode="r").view(np.ndarray)
        self.shards = [str(self.root / shard_name(i)) for i in range(self.num_shards)]
        names, ends = (np.load(self.root / name, mmap_mode="r") for name in (NAMES, NAME_ENDS))
        self.names = Names(names, ends)
        self.seen = np.zeros(len(self.records), bool)

    def __getstate__(self) -> dict[str, Any]:
        opened = ("records", "shards", "names", "seen")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]."""
        return self.records["label"]

    def __len__(self) -> int:
        return len(self.records)

    def file_name(self, index: int) -> str:
        return f"packed:{self.root}/{self.names[index]}"

    def record(self, index: int) -> tuple[memoryview, int, int, int]:
        """Bytes as they are stored, label, height, width.

        Raises:
            BadInput: they are not what was written.
        """
        shard, start, size, crc, label, height, width = self.records[index].item()
        path = self.shards[shard]
        try:
            data = memoryview(mapped(path))[start : start + size]  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read {path}: {error}; {AGAIN}") from error
        if not self.seen[index]:
            if zlib.crc32(data) != crc:
                raise BadInput(
                    f"{path} is damaged: bytes {start:,} to {start + size:,}, image {index} "
                    f"({self.names[index]}), are not what was written; {AGAIN}"
                )
            self.seen[index] = True
        return data, label, height, width

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        data, label, height, width = self.record(index)
        if self.format != "raw":
            name, most = self.file_name(index), self.max_pixels
            if self.decoder == "pil":
                return decode_image(data, name, self.channels, most), label
            return decode_pixels(data, name, self.channels, most), label
        pixels = np.frombuffer(data, np.uint8).reshape(height, width, self.kept_channels)
        if self.kept_channels in (1, 3) and (
            self.decoder == "pil" or self.channels != self.kept_channels
        ):
            image = Image.fromarray(pixels[..., 0] if self.kept_channels == 1 else pixels)
            image = as_channels(image, self.channels)
            return image if self.decoder == "pil" else as_pixels(image), label
        return torch.from_numpy(pixels).permute(2, 0, 1), label

    def encoded(self, index: int) -> tuple[bytes, int]:
        if self.format == "raw":
            return super().encoded(index)
        data, label, _, _ = self.record(index)
        return bytes(data), label


def stored_as(settings: dict[str, Any]) -> str:
    """The pixels' history in a few words, from the settings of a packing."""
    if settings["format"] == "keep":
        return "as published"
    side = settings["short_side"]
    quality = f", quality {settings['quality']}" if settings["format"] == "jpeg" else ""
    return f"{settings['format']}{quality}, {f'short side {side}' if side else 'full size'}"


def check_files(root: Path, about: dict[str, Any]) -> None:
    """Compare the lengths of all files and the checksums of the tables with the manifest's.

    Raises:
        BadInput: with the file's name.
    """
    lengths = {shard["file"]: shard["bytes"] for shard in about["shards"]}
    for name in (*TABLES, *lengths):
        path = root / name
        if not path.is_file():
            raise BadInput(f"{path} is missing; {AGAIN}")
        if name in lengths and path.stat().st_size != lengths[name]:
            raise BadInput(
                f"{path} holds {path.stat().st_size:,} bytes, but {lengths[name]:,} were written; "
                f"{AGAIN}"
            )
        if name in TABLES and checksum(path) != about["tables"][name]:
            raise BadInput(f"{path} is damaged: its checksum is another; {AGAIN}")


def check_tables(root: Path, about: dict[str, Any]) -> None:
    """See that the tables, whose checksums hold, fit the manifest and the shards.

    Raises:
        BadInput: they do not: they or the manifest are another packing's.
    """
    try:
        records, names, ends = (np.load(root / name, mmap_mode="r") for name in TABLES)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read the tables of {root}: {error}; {AGAIN}") from error
    count, classes = about["images"], about["classes"]
    if records.dtype != RECORD or records.shape != (count,) or ends.shape != (count,):
        raise BadInput(f"the tables of {root} are not of {count:,} images; {AGAIN}")
    shard, start, size = (records[name].astype(np.int64) for name in ("shard", "start", "size"))
    labels, height, width = (records[name] for name in ("label", "height", "width"))
    lengths = np.array([part["bytes"] for part in about["shards"]], np.int64)
    known = (shard >= 0) & (shard < len(lengths))
    room = lengths[np.where(known, shard, 0)]
    inside = known & (start >= 0) & (size >= 0) & (start <= room) & (size <= room - start)
    inside &= (height > 0) & (width > 0) & (labels >= -1)
    if classes:
        inside &= labels < len(classes)
    if about["format"] == "raw":
        inside &= size == height.astype(np.int64) * width * about["channels"]
    if not inside.all():
        raise BadInput(
            f"{root / RECORDS} is of another packing: image {int(np.argmin(inside))} is not in "
            f"the shards and classes of {MANIFEST}; {AGAIN}"
        )
    if names.dtype != np.uint8 or ends[-1] != len(names) or (np.diff(ends, prepend=0) < 0).any():
        raise BadInput(f"{root / NAME_ENDS} and {NAMES} do not fit each other; {AGAIN}")


def packed(split: str, place: PathLike) -> Source:
    """One split of a packed data set; place is DIR, which holds train and val."""
    return PackedSource(Path(place).expanduser() / split, split)
