"""Panels and sheets: the pixels shown are the pixels given, and every text is there, whole."""

import os
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from util.errors import CannotWrite
from util.mask.patches import patchify
from util.measure import visualize


def random_panels(rows: int, C: int = 3, H: int = 64, W: int = 64) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, 3, C, H, W)
    images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    return [tuple(row) for row in images]


def positions(sheet: Image.Image, panel: Tensor, scale: int) -> list[tuple[int, int]]:
    """Where (x, y) the enlarged panel stands in the sheet, pixel for pixel."""
    pixels = panel.numpy().transpose(1, 2, 0)
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    canvas = np.asarray(sheet)
    h, w = pixels.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(canvas, (1, 1, 3))[:, :, 0, 0, 0]
    corners = np.argwhere((windows == pixels[0, 0]).all(axis=-1))
    found = [(int(x), int(y)) for y, x in corners if y + h <= len(canvas)]
    return [(x, y) for x, y in found if np.array_equal(canvas[y : y + h, x : x + w], pixels)]


def ink(sheet: Image.Image, left: int, top: int, right: int, bottom: int) -> int:
    """How many dark pixels a zone has: text, not the light outlines."""
    return int((np.asarray(sheet.convert("L"))[top:bottom, left:right] < 100).sum())


def test_panels_show_what_is_given():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 12, 20), dtype=torch.uint8)
    mask = torch.rand(2, 15).argsort(dim=1) < 9
    composite = images.float()
    composite[:, :, :4] = 99.6
    patch = (4, 4)
    for b, row in enumerate(visualize.panels(images, mask, composite, patch)):
        original, masked, restored = row
        assert torch.equal(original, images[b])
        assert restored[:, :4].eq(100).all()
        assert torch.equal(restored[:, 4:], images[b, :, 4:])
        cut, shown = patchify(images[b : b + 1], patch)[0], patchify(masked[None], patch)[0]
        assert shown[mask[b]].eq(128).all()
        assert torch.equal(shown[~mask[b]], cut[~mask[b]])
    with pytest.raises(ValueError, match="expected uint8 images"):
        visualize.panels(images.float(), mask, composite, patch)


@pytest.mark.parametrize(
    ("rows", "C", "H", "W", "scale"),
    [(1, 3, 64, 64, 3), (3, 1, 28, 28, 7), (7, 3, 96, 48, 2), (2, 3, 224, 224, 1)],
)
def test_every_panel_stands_in_its_place(rows, C, H, W, scale):
    given = random_panels(rows, C, H, W)
    sheet = visualize.picture_grid(given, [f"image {i}" for i in range(rows)])
    abreast = 1 if rows <= 6 else 2
    places = []
    for row in given:
        found = [positions(sheet, panel, scale) for panel in row]
        assert [len(place) for place in found] == [1, 1, 1]
        places.append([place[0] for place in found])
    for row in places:
        assert len({y for _, y in row}) == 1
        steps = np.diff([x for x, _ in row])
        assert steps[0] == steps[1] > W * scale
    for i in range(abreast, rows):
        assert [x for x, _ in places[i]] == [x for x, _ in places[i - abreast]]
        assert places[i][0][1] > places[i - abreast][0][1] + H * scale
    if abreast == 2:
        assert places[0][0][1] == places[1][0][1]
        assert places[1][0][0] > places[0][2][0] + W * scale
        assert sheet.width > sheet.height / 2


def test_headers_captions_title_and_footer_are_drawn():
    given = random_panels(2)
    sheet = visualize.picture_grid(given, ["first", "second"], title="Title", footer="A note.")
    columns = [positions(sheet, panel, 3)[0] for panel in given[0]]
    below = positions(sheet, given[1][0], 3)[0][1]
    left, top, side = columns[0][0], columns[0][1], 192
    for x, _ in columns:
        assert ink(sheet, x, top - 35, x + side, top - 1) > 50, "header"
    assert ink(sheet, left, 0, left + 200, top - 35) > 50, "title"
    assert ink(sheet, left, top + side + 2, left + 60, below - 2) > 20, "first caption"
    assert ink(sheet, left, below + side + 2, left + 60, below + side + 30) > 20, "second caption"
    assert ink(sheet, left, below + side + 36, left + 60, sheet.height) > 20, "footer"
    bare = visualize.picture_grid(given, headers=["", "", ""])
    x, y = positions(bare, given[0][0], 3)[0]
    assert ink(bare, 0, 0, bare.width, y - 1) == 0
    assert bare.height < sheet.height


