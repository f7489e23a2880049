"""Which file names are images, and which of their formats can be decoded here."""

import functools
import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterable

from PIL import features

from util.errors import needs

# torchvision's own (`IMG_EXTENSIONS`) come first.
FORMATS_BY_ENDING = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".ppm": "PPM", ".bmp": "BMP", ".pgm": "PPM",
    ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
    ".jpe": "JPEG", ".jfif": "JPEG", ".mpo": "JPEG", ".gif": "GIF", ".pbm": "PPM", ".pnm": "PPM",
    ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".j2c": "JPEG2000", ".jpc": "JPEG2000",
    ".jpf": "JPEG2000", ".jpx": "JPEG2000", ".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF",
}  # fmt: skip
# What Pillow may have been built without, by its name for the library.
LIBRARIES = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
# Images that nothing here decodes: raw files of cameras, drawings, layers, scans.
NEVER = (
    ".arw", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".jxl", ".nef", ".orf", ".psd", ".raf", ".rw2",
    ".svg", ".tga",
)  # fmt: skip
# Folders that systems and archives leave behind; what they hold are copies and thumbnails.
SYSTEM_FOLDERS = {
    "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's images or classes."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def decodes(kind: str) -> bool:
    """Whether a format can be read here: Pillow's name for it."""
    if kind == "HEIF":
        return importlib.util.find_spec("pillow_heif") is not None
    if kind not in LIBRARIES:
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow does not know the library's name
        return bool(features.check(LIBRARIES[kind]))


def readable_endings() -> tuple[str, ...]:
    """Endings of the files that are taken, in lower case with their dot."""
    return tuple(ending for ending, kind in FORMATS_BY_ENDING.items() if decodes(kind))


def unread_endings() -> tuple[str, ...]:
    """Endings of images that are left out, and counted: there is no decoder."""
    lacking = (ending for ending, kind in FORMATS_BY_ENDING.items() if not decodes(kind))
    return (*lacking, *NEVER)


@functools.cache
def register_heif() -> None:
    """Teach Pillow the format HEIF, in this process.

    Raises:
        BadInput: the package is not installed.
    """
    needs("pillow_heif", "pillow-heif").register_heif_opener()


def how_to_read(ending: str) -> str:
    """What a user can do about an image that is left out."""
    kind = FORMATS_BY_ENDING.get(ending)
    if kind is None:
        return "save them as JPEG or PNG"
    return "pip install pillow-heif" if kind == "HEIF" else "pip install --upgrade pillow"


def count_unread(names: Iterable[str]) -> list[str]:
    """Of files without a decoder, a phrase for each way to mend that."""
    endings = Counter("." + name.rpartition(".")[2].lower() for name in names)
    ways: dict[str, list[str]] = {}
    for ending, count in endings.most_common():
        ways.setdefault(how_to_read(ending), []).append(f"{count:,} {ending}")
    return [f"{', '.join(counts)}: no decoder; {way}" for way, counts in ways.items()]
