"""The files of an image folder, in numpy arrays: listed once, then read from a cache.

The listing of class folders is torchvision's (`ImageFolder`): the same files, classes and order,
but for hidden names, which are no images and no classes, and for more endings.
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

from util.console import counted
from util.data.images import PathLike
from util.endings import is_hidden, readable_endings, unread_endings
from util.errors import BadInput
from util.files import open_whole, sweep
from util.progress import say

# Part of the cache's name: raise it with any change of what is listed or how it is stored.
VERSION = 2
# Coarsest clock of a file system's folders (FAT's); a later change may bear the same time.
CLOCK_NS = 2_000_000_000
DIGEST = hashlib.sha256
# The names of a `Listing` that are kept as they are.
STORED = ("files", "loose", "hidden", "unread")


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
    """Files by class. Names are paths relative to the folder.

    Attributes:
        files: the images in class folders.
        labels: int32 [N], indices into `classes`.
        classes: names of the class folders, sorted; some may hold no image.
        loose: images directly in the folder, which are of no class; sorted.
        hidden: images left out for their name or that of a folder around them.
        unread: images left out since nothing here decodes them.
    """

    files: Names
    labels: np.ndarray
    classes: list[str]
    loose: Names
    hidden: Names
    unread: Names


def list_images(root: PathLike) -> Listing:
    """The images of ROOT/<class>/**, links followed, in torchvision's order; and those of ROOT/*.

    Read from a cache in $MMAE_CACHE or ~/.cache/mmae, as long as no folder under root has changed
    since it was written: a thousand questions to the file system instead of a million. A cache
    that is damaged or cannot be written is said and otherwise does not matter.

    Raises:
        BadInput: no folder, or one that cannot be read or that contains itself by a link.
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
    return listing


# ---- Scanning ----------------------------------------------------------------------------------


class Scan:
    """One pass over a folder.

    Attributes:
        stamps: when each folder last changed, by its path relative to root.
        hidden, unread: as in `Listing`.
    """

    def __init__(self, root: PathLike) -> None:
        self.root = root
        self.stamps: dict[str, int] = {}
        self.hidden: list[str] = []
        self.unread: list[str] = []
        self.readable, self.lacking = readable_endings(), unread_endings()
        self.images = self.readable + self.lacking

    def look(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the sub-folders and of the images in a folder; what is left out is noted.

        Args:
            folder: its path relative to root.
        """
        folders, images = [], []
        inside = f"{folder}/" if folder else ""
        with os.scandir(os.path.join(self.root, folder)) as entries:
            for entry in entries:
                name, ending = entry.name, entry.name.lower()
                if is_folder(entry):
                    if not is_hidden(name):
                        folders.append(name)
                    elif not entry.is_symlink():
                        self.look_into_hidden(inside + name)
                elif is_hidden(name):
                    if ending.endswith(self.images):
                        self.hidden.append(inside + name)
                elif ending.endswith(self.readable):
                    images.append(name)
                elif ending.endswith(self.lacking):
                    self.unread.append(inside + name)
        return sorted(folders), sorted(images)

    def look_into_hidden(self, folder: str) -> None:
        """Note the images below a hidden folder; what cannot be read there does not matter.

        Of its folders only those with images are watched for changes: .git changes all the time.
        """
        for path, _, names in os.walk(os.path.join(self.root, folder)):
            images = [name for name in names if name.lower().endswith(self.images)]
            if images:
                relative = os.path.relpath(path, self.root)
                self.stamps[relative] = os.stat(path).st_mtime_ns
                self.hidden += [f"{relative}/{name}" for name in images]

    def walk(self, top: str) -> dict[str, list[str]]:
        """The names of the images in each folder from `top` down, by its path relative to root.

        Raises what `scan` raises.
        """
        found: dict[str, list[str]] = {}
        waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(top, ())]
        while waiting:
            folder, above = waiting.pop()
            path = os.path.join(self.root, folder)
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                raise BadInput(f"{path} is a link to a folder that contains it; remove the link")
            # Before it is listed: what changes meanwhile then counts as changed since.
            self.stamps[folder] = status.st_mtime_ns
            folders, found[folder] = self.look(folder)
            waiting += [(f"{folder}/{name}", (*above, identity)) for name in folders]
        return found


def scan(root: PathLike) -> tuple[Listing, dict[str, int]]:
    """List a folder, and when each folder in it last changed, by its path relative to root.

    Raises:
        BadInput: a folder contains itself by a link.
        OSError: a folder is missing or cannot be read.
    """
    here = Scan(root)
    here.stamps[""] = os.stat(root).st_mtime_ns
    classes, loose = here.look("")
    labels = array("i")

    def files() -> Iterator[str]:
        for label, name in enumerate(classes):
            folders = here.walk(name)
            for folder in sorted(folders):
                for file in folders[folder]:
                    labels.append(label)
                    yield f"{folder}/{file}"

    names = Names.of(files())
    left_out = (Names.of(sorted(names)) for names in (here.hidden, here.unread))
    found = Listing(names, np.array(labels, dtype=np.int32), classes, Names.of(loose), *left_out)
    return found, here.stamps


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Links followed; a link that goes in circles is a broken file, as for `os.walk`."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


# ---- Cache -------------------------------------------------------------------------------------


def cache_file(root: PathLike) -> Path:
    """Where the listing of a folder is kept: by its path, and by what can be decoded here."""
    folder = Path(os.environ.get("MMAE_CACHE") or os.path.expanduser("~/.cache/mmae"))
    what = "\0".join((os.path.realpath(root), *readable_endings()))
    name = DIGEST(os.fsencode(what)).hexdigest()[:20]
    return folder / f"listing-{VERSION}-{name}"


def write_cache(cache: Path, listing: Listing, stamps: dict[str, int]) -> None:
    """Keep a listing with its folders' times of change: all of it or nothing."""
    arrays: dict[str, Any] = {"labels": listing.labels, "stamps": np.array(list(stamps.values()))}
    texts = {key: getattr(listing, key) for key in STORED}
    texts |= {"classes": Names.of(listing.classes), "folders": Names.of(stamps)}
    for key, names in texts.items():
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
        count = len(listing.files) + len(listing.loose)
        say(
            f"the listing of {counted(count, 'image')} is not kept, cannot write {cache}: "
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
        texts = {
            key: Names(arrays[f"{key}_data"], arrays[f"{key}_ends"])
            for key in (*STORED, "classes", "folders")
        }
        labels, stamps = arrays["labels"], arrays["stamps"]
    try:
        for folder, stamp in zip(texts.pop("folders"), stamps, strict=True):
            if os.stat(os.path.join(root, folder)).st_mtime_ns != stamp:
                return None
    except OSError:
        return None
    return Listing(labels=labels, classes=list(texts.pop("classes")), **texts)
