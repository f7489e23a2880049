"""Writing packed data sets: shard by shard, each whole or not there, in any number of processes."""

import hashlib
import io
import json
import os
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from util.console import counted, visible_line
from util.data.conversions import Conversion, Found, describe, merge, take
from util.data.images import BadImage, decode_image
from util.data.listing import Names
from util.data.loading import Loader
from util.data.manifest import (
    CHECKSUM,
    MANIFEST,
    NAME_ENDS,
    NAMES,
    RECORDS,
    TABLES,
    VERSION,
    opened,
    read_manifest,
    sealed,
    shard_name,
)
from util.data.packed import RECORD, check_files, check_tables, checksum
from util.data.source import Source
from util.errors import BadInput, RunFailed
from util.files import open_whole, reading, sweep, writing
from util.progress import Progress, say

SETTINGS, BAD_IMAGES = "packing.json", "bad_images.txt"
# A few hundred shards: few enough to keep them open, enough to lose little when one is cut off.
SHARDS, FEWEST, MOST = 256, 64, 8192


@dataclass(frozen=True)
class Recipe:
    """What a packing makes of each image.

    Attributes:
        format: jpeg | raw | keep (the file as it is).
        short_side: pixels to shrink to; 0: as they are. Nothing is enlarged.
        quality: of JPEG, 1 to 95.
    """

    format: str
    short_side: int
    quality: int

    def __call__(self, source: Source, index: int) -> tuple[bytes, int, int, int]:
        """Bytes to store, label, height, width of an image.

        Raises:
            BadImage: it cannot be decoded.
        """
        if self.format == "keep":
            data, label = source.encoded(index)
            image = decode_image(data, source.file_name(index), source.channels, source.max_pixels)
            return data, label, image.height, image.width
        picture, label = source[index]
        if isinstance(picture, Tensor):
            return self._of_tensor(picture), label, *picture.shape[1:]
        picture = self._shrunk(picture)
        if self.format == "raw":
            return np.asarray(picture).tobytes(), label, picture.height, picture.width
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=self.quality, comment=b"")
        return buffer.getvalue(), label, picture.height, picture.width

    def _of_tensor(self, image: Tensor) -> bytes:
        if self.format != "raw" or self.short_side:
            raise BadInput(
                f"images of {image.shape[0]} channels can be packed as they are alone; give "
                "--format raw --short_side 0"
            )
        return image.permute(1, 2, 0).contiguous().numpy().tobytes()

    def _shrunk(self, image: Image.Image) -> Image.Image:
        shortest = min(image.size)
        if not 0 < self.short_side < shortest:
            return image
        width, height = (
            max(self.short_side, round(side * self.short_side / shortest)) for side in image.size
        )
        return image.resize((width, height), Image.Resampling.BICUBIC)


