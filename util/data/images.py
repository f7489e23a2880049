"""What a data set gives: an image and its label by index, and how one file is decoded."""

import errno
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from util.data.conversions import Conversion, note
from util.data.pixel_limits import RAISE, PathLike, let_pillow_open, open_at_once, refuse_more
from util.data.pixels import opaque, refuse_bands, stored_deep
from util.endings import register_heif
from util.errors import BadInput

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODES = {1: "L", 3: "RGB"}
IMAGE_DECODERS = ("torchvision", "pil")

Stats = tuple[float, ...]


def as_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode L or RGB; itself when it is, since a conversion would copy it."""
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


# ---- Decoding ----------------------------------------------------------------------------------

# Pillow goes by the contents of a file and reads some forty formats; an EPS file that is called
# x.jpg would start Ghostscript. These are what a web browser or a scanner writes.
Image.init()
# What it logs is the reason of a `BadImage` too; without a handler each would go to the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())
FORMATS: list[str] = [
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN  # AVIF came late to Pillow
]

# What is wrong with the file; None is what Pillow raises for its contents. Any other (too many open
# files, a stale or lost mount) is wrong with the machine, and must not change which images train.
FILE_FAULTS = {
    None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENXIO, errno.EIO,
}  # fmt: skip
# Major brands of ISO base media files that are HEIF: HEVC, and what may hold it.
HEIF_BRANDS = {
    b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1",
}  # fmt: skip
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF 6.0, section 15
ORIENTATION = 0x0112  # of EXIF, and what brings it upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class BadImage(BadInput):
    """A file that is no image, or not a whole one.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it pickles
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"cannot read the image {self.path}: {self.reason}; replace the file or remove it"


def read_image(
    path: PathLike, channels: int, *, paired: bool = False, max_pixels: int | None = None
) -> Image.Image:
    """Decode one file to mode L or RGB, as a viewer shows it.

    That is: of several frames or pages the first; turned upright by its EXIF orientation; what is
    transparent on white; 16 bits scaled to 8, and 32 bits or floats, which have no white of
    their own, from their darkest to their brightest value (floats within 0..1 as they are). Each
    `Conversion` among these is noted. Embedded colour profiles are not applied, as in every
    ImageNet pipeline.

    JPEG has no checksums: damage inside a file that still has its end decodes to a wrong picture.

    Args:
        paired: a label map belongs to it, so that being turned is noted as well.
        max_pixels: an image of more is refused; None: of more than `MOST_PIXELS`.

    Raises:
        BadImage: missing, unreadable, no image in `FORMATS`, truncated, damaged, of more than
            `max_pixels`, or with bands beside its colours that are no alpha.
        OSError: the machine could not read it (too many open files, a lost mount, ...).
    """
    with raising_bad_image(path), open_at_once(path, max_pixels) as file:
        return _decode(file, path, max_pixels, paired).convert(MODES[channels])


def decode_image(
    data: bytes | bytearray | memoryview,
    name: PathLike,
    channels: int,
    max_pixels: int | None = None,
) -> Image.Image:
    """`read_image` of a file's contents; name is the file's, for the message."""
    with raising_bad_image(name):
        return _decode(io.BytesIO(data), name, max_pixels).convert(MODES[channels])


def read_stored(
    path: PathLike, max_pixels: int | None = None, data: bytes | None = None
) -> Image.Image:
    """Decode one file as it is stored, in its own mode: values count here, not what they look like.

    Pillow stretches gray of 2 and 4 bits to 0..255; here they keep the values of the file.

    Args:
        data: the file's contents, which are then not read.

    Raises as `read_image` does.
    """
    opened = open_at_once(path, max_pixels) if data is None else io.BytesIO(data)
    with raising_bad_image(path), opened as file:
        image = _open(file, max_pixels)
        tiles = getattr(image, "tile", [])  # of an image that is not loaded yet
        stretched = {"L;2": 85, "L;4": 17}.get(tiles[0][3] if tiles else "", 1)
        if getattr(image, "is_animated", False):
            note([Conversion.FIRST_FRAME], os.fspath(path))
        image.load()
        return image if stretched == 1 else image.point(lambda level: level // stretched)


@contextmanager
def raising_bad_image(path: PathLike) -> Iterator[None]:
    """What is raised inside and is the file's fault becomes a `BadImage` of that path."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a library that set it would have us train on gray
    try:
        with warnings.catch_warnings():
            # `_open` has a bound of its own, below which Pillow already warns.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Of metadata that do not matter here, once per image and worker.
            warnings.simplefilter("ignore", UserWarning)
            yield
    # Pillow's parsers raise whatever broken bytes lead them to.
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) not in FILE_FAULTS:
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, Image.DecompressionBombError):
            reason = f"{reason.split(', could')[0]}; {RAISE}"
        raise BadImage(os.fspath(path), reason) from error


def _decode(
    file: BinaryIO, name: PathLike, max_pixels: int | None, paired: bool = False
) -> Image.Image:
    """The picture in a file, upright and opaque, in a mode that converts to L and RGB.

    What was done to it is noted under its name. Raises whatever Pillow does.
    """
    image = _open(file, max_pixels)
    refuse_bands(image)
    pixels_at = file.tell()
    # Before it is loaded: some readers look for the second frame then, and forget the first.
    several, deep = getattr(image, "is_animated", False), stored_deep(image, file)
    image.load()
    if image.format == "JPEG":
        # Where a crash or a broken copy left zeros, the decoder may find pixels in them.
        file.seek(pixels_at)
        if b"\xff\xd9" not in file.read():
            raise ValueError("no end-of-image marker: its tail was never written")
    # Not ImageOps.exif_transpose: it also rewrites the other tags, and stumbles over broken ones.
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    image, done = opaque(image, deep)
    done |= {Conversion.FIRST_FRAME} if several else set()
    done |= {Conversion.TURNED_PAIR} if paired and turn is not None else set()
    note(done, os.fspath(name))
    return image if turn is None else image.transpose(turn)


def _open(file: BinaryIO, max_pixels: int | None) -> Image.Image:
    """The picture in a file, its pixels not read yet. Raises whatever Pillow does."""
    let_pillow_open(max_pixels)
    image = _identified(file)
    tags = getattr(image, "tag_v2", {})
    tile = int(tags.get(TILE_WIDTH, 0)) * int(tags.get(TILE_LENGTH, 0))
    refuse_more(max(image.width * image.height, tile), max_pixels)
    if image.format == "PNG":
        image.verify()  # Pillow's decoder leaves the checksums of the pixels unread
        file.seek(0)
        image = Image.open(file, formats=FORMATS)
        if image.mode == "P" and image.palette is None:
            raise ValueError("a palette image without a palette")
    return image


def _identified(file: BinaryIO) -> Image.Image:
    """What Pillow, or pillow-heif, takes a file for.

    Raises:
        ValueError: for nothing. BadInput: it is HEIF, and pillow-heif is not installed.
    """
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(16)
    box, brand = start[4:8], start[8:12]
    if box == b"ftyp" and brand in HEIF_BRANDS:
        register_heif()  # here, for few need it and it takes a moment
        file.seek(0)
        with suppress(UnidentifiedImageError):
            return Image.open(file, formats=["HEIF"])
    found = f"no image of a known kind, its first bytes are {start!r}"
    if start[:4] in TIFF_STARTS:
        found = "a TIFF of bands or bits that cannot be read; save it as RGB or gray of 8 bits"
    elif box == b"ftyp":
        found = f"no whole image: a file of brand {brand.decode('latin-1')}, cut short or a video"
    raise ValueError(found if start else "the file is empty")