@pytest.mark.parametrize("header", ["short", "a header wider than its panel, by far"])
def test_no_text_is_cut(header):
    name = "a_file_name_without_a_space_" * 6 + " " + "words of a caption " * 12
    given = random_panels(7, W=32)
    headers = [header] * 3
    sheet = visualize.picture_grid(given, [name] * 7, title=name, footer=name, headers=headers)
    pixels = np.asarray(sheet)
    border = visualize.MARGIN
    for edge in (pixels[:border], pixels[-border:], pixels[:, :border], pixels[:, -border:]):
        assert (edge == 255).all()
    lines = visualize._wrapped(name, visualize.CAPTION, 300)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    font = visualize._font(visualize.CAPTION)
    assert max(font.getlength(line) for line in lines) <= 300


def test_characters_that_the_font_lacks_are_spelled():
    assert visualize._legible("Müller–Café 8×8 ß · ±1 “中”") == "Muller-Cafe 8x8 ss · ±1 “?”"
    box = visualize._font(40).getmask("\uffff")
    for char in visualize.IN_FONT:
        assert bytes(visualize._font(40).getmask(char)) != bytes(box), char


@pytest.mark.parametrize("C", [2, 5])
def test_other_channels_are_shown_in_part_and_said(C):
    given = random_panels(1, C)
    shown = [panel[: 1 if C == 2 else 3] for panel in given[0]]
    sheet = visualize.picture_grid(given)
    plain = visualize.picture_grid([shown])
    assert positions(sheet, shown[0], 3) == positions(plain, shown[0], 3) != []
    left = visualize.MARGIN
    assert ink(sheet, left, plain.height - visualize.MARGIN, sheet.width, sheet.height) > 50


def test_scale_is_obeyed_and_large_images_are_not_reduced():
    given = random_panels(1, H=20, W=10)
    assert len(positions(visualize.picture_grid(given, scale=4), given[0][1], 4)) == 1
    large = random_panels(1, H=300, W=500)
    assert len(positions(visualize.picture_grid(large), large[0][1], 1)) == 1


def test_rows_that_do_not_fit_are_refused():
    given = random_panels(2)
    with pytest.raises(ValueError, match="1 captions for 2 rows"):
        visualize.picture_grid(given, ["one"])
    with pytest.raises(ValueError, match="rows of 3 panels"):
        visualize.picture_grid([given[0][:2]])
    with pytest.raises(ValueError, match="rows of 3 panels"):
        visualize.picture_grid([])
    with pytest.raises(ValueError, match="expected uint8"):
        visualize.to_picture(given[0][0].float())


def test_save_panels_pixel_for_pixel(tmp_path):
    for C in (1, 2, 3, 4):
        row = random_panels(1, C, 12, 20)[0]
        folder = tmp_path / "new" / str(C)
        paths = visualize.save_panels(folder, "cat", row)
        names = ["cat-original.png", "cat-masked.png", "cat-reconstruction.png"]
        assert [path.name for path in paths] == names
        assert sorted(os.listdir(folder)) == sorted(names)
        for path, panel in zip(paths, row, strict=True):
            with Image.open(path) as picture:
                assert picture.mode == ("L" if C < 3 else "RGB")
                pixels = np.asarray(picture)
            shown = panel[0] if C < 3 else panel[:3].permute(1, 2, 0)
            np.testing.assert_array_equal(pixels, shown.numpy())
    with pytest.raises(ValueError, match="plain file name"):
        visualize.save_panels(tmp_path, "../cat", row)


def test_save_png_where_nothing_can_be_written(tmp_path):
    picture = Image.new("RGB", (4, 4))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CannotWrite, match=r"cannot write .*file/grid.png"):
        visualize.save_png(tmp_path / "file" / "grid.png", picture)
    (tmp_path / "grid.png").mkdir()
    with pytest.raises(CannotWrite, match="cannot write"):
        visualize.save_png(tmp_path / "grid.png", picture)
    assert sorted(os.listdir(tmp_path)) == ["file", "grid.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = visualize.save_png(tmp_path / "grid.png", Image.new("RGB", (4, 4)))
    before = path.read_bytes()

    def full_disk(image: Image.Image, file: BinaryIO, format: str) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(CannotWrite, match="No space left"):
        visualize.save_png(path, Image.new("RGB", (8, 8)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["grid.png"]
