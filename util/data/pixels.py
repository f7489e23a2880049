"""Pixels of any mode to gray or RGB of 8 bits, and what that does to them."""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms

from util.data.conversions import Conversion

# TIFF 6.0, sections 8, 18 and 20.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
SAMPLES_PER_PIXEL, EXTRA_SAMPLES = 277, 338
ALPHAS = (1, 2)  # of ExtraSamples: premultiplied or not
# Bands of each photometric interpretation: gray (white is 0, black is 0), RGB, palette, mask, CMYK,
# YCbCr, CIELAB.
BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}
PIXI_WITHIN = 1 << 16  # bytes of a file whose boxes are searched for its bits
STRIP = 1 << 22  # pixels that are converted at a time, which bounds the copies of a large image
DIM = 4  # an image whose values stay below this part of white may have fewer bits than its file


def refuse_bands(image: Image.Image) -> None:
    """Refuse a TIFF with bands that no picture shows: Pillow would drop them.

    Raises:
        ValueError: bands beside its colours that are not one of alpha.
    """
    tags = getattr(image, "tag_v2", {})
    bands = tags.get(SAMPLES_PER_PIXEL, 1)
    needed = BANDS.get(tags.get(PHOTOMETRIC, -1), bands)
    extra = tags.get(EXTRA_SAMPLES, ())
    alpha = bands == needed + 1 and extra[:1] and extra[0] in ALPHAS
    if bands > needed and not alpha:
        raise ValueError(
            f"a TIFF of {bands} bands, of which a picture shows {needed} and the others would be "
            f"dropped; save the {needed} that are meant as a file of their own"
        )


def stored_deep(image: Image.Image, file: BinaryIO) -> bool:
    """Whether the colours of an image that is not loaded yet have more than 8 bits in the file.

    Args:
        file: that it was opened from; its position may change where the reader has all of it.
    """
    if image.format in ("AVIF", "HEIF"):
        file.seek(0)
        head = file.read(PIXI_WITHIN)
        # ISO/IEC 23008-12, 6.5.6: version and flags, number of channels, bits of each.
        at = head.find(b"pixi") + 9
        return at > 8 and any(bits > 8 for bits in head[at : at + head[at - 1]])
    tiles = getattr(image, "tile", [])
    if not tiles:
        return False
    details = tiles[0][3] if isinstance(tiles[0][3], tuple) else (tiles[0][3],)
    if tiles[0][0] in ("ppm", "ppm_plain"):
        return details[-1] > 255
    return image.format != "BMP" and bool(details) and ";16" in str(details[0])


def opaque(image: Image.Image, deep: bool) -> tuple[Image.Image, set[Conversion]]:
    """A loaded image in a mode that converts to L and RGB, white where it was transparent.

    Args:
        deep: whether its file has more than 8 bits a channel, see `stored_deep`.

    Returns:
        the image, and what was done to it.
    """
    if image.mode[0] in "IF":
        return _eight_bits(image)
    done = {Conversion.DEEP} if deep else set()
    if deep and _brightest(image) < 256 // DIM:  # Pillow keeps the upper 8 of 16 bits
        done.add(Conversion.DIM)
    if image.mode == "CMYK":
        return image, done | {Conversion.CMYK}
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        shown = ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
        return shown, done | {Conversion.LAB}
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        shown, clear = _on_white(image)
        band = image.format == "TIFF"
        kind = {Conversion.ALPHA_BAND if band else Conversion.TRANSPARENT} if clear else set()
        return shown, done | kind
    return image, done


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(first row, strip) of all of an image, from top to bottom."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _brightest(image: Image.Image) -> int:
    """The largest value of its colours."""
    colours = [name for name in image.getbands() if name not in "Aa"]
    return max(int(image.getchannel(name).getextrema()[1]) for name in colours)  # type: ignore[arg-type]


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image in RGB on white, and whether any of it was transparent."""
    shown, clear = Image.new("RGB", image.size), False
    for top, strip in _strips(image):
        strip.info = image.info  # with its transparent colour
        strip = strip.convert("LA") if strip.mode == "La" else strip
        strip = strip.convert("RGBA")
        clear = clear or int(strip.getchannel("A").getextrema()[0]) < 255  # type: ignore[arg-type]
        white = Image.new("RGBA", strip.size, "white")
        shown.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return shown, clear


def _eight_bits(image: Image.Image) -> tuple[Image.Image, set[Conversion]]:
    """Gray of modes I;16, I and F to mode L, and what was done."""
    tags = getattr(image, "tag_v2", {})
    lowest, highest, odd = _find_range(image)
    done = {Conversion.NOT_FINITE} if odd else set()
    if image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM")):
        low, high = 0.0, 2.0 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
        done.add(Conversion.DEEP)
        if 0 < highest < (high + 1) / DIM:
            done.add(Conversion.DIM)
    elif image.mode == "F" and lowest >= 0 and highest <= 1:
        low, high = 0.0, 1.0
    else:
        low, high = lowest, highest
        done.add(Conversion.STRETCHED)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        low, high = high, low
    clear = image.info.get("transparency")
    levels = Image.new("L", image.size)
    for top, strip in _strips(image):
        values = np.asarray(strip).astype(np.float64)
        gray = _levels(values, low, high)
        if clear is not None and (at := values == clear).any():
            gray[at] = 255
            done.add(Conversion.TRANSPARENT)
        levels.paste(Image.fromarray(gray), (0, top))
    return levels, done


def _find_range(image: Image.Image) -> tuple[float, float, bool]:
    """Smallest and largest finite value, and whether there are NaN or infinite ones."""
    low, high, odd = np.inf, -np.inf, False
    for _, strip in _strips(image):
        values = np.asarray(strip).astype(np.float64)
        finite = values[np.isfinite(values)]
        odd = odd or finite.size < values.size
        low = min(low, finite.min(initial=np.inf))
        high = max(high, finite.max(initial=-np.inf))
    return float(low), float(high), odd


@np.errstate(invalid="ignore")  # NaN and infinity
def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Gray levels uint8 of values, black at low and white at high."""
    share = (values - low) / ((high - low) or 1.0)
    return np.round(255 * np.clip(np.nan_to_num(share, nan=0.0), 0, 1)).astype(np.uint8)
