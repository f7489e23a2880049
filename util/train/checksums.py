"""What a file of weights says of its own bytes, and whether it is true.

Ours end in a zip comment with the SHA-256 of every byte before it. A torch file of another program
is a zip archive with a CRC-32 of each member, which torch itself never reads. Pickles of before
torch 1.6 and the tensors of safetensors have no checksum; its header is checked by its own library.
"""

import hashlib
import zipfile
from pathlib import Path
from typing import BinaryIO

MAGIC = b"mmae-sha256:"
COMMENT = len(MAGIC) + 64
TAIL = 1 << 16  # bytes at the end in which a checksum that was moved is looked for
CHUNK = 1 << 22  # bytes read at once


class Signed:
    """A write-only file that replaces the empty comment of the zip written to it by a digest."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.held = file, hashlib.sha256(), b""

    def write(self, data: bytes) -> int:
        """Write all but the last two bytes so far: at the end they are the comment's length."""
        chunk = self.held + bytes(data)
        self._put(chunk[:-2])
        self.held = chunk[-2:]
        return len(data)

    def _put(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)

    def flush(self) -> None:
        """Part of the file protocol; the real flush comes with the rename."""

    def sign(self) -> None:
        """Close the archive: the comment's length, then the comment."""
        assert self.held == b"\0\0", "torch.save left a zip comment of its own"
        self._put(COMMENT.to_bytes(2, "little"))
        self.file.write(MAGIC + self.digest.hexdigest().encode())


def verify(path: Path) -> str | None:
    """None if the file's own checksum holds, else what is wrong; a foreign file has none."""
    digest = hashlib.sha256()
    try:
        if not path.is_file():  # opening a named pipe would wait for its writer
            return f"it {name_kind(path)}"
        left = path.stat().st_size - COMMENT
        with path.open("rb") as file:
            while left > 0:
                chunk = file.read(min(left, CHUNK))
                if not chunk:
                    return "it became shorter while it was read"
                digest.update(chunk)
                left -= len(chunk)
            comment = file.read()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not comment.startswith(MAGIC):
        return "it has no checksum of ours at its end (cut short, or not written by this program)"
    if comment[len(MAGIC) :] != digest.hexdigest().encode():
        return "its checksum does not match (a damaged file)"
    return None


def name_kind(path: Path) -> str:
    """What is at a path that is not a regular file, for people."""
    try:
        if path.is_dir():
            return "is a folder"
        if path.exists():
            return "is not a regular file"
        return "is a link to nothing" if path.is_symlink() else "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def check_bytes(path: Path) -> tuple[bool, str | None]:
    """Read a file of weights once, in pieces, and compare it with the checksums that it has.

    Returns:
        whether a checksum of ours is at its end; and what is wrong, None: nothing that is known.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(path.stat().st_size - TAIL, 0))
        tail = file.read()
    if tail[-COMMENT:].startswith(MAGIC):
        return True, verify(path)
    if MAGIC in tail:
        return False, "bytes were added after the checksum at its end, or some of it is missing"
    return False, zip_fault(path) if start == b"PK\3\4" else None


def zip_fault(path: Path) -> str | None:
    """What is wrong with a zip archive of stored members, by their CRC-32; None: nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.file_size]
            # torch.serialization.set_crc32_options(False) leaves every one of them 0.
            if not any(member.CRC for member in members):
                return None
            for member in members:
                if member.compress_size != member.file_size:
                    return f"two sizes of {member.filename} (a damaged file)"
                with archive.open(member) as content:  # raises at its end if the CRC is another
                    while content.read(CHUNK):
                        pass
    except OSError:
        raise
    except Exception as error:  # zipfile raises whatever broken bytes lead it to
        return f"{' '.join(str(error).split())[:160]} (a damaged file)"
    return None
