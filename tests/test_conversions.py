"""Pixels that reading changes: refused, or said once per kind; and silence where they are exact."""

import struct
from pathlib import Path

import numpy as np
import pytest
from launch import TINY
from odd_files import GRAYS, encoded, good_files, gray_array, png, png_rows, quarters, tiff
from PIL import Image

from util.data.conversions import Conversion as C
from util.data.conversions import Tally, take
from util.data.datasets import build_dataset
from util.data.images import BadImage, read_image
from util.data.jpeg import read_pixels
from util.data.segmentation_sets import build_segmentation_set

SIZE = (64, 32)
# Every other good file is read exactly as anyone expects, and nothing is said.
NAMES = {
    (C.CMYK,): "cmyk.jpg cmyk.tif",
    (C.LAB,): "lab.tif",
    (
        C.DEEP,
    ): "gray16.png gray16.tif gray16_big_endian.tif gray16.pgm gray12.tif rgb16.png rgb10.heic "
    "gray16_white_is_zero.tif",
    (C.DEEP, C.TRANSPARENT): "gray16_clear.png",
    (C.STRETCHED,): "int32.tif float_wide.tif",
    (C.NOT_FINITE,): "float_nan.tif",
    (C.TRANSPARENT,): "alpha.png alpha.webp gray_alpha.png clear_colour.png clear_palette.png "
    "clear_palette.gif.png clear_palette.gif alpha.avif alpha.heif",
    (C.ALPHA_BAND,): "half_alpha.tif gray_premultiplied.tif",
    (C.FIRST_FRAME,): "animated.gif.png animated.webp animated.png pages.tif stereo.jpg "
    "animated.gif animated.avif burst.heic",
}
KINDS = {name: set(kinds) for kinds, names in NAMES.items() for name in names.split()}


@pytest.mark.parametrize("read", [read_image, read_pixels])
@pytest.mark.parametrize("name", good_files())
def test_what_is_said_of_each_kind_of_file(tmp_path, read, name):
    path = tmp_path / name
    path.write_bytes(good_files()[name][0])
    take()
    read(path, 3)
    found = take()
    assert set(found) == KINDS.get(name, set())
    assert all(example == (1, str(path)) for example in found.values())


def bands(count: int, extra: int | None, photometric: int = 2) -> bytes:
    """A TIFF of so many bands, one more than a picture shows; extra is what ExtraSamples calls it.

    0: of unknown meaning; 1, 2: alpha; None: it says nothing.
    """
    data = np.full((32, 64, count), 200, "u1").tobytes()
    tags = {262: photometric, 277: count} | ({} if extra is None else {338: extra})
    body = bytearray(tiff(SIZE, data, tags))
    # BitsPerSample has a value for each band; two fit into the tag, more stand behind the pixels.
    at = body.index(struct.pack("<HHI", 258, 3, 1))
    bits = struct.pack(f"<{count}H", *[8] * count)
    where = bits.ljust(4, b"\0") if count < 3 else struct.pack("<I", len(body))
    body[at : at + 12] = struct.pack("<HHI", 258, 3, count) + where
    return bytes(body) + (bits if count > 2 else b"")


@pytest.mark.parametrize(
    "content, said",
    [(bands(4, 0), 4), (bands(4, None), 4), (bands(2, 0, photometric=1), 2)],
)
def test_bands_that_no_picture_shows_are_refused(tmp_path, content, said):
    (tmp_path / "x.tif").write_bytes(content)
    for read in (read_image, read_pixels):
        with pytest.raises(BadImage, match=f"TIFF of {said} bands.*file of their own"):
            read(tmp_path / "x.tif", 3)


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_band_flagged_as_alpha_is_said_unless_it_is_opaque(tmp_path, alpha):
    path = tmp_path / "x.tif"
    path.write_bytes(bands(4, alpha))
    take()
    read_image(path, 3)
    assert set(take()) == {C.ALPHA_BAND}
    opaque = Image.new("RGBA", SIZE, (10, 20, 30, 255))
    for kind in ("TIFF", "PNG"):
        path.write_bytes(encoded(opaque, kind))
        assert read_image(path, 3).getpixel((0, 0)) == (10, 20, 30)
        assert not take()


def test_a_tiff_of_unread_bands_says_so(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(SIZE, bytes(64 * 32 * 7), {277: 7, 262: 1}))
    with pytest.raises(BadImage, match=r"TIFF of (7 )?bands"):
        read_image(tmp_path / "x.tif", 3)


