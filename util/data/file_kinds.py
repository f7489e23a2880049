"""What a file is that was taken for weights and is none: named by its first bytes."""

import zipfile
from pathlib import Path

# Bytes of the start that are looked at.
START = 512
# The file's first bytes, and what it then is.
SIGNATURES = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89HDF", "an HDF5 file, which Keras writes"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x1f\x8b", "packed with gzip; unpack it first"),
    (b"7z\xbc\xaf", "packed with 7-Zip; unpack it first"),
    (b"%PDF", "a PDF document"),
)
SCRIPTED = (
    "a TorchScript archive (torch.jit.save), which is a program; where you trust it, save its "
    "weights alone: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as those of safetensors do, whatever its name."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and 8 + length <= path.stat().st_size


def what_it_is(path: Path) -> str | None:
    """What a file is that torch cannot read, for a message; None: it may well be torch's.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(START)
    for signature, what in SIGNATURES:
        if start.startswith(signature):
            return what
    if start.startswith(b"PK\3\4"):
        return kind_of_archive(path)
    return kind_of_text(start)


def kind_of_archive(path: Path) -> str | None:
    """What a zip archive is that torch cannot read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except (zipfile.BadZipFile, ValueError):  # damaged: the caller says how
        return None
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return SCRIPTED
    if "archive_format" in names or any(name.endswith("exported_program.json") for name in names):
        return "a program of torch.export; save its weights alone: torch.save(..state_dict, NEW)"
    if any(name.endswith(".npy") for name in names):
        return "an archive of numpy arrays (.npz)"
    if "data.pkl" not in names:
        return f"a zip archive of {', '.join(archive.namelist()[:3])}; unpack it first"
    return None


def kind_of_text(start: bytes) -> str | None:
    """What kind of text a file is; None: no text."""
    try:
        text = start.decode("utf-8", "strict" if len(start) < START else "ignore").strip()
    except UnicodeDecodeError:
        return None
    if not text or any(ord(char) < 32 and char not in "\n\r\t" for char in text):
        return None
    if text.startswith("version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself; fetch that with git lfs pull"
    if text.lower().startswith(("<!doctype", "<html", "<?xml")):
        return "a web page (a download that asked for something else first?); fetch the file again"
    return f"a text file, which begins {text.splitlines()[0][:60]!r}"
