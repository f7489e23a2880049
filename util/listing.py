"""The files of an image folder, in numpy arrays: listed once, then read from a cache.

The listing is torchvision's (`ImageFolder`): the same files, classes and order.
"""

import errno
import hashlib
import io
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.errors import BadInput
from util.files import open_whole, sweep
from util.images import PathLike
from util.logger import say

# Part of the cache's name: raise it with any change of what is listed or how it is stored.
VERSION = 1
# Coarsest clock of a file system's folders (FAT's); a later change may bear the same time.
CLOCK_NS = 2_000_000_000
DIGEST = hashlib.sha256


class Names:
    """Many strings in two arrays: a million python objects would be copied into every worker.

    A forked worker that reads an object writes its reference count, and so copies its page.

    Args:
        data: uint8, the encoded names one after the other.
        ends: int64 [N], where each ends in data.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Those of any iterable, which is read once."""
        data, ends = bytearray(), array("q")
        for name in names:
            data += os.fsencode(name)
            ends.append(len(data))
        return cls(np.array(data), np.array(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.data[start : self.ends[index]].tobytes())


@dataclass(frozen=True)
class Listing:
    """Files by class.

    Attributes:
        files: paths relative to the folder.
        labels: int32 [N], indices into `classes`.
        classes: names of the class folders, sorted.
    """

    files: Names
    labels: np.ndarray
    classes: list[str]


def list_images(root: PathLike) -> Listing:
    """The images of ROOT/<class>/**, links followed, in torchvision's order.

    Read from a cache in $MMAE_CACHE or ~/.cache/mmae, as long as no folder under root has changed
    since it was written: a thousand questions to the file system instead of a million. A cache
    that is damaged or cannot be written is said and otherwise does not matter.

    Raises:
        BadInput: no folder, one that cannot be read or that contains itself by a link, no class
            folders, or some without an image.
    """
    root = Path(root)
    cache = cache_file(root)
    listing = read_cache(cache, root)
    if listing is None:
        started = time.time_ns()
        try:
            listing, stamps = scan(root)
        except OSError as error:
            raise BadInput(f"cannot list {error.filename}: {error.strerror}") from error
        if max(stamps.values()) < started - CLOCK_NS:
            write_cache(cache, listing, stamps)
    present = set(np.unique(listing.labels).tolist())
    empty = [name for label, name in enumerate(listing.classes) if label not in present]
    if empty or not listing.classes:
        problem = f"{root} has no class folders"
        if empty:
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            problem = f"no image in the class folders {', '.join(empty[:5])}{more} of {root}"
        raise BadInput(f"{problem}; expected <class>/*, ending in {', '.join(IMG_EXTENSIONS)}")
    return listing


# ---- Scanning ----------------------------------------------------------------------------------


def scan(root: PathLike) -> tuple[Listing, dict[str, int]]:
    """List a folder, and when each folder in it last changed, by its path relative to root.

    Raises:
        BadInput: a folder contains itself by a link.
        OSError: a folder is missing or cannot be read.
    """
    # Before it is listed: what changes meanwhile then counts as changed since.
    stamps = {"": os.stat(root).st_mtime_ns}
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if is_folder(entry))
    labels = array("i")

    def files() -> Iterator[str]:
        for label, name in enumerate(classes):
            folders = walk(root, name, stamps)
            for folder in sorted(folders):
                for file in sorted(folders[folder]):
                    labels.append(label)
                    yield f"{folder}/{file}"

    names = Names.of(files())
    return Listing(names, np.array(labels, dtype=np.int32), classes), stamps


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Links followed; a link that goes in circles is a broken file, as for `os.walk`."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def walk(root: PathLike, top: str, stamps: dict[str, int]) -> dict[str, list[str]]:
    """The names of the images in each folder from `top` down, by its path relative to root.

    Times of change are added to `stamps`. Raises what `scan` raises.
    """
    found: dict[str, list[str]] = {}
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(top, ())]
    while waiting:
        folder, above = waiting.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise BadInput(f"{path} is a link to a folder that contains it; remove the link")
        stamps[folder] = status.st_mtime_ns
        found[folder] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if is_folder(entry):
                    waiting.append((f"{folder}/{entry.name}", (*above, identity)))
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    found[folder].append(entry.name)
    return found


# ---- Cache -------------------------------------------------------------------------------------


def cache_file(root: PathLike) -> Path:
    """Where the listing of a folder is kept."""
    folder = Path(os.environ.get("MMAE_CACHE") or os.path.expanduser("~/.cache/mmae"))
    name = DIGEST(os.fsencode(os.path.realpath(root))).hexdigest()[:20]
    return folder / f"listing-{VERSION}-{name}"


def write_cache(cache: Path, listing: Listing, stamps: dict[str, int]) -> None:
    """Keep a listing with its folders' times of change: all of it or nothing."""
    arrays: dict[str, Any] = {"labels": listing.labels, "stamps": np.array(list(stamps.values()))}
    texts = {"files": listing.files, "classes": Names.of(listing.classes)}
    for key, names in (texts | {"folders": Names.of(stamps)}).items():
        arrays |= {f"{key}_data": names.data, f"{key}_ends": names.ends}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    content = buffer.getvalue()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        sweep(cache.parent)
        with open_whole(cache) as file:
            file.write(DIGEST(content).digest() + content)
    except OSError as error:
        say(
            f"the listing of {len(listing.files):,} images is not kept, cannot write {cache}: "
            f"{error.strerror}; point MMAE_CACHE at a folder that can be written"
        )


def read_cache(cache: Path, root: PathLike) -> Listing | None:
    """The listing that is kept, None where there is none, it is damaged, or a folder changed."""
    try:
        content = cache.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        say(f"cannot read the listing kept in {cache}: {error.strerror}; listing {root} anew")
        return None
    size = DIGEST().digest_size
    if DIGEST(content[size:]).digest() != content[:size]:
        say(f"the listing kept in {cache} is damaged; listing {root} anew")
        return None
    with np.load(io.BytesIO(content[size:]), allow_pickle=False) as arrays:
        files, classes, folders = (
            Names(arrays[f"{key}_data"], arrays[f"{key}_ends"])
            for key in ("files", "classes", "folders")
        )
        labels, stamps = arrays["labels"], arrays["stamps"]
    try:
        for folder, stamp in zip(folders, stamps, strict=True):
            if os.stat(os.path.join(root, folder)).st_mtime_ns != stamp:
                return None
    except OSError:
        return None
    return Listing(files, labels, list(classes))
