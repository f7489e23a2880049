"""How large an image may be: what has more pixels is refused before it is decoded.

A file of a few MB could hold an image of many GB. The limit belongs to the source of the images,
`Source.max_pixels`, and each reader is handed it, so that every loading process has it.
"""

import os
from functools import partial
from typing import BinaryIO

from PIL import Image

PathLike = str | os.PathLike[str]

PILLOWS = 89_478_485  # its default; it refuses twice as many
# 4 bytes each while they are decoded.
MOST_PIXELS = 2 * PILLOWS
# Files are read whole into memory; 8 bytes a pixel (RGBA of 16 bits, uncompressed) fit.
PIXEL_BYTES = 8
RAISE = "--max_pixels N allows more"


def pixel_limit(max_pixels: int | None) -> int:
    """The most pixels of an image: as given, else `MOST_PIXELS`."""
    return MOST_PIXELS if max_pixels is None else max_pixels


def refuse_more(pixels: int, max_pixels: int | None) -> None:
    """See that an image is not too large.

    Raises:
        ValueError: it has more pixels than the limit.
    """
    if pixels > pixel_limit(max_pixels):
        raise ValueError(
            f"an image of {pixels:,} pixels exceeds limit of {pixel_limit(max_pixels):,}; {RAISE}"
        )


def let_pillow_open(max_pixels: int | None) -> None:
    """Have Pillow take what the limit allows, when it opens an image and when it crops one.

    It refuses more than twice of a number of its own, which belongs to the process: set it for each
    image. Below Pillow's default our limit alone counts.
    """
    Image.MAX_IMAGE_PIXELS = max(-(-pixel_limit(max_pixels) // 2), PILLOWS)


def open_at_once(path: PathLike, max_pixels: int | None = None) -> BinaryIO:
    """Open to read; without the flag, opening a named pipe waits for its writer, for ever.

    Raises:
        ValueError: it holds more than `PIXEL_BYTES` for each of the most pixels that an image has.
        OSError: it cannot be opened.
    """
    # Of a limit that was lowered the pixels decide: a small image may be stored in many bytes.
    most = PIXEL_BYTES * max(pixel_limit(max_pixels), MOST_PIXELS)
    return open(path, "rb", opener=partial(_without_waiting, most))


def _without_waiting(most: int, path: str, flags: int) -> int:
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if (size := os.fstat(handle).st_size) > most:
        os.close(handle)
        raise ValueError(f"a file of {size:,} bytes exceeds limit of {most:,}; {RAISE}")
    return handle