def pack(
    source: Source,
    root: Path,
    recipe: Recipe,
    described: dict[str, Any],
    *,
    num_workers: int,
    max_bad_images: int,
) -> dict[str, Any]:
    """Pack a split into a folder, or go on where an earlier start was cut off.

    The files are the same for any number of workers and starts. Images that cannot be decoded are
    left out and listed in bad_images.txt.

    Args:
        root: DIR/train or DIR/val.
        described: where the images came from; part of what must be the same to go on.
        num_workers: processes that pack; 0: this one.
        max_bad_images: more end it.

    Returns:
        the manifest.

    Raises:
        BadInput: the folder holds another packing.
        RunFailed: what the operating system refuses, or too many bad images; whole shards stay.
    """
    count = min(MOST, max(FEWEST, -(-len(source) // SHARDS)))
    number = -(-len(source) // count)
    settings = {**described, **asdict(recipe), "images": len(source), "images_per_shard": count}
    settings |= {"channels": source.channels, "names": names_digest(source), "version": VERSION}
    claim(root, settings)
    sweep(root)
    with reading(root):
        if (root / MANIFEST).is_file() and all((root / name).is_file() for name in TABLES):
            about = read_manifest(root)
            if all((root / shard["file"]).is_file() for shard in about["shards"]):
                return about
    with suppress(BadImage):
        recipe(source, 0)  # what no image of this set can be is said before any process starts
    kept = [shard for shard in range(number) if read_part(root, shard) is not None]
    loader = Loader(
        Shards(source, root, recipe, count),
        collate=None,
        batch_size=None,
        sampler=sorted(set(range(number)) - set(kept)),
        num_workers=num_workers,
        prefetch_factor=1 if num_workers else None,
    )
    bad = sum(len(read_whole_part(root, shard)["bad"]) for shard in kept)
    with Progress(number, len(kept), show=True, unit="shard") as bar:
        check_bad(root, bad, max_bad_images)
        for found, fault in loader:
            if fault:
                raise RunFailed(
                    f"{fault}; {bar.n} of {number} shards are whole and stay: mend that, and the "
                    "same command goes on with the others"
                )
            bad += found
            bar.update()
            check_bad(root, bad, max_bad_images)
    return finish(source, root, settings, number)


def names_digest(source: Source) -> str:
    """SHA-256 over the names of all images, in order: whether it is still the same set."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(os.fsencode(source.file_name(index)) + b"\0")
    return digest.hexdigest()


def claim(root: Path, settings: dict[str, Any]) -> None:
    """Write down what is packed into a folder, or see that it is the same as before.

    Raises:
        BadInput: it is another, or the folder holds other things, or cannot be made.
    """
    path = root / SETTINGS
    try:
        root.mkdir(parents=True, exist_ok=True)
        found = path.read_text() if path.is_file() else None
        if found is None:
            if any(not path.name.startswith(".") for path in root.iterdir()):
                raise BadInput(
                    f"{root} holds other files and no {SETTINGS}; give an empty --output_dir"
                )
            with open_whole(path) as file:
                file.write(json.dumps(settings, indent=1).encode())
            return
        before = json.loads(found)
        if not isinstance(before, dict):
            raise ValueError(f"it holds a {type(before).__name__}, expected an object")
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        what = path if isinstance(error, ValueError) else root
        raise BadInput(f"cannot use {what}: {error}; give another --output_dir") from error
    changed = [
        f"{key}: was {before.get(key)}, is {settings.get(key)}"
        for key in sorted({*before, *settings})
        if before.get(key) != settings.get(key)
    ]
    if changed:
        raise BadInput(
            f"{root} holds another packing ({'; '.join(changed)}); give the same flags and images "
            "to go on with it, or another --output_dir"
        )


def check_bad(root: Path, bad: int, limit: int) -> None:
    """Raise RunFailed for too many bad images, with their list."""
    if bad > limit:
        with writing(root / BAD_IMAGES):
            write_bad(root)
        raise RunFailed(
            f"{counted(bad, 'image')} cannot be decoded, more than --max_bad_images {limit}; they "
            f"are listed in {root / BAD_IMAGES}"
        )


# ---- Shards ------------------------------------------------------------------------------------


def part_file(root: Path, shard: int) -> Path:
    """What is known of a shard until all are there; its presence says that the shard is whole."""
    return root / f"{shard_name(shard)}.json"


def load_part(root: Path, shard: int) -> dict[str, Any]:
    """The part of a shard that is whole.

    Raises:
        OSError, ValueError: it is not there, damaged, or the shard has another length.
    """
    part = opened(part_file(root, shard).read_bytes(), must=True)
    size = (root / shard_name(shard)).stat().st_size
    if size != part["bytes"]:
        raise ValueError(f"{shard_name(shard)} holds {size:,} bytes, expected {part['bytes']:,}")
    return part


def read_part(root: Path, shard: int) -> dict[str, Any] | None:
    """The part of a shard that is whole, None for others."""
    try:
        return load_part(root, shard)
    except (OSError, ValueError):  # one of an older version has no checksum: packed once more
        return None


def read_whole_part(root: Path, shard: int) -> dict[str, Any]:
    """The part of a shard that was whole a moment ago."""
    try:
        return load_part(root, shard)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunFailed(
            f"cannot read {part_file(root, shard)} any more: {reason}; run the same command again"
        ) from error


class Shards(Dataset):
    """Item k packs shard k: the k-th `count` images. It gives the bad ones' count and a fault."""

    def __init__(self, source: Source, root: Path, recipe: Recipe, count: int) -> None:
        self.source, self.root, self.recipe, self.count = source, root, recipe, count

    def __getitem__(self, shard: int) -> tuple[int, str]:
        torch.set_num_threads(1)
        take()  # what was noted before is not this shard's
        records: list[tuple[int, ...]] = []
        names, bad, start = [], [], 0
        digest = hashlib.sha256()
        path = self.root / shard_name(shard)
        first = shard * self.count
        try:
            with open_whole(path) as file:
                for index in range(first, min(first + self.count, len(self.source))):
                    try:
                        data, label, height, width = self.recipe(self.source, index)
                    except BadImage as error:
                        bad.append(f"{error.path}: {error.reason}")
                        continue
                    except OSError as error:
                        raise RunFailed(
                            f"cannot read {self.source.file_name(index)}: "
                            f"{error.strerror or error}; mend that, and the same command goes on"
                        ) from error
                    file.write(data)
                    digest.update(data)
                    crc = zlib.crc32(data)
                    records.append((shard, start, len(data), crc, label, height, width))
                    names.append(self.source.file_name(index))
                    start += len(data)
            part = {"bytes": start, "sha256": digest.hexdigest(), "bad": bad}
            part |= {"records": records, "names": names}
            part["changed"] = {kind.name: found for kind, found in take().items()}
            with open_whole(part_file(self.root, shard)) as file:
                file.write(sealed(part))
        except OSError as error:
            # Returned, for the loader takes what a data set raises for a fault of reading.
            return 0, f"cannot write {path}: {error.strerror or error}"
        return len(bad), ""


def finish(source: Source, root: Path, settings: dict[str, Any], number: int) -> dict[str, Any]:
    """Join the parts of all shards into the tables, and write the manifest last."""
    records, shards = [], []
    lines: list[str] = []
    changed: Found = {}
    for shard in range(number):
        part = read_whole_part(root, shard)
        found = {Conversion[name]: tuple(pair) for name, pair in part["changed"].items()}
        merge(changed, found)
        records.append(np.array([tuple(record) for record in part["records"]], RECORD))
        lines += part["names"]
        name = shard_name(shard)
        shards.append({"file": name, "bytes": part["bytes"], "sha256": part["sha256"]})
    if not lines:
        with writing(root / BAD_IMAGES):
            write_bad(root)
        first = read_whole_part(root, 0)["bad"][0]
        raise RunFailed(
            f"none of the {len(source)} images of {source.name} can be decoded; the first: {first}"
        )
    names = Names.of(relative(lines))
    tables = {RECORDS: np.concatenate(records), NAMES: names.data, NAME_ENDS: names.ends}
    try:
        for name, table in tables.items():
            with open_whole(root / name) as file:
                np.save(file, table, allow_pickle=False)
        about = {
            "version": VERSION, "name": source.name, "format": settings["format"],
            "images": len(lines), "channels": source.channels, "mean": source.mean,
            "std": source.std, "eval_margin": source.eval_margin, "labelled": source.labelled,
            "classes": source.classes, "settings": settings, "shards": shards,
            "tables": {name: checksum(root / name) for name in tables},
        }  # fmt: skip
        write_bad(root)
        with open_whole(root / MANIFEST) as file:
            file.write(sealed(about, indent=1))
    except OSError as error:
        raise RunFailed(
            f"cannot write to {root}: {error.strerror}; the shards are whole and stay: make room, "
            "or mend that, and the same command goes on"
        ) from error
    for line in describe(changed):
        say(line)
    return about


def relative(names: list[str]) -> list[str]:
    """Names without the folder that all of them share."""
    try:
        folder = os.path.commonpath([os.path.dirname(name) for name in names])
    except ValueError:  # some are relative
        return names
    return [name[len(folder) :].lstrip("/") for name in names] if folder else names


def write_bad(root: Path) -> None:
    """List the images that were left out so far; no file where there are none."""
    lines: list[str] = []
    for path in sorted(root.glob("shard-*.json")):
        with suppress(ValueError):  # damaged, and packed anew when its turn comes
            lines += opened(path.read_bytes(), must=True)["bad"]
    if lines:
        with open_whole(root / BAD_IMAGES) as file:
            file.write("".join(f"{visible_line(line)}\n" for line in lines).encode())


def verify(root: Path) -> tuple[int, bool]:
    """Compare every byte of a packed split with its checksums.

    Returns:
        how many images it holds, and whether its index has a checksum too.

    Raises:
        BadInput: with the names of the damaged files.
    """
    about = read_manifest(root)
    check_files(root, about)
    check_tables(root, about)
    damaged = []
    with Progress(len(about["shards"]), show=True, unit="shard") as bar:
        for shard in about["shards"]:
            if checksum(root / shard["file"]) != shard["sha256"]:
                damaged.append(str(root / shard["file"]))
            bar.update()
    if damaged:
        raise BadInput(
            f"damaged, their checksums are others: {', '.join(damaged)}; delete them and run the "
            "main_pack.py command again"
        )
    return int(about["images"]), CHECKSUM in about
