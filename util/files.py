"""Files appear whole or not at all: written under a temporary name, synced, renamed.

A temporary name is random and opened for writing only by whoever made it, so two writers never
meet in one file. Its writer holds a lock on it as long as it lives: `sweep` removes what killed
writers left, and nothing else.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from util.errors import BadInput, CannotWrite

if TYPE_CHECKING:
    from PIL import Image

# .NAME.16 hex digits.mmae-tmp; NAME may be cut.
OURS = re.compile(r"\..*\.[0-9a-f]{16}\.mmae-tmp", re.DOTALL)
# What earlier versions left: named by process, or not at all, and never locked.
EARLIER = re.compile(
    r"\.(checkpoint-(\d+|last|best)(-[a-z]+)?\.pth|(config|bad_images)(-[a-z]+)?\.(yaml|txt)"
    r"|result\.json|nonfinite-step\d+-rank\d+\.json|epoch-\d+\.png|iteration-\d+\.png)\.\d+\.tmp"
    r"|\.(shard-\d{5}\.bin|records\.npy|names\.npy)\S*-[a-z0-9_]{8}|\.probe\.\d+|\.(features|labels)-(train|val)\.npy\.tmp"
)
DAY = 24 * 3600.0
# Some file systems do not sync folders, some nothing; the rename is still atomic there.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP)
# And some do not lock.
NO_LOCKS = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF)


# ---- Writing -------------------------------------------------------------------------------------


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the name `path` when the block ends without an exception.

    Raises:
        OSError: it cannot be written; what was at `path` is as it was.
    """
    file, temporary = create_temporary(path)
    try:
        with file:
            yield file
            file.flush()
            sync(file.fileno())
            # Still open, and so still locked.
            os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def build_whole(path: Path) -> Iterator[Path]:
    """A place for a file or folder that a library writes by name; moved to `path` at the end.

    The place has the name of `path`, in a temporary folder beside it.

    Raises:
        OSError: it cannot be written, or a folder is at `path`, which then is as it was.
    """
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        with locked_folder(temporary):
            place = temporary / path.name
            yield place
            for part in (place, *place.rglob("*")):
                sync_folder(part)  # files as well: a file opened for reading can be synced
            os.replace(place, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all.

    Raises:
        CannotWrite: see `open_whole`.
    """
    with writing(path), open_whole(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text, UTF-8; of a name that is no UTF-8 the bytes are written out."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def link(source: Path, path: Path) -> None:
    """A second name for a file on disk: a hard link, or a copy where there are no links.

    Raises:
        CannotWrite: see `open_whole`.
    """
    temporary = temporary_name(path)
    with writing(path):
        try:
            os.link(source, temporary)
        except OSError:  # no links here; if it is something else, the copy fails of it too
            with source.open("rb") as content, open_whole(path) as file:
                shutil.copyfileobj(content, file)
            return
        try:
            os.replace(temporary, path)
        finally:
            # Renaming one name of a file to another of its names does nothing and leaves both.
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal inside the block into a `CannotWrite` of `path`."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal inside the block into a `BadInput` of `path`."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def at_start() -> Iterator[None]:
    """What cannot be written when a command starts is bad input: nothing was done yet."""
    try:
        yield
    except CannotWrite as error:
        raise BadInput(str(error)) from error


def check_folder(folder: Path) -> None:
    """Make the folder, and find out now rather than after an epoch whether it can be written.

    Raises:
        BadInput: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file, temporary = create_temporary(folder / "probe")
        with file:  # locked until its name is gone: the other processes sweep the folder too
            temporary.unlink()
    except OSError as error:
        raise BadInput(f"cannot write to folder {folder}: {error.strerror}") from None


class AppendedFile:
    """A file that grows by whole records, each on its way to the disk when `write` returns.

    Nothing is kept in a buffer, so nothing is left to fail when it is closed.

    Args:
        path: made if it is not there; `new`: it must not be.

    Raises:
        OSError: it cannot be opened, or written.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.file = open(  # noqa: SIM115  # closed by `close`
            path, "xb" if new else "ab", buffering=0, opener=_without_waiting
        )

    def write(self, data: bytes) -> None:
        """Append a record: a disk that gets full takes a part of it, and refuses the rest."""
        left = memoryview(data)
        while left:
            left = left[self.file.write(left) :]

    def size(self) -> int:
        """Bytes so far."""
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        """Close it."""
        self.file.close()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)  # a named pipe would wait for its reader


# ---- Temporary names -----------------------------------------------------------------------------


def temporary_name(path: Path) -> Path:
    """A new name beside `path` that nobody else has or will have."""
    return path.with_name(f".{path.name[-40:]}.{secrets.token_hex(8)}.mmae-tmp")


def create_temporary(path: Path) -> tuple[BinaryIO, Path]:
    """A new, empty, locked file beside `path`: it, and its name.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        temporary = temporary_name(path)
        file = temporary.open("xb")
        try:
            with contextlib.suppress(OSError):  # where there are no locks, age decides
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return file, temporary
        except OSError:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        file.close()  # swept between the two calls


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a temporary folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sweep(folder: Path, *, owned: bool = False) -> int:
    """Remove what killed writers left in a folder; sub-folders are not searched.

    Args:
        owned: nobody else writes to the folder now. Otherwise leftovers that cannot be locked
            (earlier versions', or on a file system without locks) are removed a day later.

    Returns:
        how many were removed.
    """
    removed = 0
    with contextlib.suppress(OSError):  # what cannot be listed or removed is no hindrance
        for name in os.listdir(folder):
            if OURS.fullmatch(name) or EARLIER.fullmatch(name):
                with contextlib.suppress(OSError):
                    removed += remove_left(folder / name, owned)
    return removed


def remove_left(path: Path, owned: bool) -> bool:
    """Remove one leftover, unless its writer lives; whether it was removed.

    Raises:
        OSError: it is gone already, or cannot be removed.
    """
    kind = os.O_RDONLY if path.is_dir() else os.O_RDWR
    handle = os.open(path, kind | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            known_dead = OURS.fullmatch(path.name) is not None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                return False  # its writer lives
            known_dead = False
        if not (known_dead or owned or time.time() - os.fstat(handle).st_mtime > DAY):
            return False
        # Under the lock: whoever has just made it sees that it is gone, and makes another.
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        return True
    finally:
        os.close(handle)


# ---- Syncing -------------------------------------------------------------------------------------


def sync(handle: int) -> None:
    """Wait until a file is on the disk; where the file system cannot sync, go on.

    Raises:
        OSError: it did not get there.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Make a rename in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def save_png(path: str | os.PathLike[str], image: "Image.Image") -> Path:
    """Write a PNG file, whole or not at all, making its folder.

    Raises:
        CannotWrite: the file cannot be written there.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_whole(path) as file:
            image.save(file, format="PNG")
    return path
