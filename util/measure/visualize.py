"""Pictures of reconstructions: the panels of an image, sheets of them, PNG files."""

import os
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.console import visible
from util.files import save_png
from util.measure.metrics import mask_pixels
from util.spec import Pair, Shape

Panels = tuple[Tensor, Tensor, Tensor]
KINDS = ("original", "masked", "reconstruction")

MID_GRAY = 128
PANEL_SIDE = 192  # pixels that small images are enlarged to, about
ROWS_IN_ONE_STRIP = 6
FRAMES_SHOWN = 4  # of a clip, evenly spaced
MARGIN, PANEL_GAP, GROUP_GAP, LINE_GAP, TEXT_GAP = 20, 8, 36, 16, 6
TITLE, HEADER, CAPTION, FOOTER = 22, 16, 15, 14  # font sizes
WHITE, BLACK, OUTLINE = (255, 255, 255), (0, 0, 0), (200, 200, 200)

# The font that comes with Pillow draws a box for what is not ASCII, with few exceptions.
IN_FONT = set("©«°±´·»‘’“”…‹›⁄™")
SPELLING = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "ß": "ss", "ø": "o", "æ": "ae"})


def panels(images: Tensor, mask: Tensor, composite: Tensor, patch_size: Shape) -> list[Panels]:
    """What is shown of each image: original, masked (hidden patches mid-gray), reconstruction.

    Args:
        images: uint8 [B, C, *size].
        mask: bool [B, L], True = masked.
        composite: [B, C, *size], gray levels 0..255 (`metrics.compose`), rounded here.
        patch_size: (ph, pw) pixels.

    Returns:
        B triples of uint8 [C, H, W] on the CPU; of a clip, frames of it side by side.
    """
    if images.dtype != torch.uint8 or images.shape != composite.shape:
        given = f"{images.dtype} {tuple(images.shape)} and {tuple(composite.shape)}"
        raise ValueError(f"expected uint8 images and a composite of their shape, not {given}")
    hidden = mask_pixels(mask, tuple(images.shape[2:]), patch_size)
    masked = images.masked_fill(hidden, MID_GRAY)
    restored = composite.detach().float().round().clamp(0, 255).to(torch.uint8)
    three = [film_strip(x.cpu()) for x in (images, masked, restored)]
    return list(zip(*three, strict=True))


def film_strip(images: Tensor) -> Tensor:
    """Frames of clips side by side, at most `FRAMES_SHOWN`: [B, C, T, H, W] to [B, C, H, n*W].

    Images [B, C, H, W] stay as they are.
    """
    if images.ndim == 4:
        return images
    frames = images.shape[2]
    shown = torch.linspace(0, frames - 1, min(frames, FRAMES_SHOWN)).round().long()
    return torch.cat(images[:, :, shown].unbind(dim=2), dim=-1)


def to_picture(image: Tensor) -> Image.Image:
    """A uint8 [C, H, W] tensor as a picture at native size.

    One channel is shown as gray, three as colour. Of other numbers of channels the first three are
    shown, and of two the first: `picture_grid` says so below its pictures.
    """
    if image.dtype != torch.uint8 or image.ndim != 3:
        raise ValueError(f"expected uint8 [C, H, W], not {image.dtype} {tuple(image.shape)}")
    pixels = image.cpu().numpy()
    if len(pixels) < 3:
        return Image.fromarray(np.ascontiguousarray(pixels[0]))
    return Image.fromarray(np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)))


def picture_grid(
    rows: Sequence[Sequence[Tensor]],
    captions: Sequence[str] | None = None,
    *,
    headers: Sequence[str] = KINDS,
    title: str | None = None,
    footer: str | None = None,
    scale: int | None = None,
) -> Image.Image:
    """A sheet of panels, one row per image under column headers; two rows abreast beyond six.

    Args:
        rows: panels of each image, uint8 [C, H, W], as many in every row as there are headers.
        captions: a line below each row, for example file name and PSNR.
        headers: a word above each column, for example "masked 75 %".
        title: above everything.
        footer: below everything, for example what the pictures borrow from the truth.
        scale: every pixel becomes scale x scale ones; None: so that panels are about 192 pixels
            long, never reduced.

    Returns:
        an RGB picture. Long texts are wrapped, never cut.

    Raises:
        ValueError: no rows, or rows, headers and captions that do not fit each other.
    """
    if not rows or any(len(row) != len(headers) for row in rows):
        counts = sorted({len(row) for row in rows})
        raise ValueError(f"expected rows of {len(headers)} panels (the headers), got {counts}")
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"{len(captions)} captions for {len(rows)} rows")
    channels = rows[0][0].shape[0]
    scale = scale or _natural_scale(rows)
    pictures = [[_enlarged(panel, scale) for panel in row] for row in rows]

    abreast = 1 if len(rows) <= ROWS_IN_ONE_STRIP else 2
    cell = _cell_size(pictures, headers)
    group = len(headers) * cell[0] + (len(headers) - 1) * PANEL_GAP
    width = abreast * group + (abreast - 1) * GROUP_GAP
    notes = [footer] if footer else []
    if channels not in (1, 3):
        shown = "first of 2 channels" if channels == 2 else f"first three of {channels} channels"
        notes.append(f"Shown: the {shown}.")

    blocks = [_text_block([title], TITLE, width, LINE_GAP)] if title else []
    header = _spread([_header_block(headers, cell[0], group)] * abreast)
    blocks.append(header)
    lines = [pictures[i : i + abreast] for i in range(0, len(rows), abreast)]
    for number, line in enumerate(lines):
        texts = captions[number * abreast : (number + 1) * abreast] if captions else [""] * abreast
        cells = [_row_block(*pair, cell, group) for pair in zip(line, texts, strict=False)]
        blocks.append(_spread(cells))
    if notes:
        blocks.append(_text_block(notes, FOOTER, width, 0))
    return _stack(blocks, width)