def deep_file(values: tuple[int, ...], colours: int) -> bytes:
    """A PNG of 16 bits whose quarters hold these values."""
    words = gray_array(">u2", values)
    if colours == 3:
        words = np.repeat(words[..., None], 3, -1)
    return png(SIZE, 16, 0 if colours == 1 else 2, png_rows(words))


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize(
    "most, dim", [(65535, False), (16384, False), (16383, True), (4095, True), (255, True)]
)
def test_few_bits_in_sixteen_are_said(tmp_path, most, dim, colours):
    (tmp_path / "x.png").write_bytes(deep_file((0, most // 3, most // 2, most), colours))
    take()
    image = read_image(tmp_path / "x.png", 1)
    assert set(take()) == ({C.DEEP, C.DIM} if dim else {C.DEEP})
    assert abs(image.getextrema()[1] - round(most / 257)) <= 1  # scaled as 16 bits all the same


def test_the_stated_depth_of_a_file_is_its_white(tmp_path):
    values = gray_array(">u2", tuple(gray[0] * 4095 // 255 for gray in GRAYS))
    (tmp_path / "x.pgm").write_bytes(b"P5 64 32 4095\n" + values.tobytes())
    take()
    shown = read_image(tmp_path / "x.pgm", 1)
    assert shown.getextrema() == (0, 255) and set(take()) == {C.DEEP}


def test_a_large_image_is_converted_strip_by_strip_to_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (37, 53, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (37, 53), dtype=np.uint16))
    wide = Image.fromarray(rng.normal(0, 9, (37, 53)).astype(np.float32))
    for name, image in (("rgba.png", rgba), ("deep.png", deep), ("wide.tif", wide)):
        image.save(tmp_path / name)
        whole = np.asarray(read_image(tmp_path / name, 3))
        with monkeypatch.context() as patch:
            patch.setattr("util.data.pixels.STRIP", 53 * 5)
            assert np.array_equal(np.asarray(read_image(tmp_path / name, 3)), whole)
    white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    assert np.array_equal(np.asarray(read_image(tmp_path / "rgba.png", 3)), np.asarray(white))


def test_a_turned_image_beside_a_mask_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for name, tag in (("a", b""), ("b", exif.tobytes())):
            quarters(GRAYS).save(tmp_path / split / "images" / f"{name}.jpg", exif=tag)
            mask = Image.fromarray(gray_array("u1", (0, 1, 0, 1)))
            mask.save(tmp_path / split / "masks" / f"{name}.png")
    source = build_segmentation_set("folder", "train", tmp_path)
    take()
    source[0]
    assert not take()
    source[1]
    assert take() == {C.TURNED_PAIR: (1, str(tmp_path / "train/images/b.jpg"))}


# --- Once in a run ---


def test_a_kind_is_told_once_with_its_count_over_all_processes():
    tally = Tally()
    tally.add({C.CMYK: (2, "a.jpg")})
    elsewhere = {C.CMYK: (3, "b.jpg"), C.LAB: (1, "c.tif")}
    lines = tally.news(lambda mine: [mine, elsewhere])
    assert "5 images so far, such as a.jpg" in lines[0] and "1 image so far, such as c" in lines[1]
    tally.add({C.CMYK: (9, "d.jpg"), C.LAB: (1, "e.tif")})
    assert tally.news(lambda mine: [mine]) == []


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten opaque and two clear images in each split; one scientific TIFF in train."""
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        for i in range(12):
            colour = (9 * i, 20, 30, 255 if i < 10 else 80)
            path = tmp_path / "data" / split / "a" / f"{i:02d}.png"
            Image.new("RGBA", (32, 32), colour).save(path)
    (tmp_path / "data/train/a/sea.tif").write_bytes(bands(4, 0))
    return tmp_path / "data"


CLEAR = "note: transparent pixels are laid on white ("


@pytest.mark.smoke
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_says_each_kind_once(run_main, folder, tmp_path, workers):
    flags = [*TINY, f"--data_path={folder}", f"--output_dir={tmp_path / 'run'}"]
    flags += ["--dataset=imagefolder", "--batch_size=4", f"--num_workers={workers}"]
    code, out, err = run_main("main_pretrain", flags)
    assert code == 0, err
    assert out.count(CLEAR) == 1 and f"such as {folder}/train/a/1" in out
    assert "TIFF of 4 bands" in (tmp_path / "run/bad_images.txt").read_text()
    assert CLEAR in (tmp_path / "run/log-rank0.txt").read_text()
    checkpoint = f"--checkpoint={tmp_path / 'run/checkpoint-last.pth'}"
    images = [str(folder / "val/a/10.png"), str(folder / "val/a/11.png")]
    flags = [checkpoint, f"--output_dir={tmp_path / 'v'}", "--device=cpu", "--images", *images]
    code, out, err = run_main("main_visualize", flags)
    assert code == 0 and out.count(CLEAR + "2 images so far") == 1, err + out


@pytest.mark.parametrize("kind", ["jpeg", "keep", "raw"])
def test_packing_says_each_kind_with_its_count(run_main, folder, tmp_path, kind):
    flags = [f"--data_path={folder}", f"--output_dir={tmp_path / 'p'}", f"--format={kind}"]
    code, out, err = run_main("main_pack", [*flags, "--num_workers=1", "--short_side=0"])
    assert code == 0, err
    assert out.count(CLEAR + "2 images so far, such as") == 2  # of each split
    assert "TIFF of 4 bands" in (tmp_path / "p/train/bad_images.txt").read_text()
    take()
    source = build_dataset("imagefolder", "val", f"packed:{tmp_path / 'p'}")
    for index in range(len(source)):
        source[index]
    assert (C.TRANSPARENT in take()) == (kind == "keep")  # the others are stored on white
