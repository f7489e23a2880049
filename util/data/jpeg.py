"""Files to uint8 tensors: JPEG by torchvision where it gives Pillow's picture, Pillow elsewhere.

Both use libjpeg; what this saves is Pillow's four bytes per pixel and the copies around them, and
resampling then has its vectorised code for three bytes per pixel at hand.
"""

import struct
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data.images import (
    decode_image,
    raising_bad_image,
    read_image,
)
from util.data.pixel_limits import PathLike, open_at_once, pixel_limit
from util.errors import BadInput

Data = bytes | bytearray | memoryview

START, END = b"\xff\xd8\xff", b"\xff\xd9"
SCAN = 0xDA
# Baseline, extended and progressive Huffman; lossless, hierarchical and arithmetic ones are rare.
FRAMES = {0xC0, 0xC1, 0xC2}
# Table or parameter segments that say nothing of size, colour or orientation.
PASSED_OVER = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}
EXIF, XMP, SEVERAL_PICTURES = b"Exif\0\0", b"http://ns.adobe.com/xap/", b"MPF\0"
ORIENTATION, SHORT = 0x0112, 3  # TIFF 6.0, section 8; Exif 2.3, section 4.6
READ_MODES = {1: "GRAY", 3: "RGB"}


@dataclass(frozen=True)
class Header:
    """What a JPEG says before its first scan.

    Attributes:
        pixels: width times height.
        components: 1 or 3.
        orientation: EXIF's, 1 to 8; 1 is upright.
        scan: where the bytes of the first scan begin.
    """

    pixels: int
    components: int
    orientation: int
    scan: int


def read_pixels(path: PathLike, channels: int, *, max_pixels: int | None = None) -> Tensor:
    """`read_image` as uint8 [C, H, W], channels innermost in memory; it raises the same.

    Pixels are Pillow's. The gray of a colour JPEG it computes from RGB, and so it is asked for it:
    the file's own luma differs where a colour was clipped.
    """
    with raising_bad_image(path), open_at_once(path, max_pixels) as file:
        data = bytearray(file.read(len(START)))
        if data == START:  # else not worth reading here, or endless
            data += file.read()
    if data[:3] == START:
        return decode_pixels(data, path, channels, max_pixels)
    return read_as_tensor(path, channels, max_pixels)


def read_as_tensor(path: PathLike, channels: int, max_pixels: int | None = None) -> Tensor:
    """`read_image` as a tensor."""
    return as_pixels(read_image(path, channels, max_pixels=max_pixels))


def decode_pixels(
    data: Data, name: PathLike, channels: int, max_pixels: int | None = None
) -> Tensor:
    """`read_pixels` of a file's contents, which may be in writable memory or not.

    Args:
        name: the file's, for the message.
        max_pixels: see `read_image`.
    """
    header = plain_header(data)
    if header and header.pixels <= pixel_limit(max_pixels) and channels >= header.components:
        try:
            image = decode_jpeg(data, channels)
        except RuntimeError:
            pass  # Pillow finds a way, or the words for what is wrong
        else:
            return upright(image, header.orientation)
    return as_pixels(decode_image(data, name, channels, max_pixels))


def decode_jpeg(data: Data, channels: int) -> Tensor:
    """By torchvision, which gives [C, H, W] with the channels innermost in memory.

    Raises:
        RuntimeError: it cannot.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:  # torchvision 0.29 announces that it will go
        raise BadInput(f"this torchvision decodes no images ({error}); give --decode pil") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        encoded = torch.from_numpy(np.frombuffer(data, np.uint8))
        return decode_jpeg(encoded, getattr(ImageReadMode, READ_MODES[channels]))


def as_pixels(image: Image.Image) -> Tensor:
    """An L or RGB image as uint8 [C, H, W], channels innermost in memory."""
    array = np.array(image)  # a copy: what Pillow lends is read-only
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def upright(image: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation: [C, H, W] to the same or [C, W, H], channels innermost."""
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.transpose(1, 2)
    sides = {2: [2], 3: [1, 2], 4: [1], 5: [], 6: [2], 7: [1, 2], 8: [1]}[orientation]
    return image.flip(sides).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def plain_header(data: Data) -> Header | None:
    """The header of a JPEG that torchvision decodes as Pillow does; None for any other.

    Plain is: 8 bits, gray or three colours, Huffman coded, one picture, an end-of-image marker
    behind its start, and an orientation that is written as the standard has it.
    """
    try:
        return _walk(data)
    except (IndexError, struct.error):  # it ends in its header
        return None


def _walk(data: Data) -> Header | None:
    at, pixels, components, orientation = 2, 0, 0, None
    while True:
        if data[at] != 0xFF:
            return None
        kind, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        body = at + 4
        at += 2 + length
        if kind == SCAN:
            # Copies whose tail was never written have none; a thumbnail in the header has its own.
            whole = bytes(data[-2:]) == END or END in bytes(data[at:])
            return Header(pixels, components, orientation or 1, at) if pixels and whole else None
        if kind in FRAMES:
            if pixels:
                return None
            bits, height, width, components = struct.unpack_from(">BHHB", data, body)
            if bits != 8 or components not in (1, 3):
                return None
            pixels = height * width
        elif kind not in PASSED_OVER or length < 2:
            return None
        elif kind == 0xE1:
            segment = bytes(data[body:at])
            if segment.startswith(EXIF):
                if orientation is not None:
                    return None
                orientation = exif_orientation(segment[len(EXIF) :])
                if orientation is None:
                    return None
            elif b"Orientation" in segment:  # XMP, which Pillow asks where EXIF says nothing
                return None
        elif kind == 0xE2 and bytes(data[body : body + 4]) == SEVERAL_PICTURES:
            return None


def exif_orientation(tiff: bytes) -> int | None:
    """Orientation by an EXIF block; 1 where it says nothing, None where it is odd."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == ORIENTATION:
            return value if kind == SHORT and number == 1 and 1 <= value <= 8 else None
    return 1