def save_panels(
    folder: str | os.PathLike[str],
    name: str,
    row: Sequence[Tensor],
    kinds: Sequence[str] = KINDS,
) -> list[Path]:
    """Write the panels of one image as `<folder>/<name>-<kind>.png`, pixel for pixel.

    Args:
        folder: made if it is not there.
        name: of the image, without a folder.
        row: uint8 [C, H, W] each.
        kinds: a word for each panel.

    Returns:
        the paths, in the order of the panels.

    Raises:
        BadInput: a file cannot be written there.
    """
    if Path(name).name != name:
        raise ValueError(f"expected a plain file name, not {name!r}")
    return [
        save_png(Path(folder) / f"{name}-{kind}.png", to_picture(panel))
        for kind, panel in zip(kinds, row, strict=True)
    ]


def _natural_scale(rows: Sequence[Sequence[Tensor]]) -> int:
    longest = max(max(panel.shape[1:]) for row in rows for panel in row)
    return max(1, round(PANEL_SIDE / longest))


def _enlarged(panel: Tensor, scale: int) -> Image.Image:
    picture = to_picture(panel).convert("RGB")
    size = picture.width * scale, picture.height * scale
    return picture.resize(size, Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _legible(text: str) -> str:
    """The text in characters that the font has; one that has no plain spelling becomes "?"."""
    plain = ""
    for char in visible(text).translate(SPELLING):
        if char.isascii() or char in IN_FONT:
            plain += char
        elif not unicodedata.combining(char):
            base = unicodedata.normalize("NFKD", char)[0]
            plain += base if base.isascii() else "?"
    return plain


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """Lines no wider than width pixels; broken between words, or within one that is too long."""
    font, text = _font(size), _legible(text)
    most = max(len(text), 1)
    lines = textwrap.wrap(text, most)
    while most > 1 and any(font.getlength(line) > width for line in lines):
        most -= 1
        lines = textwrap.wrap(text, most)
    return lines


def _line_height(size: int) -> int:
    return round(1.35 * size)


def _text_block(paragraphs: Sequence[str], size: int, width: int, below: int) -> Image.Image:
    """Black text on white, flush left, as high as its lines need, with a space below."""
    lines = [line for text in paragraphs for line in _wrapped(text, size, width)]
    height = len(lines) * _line_height(size)
    block = Image.new("RGB", (width, height + below), WHITE)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        draw.text((0, number * _line_height(size)), line, BLACK, _font(size))
    return block


def _cell_size(pictures: Sequence[Sequence[Image.Image]], headers: Sequence[str]) -> Pair:
    """Room for the largest panel with its outline, and for the widest header."""
    panels_flat = [picture for row in pictures for picture in row]
    words = max(_font(HEADER).getlength(_legible(header)) for header in headers)
    width = max(int(words) + 1, *(picture.width + 2 for picture in panels_flat))
    return width, max(picture.height for picture in panels_flat) + 2


def _header_block(headers: Sequence[str], column: int, width: int) -> Image.Image:
    """The headers of one group of columns, each centred over its column."""
    block = Image.new("RGB", (width, _line_height(HEADER) + TEXT_GAP), WHITE)
    draw = ImageDraw.Draw(block)
    for number, header in enumerate(headers):
        middle = number * (column + PANEL_GAP) + column // 2
        draw.text((middle, 0), _legible(header), BLACK, _font(HEADER), anchor="ma")
    return block


def _row_block(
    pictures: Sequence[Image.Image], caption: str, cell: Pair, width: int
) -> Image.Image:
    """The panels of one image, each centred in its column and outlined, over the caption."""
    text = _text_block([caption], CAPTION, width, 0)
    space = TEXT_GAP if text.height else 0
    block = Image.new("RGB", (width, cell[1] + space + text.height + LINE_GAP), WHITE)
    draw = ImageDraw.Draw(block)
    for number, picture in enumerate(pictures):
        x = number * (cell[0] + PANEL_GAP) + (cell[0] - picture.width) // 2
        y = (cell[1] - picture.height) // 2
        # Around the panel, not on it: a white picture needs an edge, and its pixels stay as given.
        draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=OUTLINE)
        block.paste(picture, (x, y))
    block.paste(text, (0, cell[1] + space))
    return block


def _spread(blocks: Sequence[Image.Image]) -> Image.Image:
    """Blocks beside each other, their tops aligned."""
    width = sum(block.width for block in blocks) + (len(blocks) - 1) * GROUP_GAP
    sheet = Image.new("RGB", (width, max(block.height for block in blocks)), WHITE)
    x = 0
    for block in blocks:
        sheet.paste(block, (x, 0))
        x += block.width + GROUP_GAP
    return sheet


def _stack(blocks: Sequence[Image.Image], width: int) -> Image.Image:
    """Blocks below each other on a white sheet with margins."""
    height = sum(block.height for block in blocks)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), WHITE)
    y = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, y))
        y += block.height
    return sheet
