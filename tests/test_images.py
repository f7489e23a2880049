"""Decoding of odd and broken files, and how the errors are told apart."""

import errno
import os
import pickle
import tracemalloc
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_files import (
    GRAYS,
    bad_files,
    chunk,
    encoded,
    good_files,
    odd_files,
    png,
    png_rows,
    quarters,
    tiff,
)
from PIL import Image, ImageFile

import util.data.images as images
from util.data.datasets import build_dataset
from util.data.images import BadImage, read_image
from util.data.jpeg import read_pixels
from util.data.pixel_limits import MOST_PIXELS, PIXEL_BYTES
from util.data.transforms import PretrainTransform
from util.errors import BadInput

GOOD, BAD = good_files(), bad_files()
# Of 255. The file of LAB holds 8 bits of a space larger than RGB.
TOLERANCE = {"lab.tif": 4}


def corners(image: Image.Image) -> np.ndarray:
    """The middles of the four quarters: [4, channels]."""
    width, height = image.size
    array = np.asarray(image).astype(int).reshape(height, width, -1)
    return np.stack([array[y * height // 4, x * width // 4] for y in (1, 3) for x in (1, 3)])


def written(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(GOOD[name][0] if name in GOOD else BAD[name])
    return path


# --- Good files ---


def test_there_are_twenty_kinds_of_each():
    assert len(GOOD) >= 20 and len(BAD) >= 20 and not set(GOOD) & set(BAD)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_is_read_as_a_viewer_shows_it(tmp_path, name):
    _, size, colours = GOOD[name]
    path = written(tmp_path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, gray = read_image(path, 3), read_image(path, 1)
    assert (image.mode, image.size) == ("RGB", size) and (gray.mode, gray.size) == ("L", size)
    tolerance = TOLERANCE.get(name, 3)
    assert np.abs(corners(image) - np.array(colours)).max() <= tolerance
    luma = np.array(colours) @ (0.299, 0.587, 0.114)
    assert np.abs(corners(gray)[:, 0] - luma).max() <= tolerance + 1


@pytest.mark.parametrize("name", [name for name in GOOD if name.startswith("shape")])
def test_a_thin_image_trains(tmp_path, name):
    image = read_image(written(tmp_path, name), 3)
    transform = PretrainTransform((32, 48))
    for seed in range(20):
        torch.manual_seed(seed)
        assert transform(image).shape == (3, 32, 48)


def test_a_dim_float_image_of_one_keeps_its_levels(tmp_path):
    dark = Image.fromarray(np.full((4, 4), 0.25, np.float32))
    dark.save(tmp_path / "dark.tif")
    assert np.asarray(read_image(tmp_path / "dark.tif", 1)).max() == 64


@pytest.mark.parametrize("value, level", [(7.0, 0), (np.nan, 0), (np.inf, 255)])
def test_a_float_image_without_a_range_is_no_error(tmp_path, value, level):
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "flat.tif")
    assert (np.asarray(read_image(tmp_path / "flat.tif", 1)) == level).all()


def test_a_photograph_of_a_hundred_megapixels_is_read(tmp_path):
    data = png((10_000, 10_001), 1, 0, (b"\0" + b"\xff" * 1250) * 10_001)
    (tmp_path / "large.png").write_bytes(data)
    image = read_image(tmp_path / "large.png", 1)
    assert image.size == (10_000, 10_001) and image.getextrema() == (255, 255)


# --- Bad files ---


def test_bombs_inside_an_image_are_refused_or_left_packed(tmp_path):
    """Texts and profiles of a hundred MB in a few KB, and a tile larger than its picture."""
    pixels = png_rows(np.zeros((4, 4), np.uint8))
    zeros = zlib.compress(bytes(100 << 20), 9)
    path = tmp_path / "x.png"
    for kind, head in ((b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")):
        path.write_bytes(png((4, 4), 8, 0, pixels, chunk(kind, head + zeros)))
        tracemalloc.start()
        with suppress(BadImage):
            assert read_image(path, 1).size == (4, 4)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24, kind
        tracemalloc.stop()
    tile = {322: 65_520, 323: 65_520, 324: 8, 325: 16}
    (tmp_path / "x.tif").write_bytes(tiff((4, 4), bytes(16), tile))
    with pytest.raises(BadImage, match="exceeds limit"):
        read_image(tmp_path / "x.tif", 1)


def test_a_file_too_large_to_read_is_bad(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(b"\xff\xd8\xff")
    os.truncate(path, PIXEL_BYTES * MOST_PIXELS + 1)  # sparse
    for read in (read_image, read_pixels):
        with pytest.raises(BadImage, match="exceeds limit"):
            read(path, 3)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_fault(tmp_path, name):
    path = written(tmp_path, name)
    with warnings.catch_warnings():
        # Past its limit Pillow only warns; nothing else may be left to a warning.
        warnings.simplefilter("error")
        with pytest.raises(BadImage) as caught:
            read_image(path, 3)
    assert caught.value.path == str(path) and caught.value.reason
    assert str(path) in str(caught.value) and caught.value.reason in str(caught.value)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("empty.jpg", "the file is empty"),
        ("page.jpg", "no image of a known kind, its first bytes are b'<!DOCTYPE html><'"),
        ("cut.jpeg", "truncated"),
        ("zeros_behind.jpg", "end-of-image"),
        ("bit_flipped.png", "checksum"),
        ("bomb.png", "exceeds limit"),
    ],
)
def test_the_reason_says_what_is_wrong(tmp_path, name, reason):
    with pytest.raises(BadImage, match=reason):
        read_image(written(tmp_path, name), 3)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("folder.jpg", "Is a directory"),
        ("dangling.jpg", "No such file"),
        ("circle.jpg", "symbolic links"),
        ("pipe.jpg", "seekable"),
        ("notes.txt/x.jpg", "Not a directory"),
        ("x" * 300 + ".jpg", "name too long"),
    ],
)
def test_what_is_no_regular_file_is_bad_and_does_not_block(tmp_path, name, reason):
    kinds = odd_files(tmp_path / "odd")
    assert kinds.get(name, "bad") == "bad"
    with pytest.raises(BadImage, match=reason):
        read_image(tmp_path / "odd" / name, 3)


def test_half_an_image_is_refused_whatever_a_library_asked_of_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadImage, match="truncated"):
        read_image(written(tmp_path, "cut.jpeg"), 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_no_cut_gives_another_picture(tmp_path, kind):
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    whole, path = encoded(noise, kind), tmp_path / "cut.jpg"
    path.write_bytes(whole)
    expected = np.asarray(read_image(path, 3))
    for length in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:length])
        try:
            shown = np.asarray(read_image(path, 3))
        except BadImage:
            continue
        # Some formats end in bytes that hold no pixels.
        assert length > len(whole) - 16 and np.array_equal(shown, expected)


def test_a_brand_without_its_box_is_no_heif(tmp_path, monkeypatch):
    """Nobody is asked to install pillow-heif for it."""
    (tmp_path / "a.jpg").write_bytes(b"1234abcdheic" + b"more")
    monkeypatch.setattr(images, "register_heif", lambda: pytest.fail("registered"))
    with pytest.raises(BadImage, match="no image of a known kind"):
        read_image(tmp_path / "a.jpg", 3)


def test_postscript_starts_no_interpreter(tmp_path, monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", run)
    monkeypatch.setattr("subprocess.Popen", run)
    with pytest.raises(BadImage, match="no image of a known kind"):
        read_image(written(tmp_path, "script.jpg"), 3)


# --- Whose fault ---


@pytest.mark.parametrize(
    "code, bad",
    [(errno.EACCES, True), (errno.EIO, True), (errno.EMFILE, False), (errno.ESTALE, False)],
)
def test_a_fault_of_the_machine_is_not_one_of_the_file(tmp_path, monkeypatch, code, bad):
    path = written(tmp_path, "plain.jpg")

    def fail(*args):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(images.os, "open", fail)
    with pytest.raises(OSError if not bad else BadImage) as caught:
        read_image(path, 3)
    assert isinstance(caught.value, BadImage) == bad
    assert os.strerror(code) in str(caught.value)


def test_too_little_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(images, "_decode", fail)
    with pytest.raises(MemoryError):
        read_image(written(tmp_path, "plain.jpg"), 3)


def test_a_bad_image_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(BadImage("/a/b.jpg", "the file is empty")))
    assert isinstance(error, BadInput)
    assert (error.path, error.reason) == ("/a/b.jpg", "the file is empty")
    assert str(error) == (
        "cannot read the image /a/b.jpg: the file is empty; replace the file or remove it"
    )


def test_files_are_closed_again(tmp_path):
    quarters(GRAYS).save(tmp_path / "x.png")
    before = len(os.listdir("/proc/self/fd"))
    kept = [read_image(tmp_path / "x.png", 3) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and len(kept) == 20


# --- Statistics ---


def test_statistics_can_be_set():
    source = build_dataset("synthetic", "train", mean=[0.25], std=[0.1, 0.2, 0.3])
    assert source.mean == (0.25,) * 3 and source.std == (0.1, 0.2, 0.3)
    gray = build_dataset("synthetic", "train", channels=1, std=[1])
    assert gray.mean == (0.5,) and gray.std == (1.0,)


@pytest.mark.parametrize(
    "stats, message",
    [
        ({"mean": [0.5, 0.5]}, "mean has 2 numbers, but synthetic gives images of 3 channels"),
        ({"mean": []}, "mean has 0 numbers"),
        ({"mean": [123.7, 116.3, 103.5]}, r"mean is 123\.7 .*from 0 to 1.* by 255"),
        ({"mean": [-0.1]}, r"mean is -0\.1"),
        ({"std": [0.2, 0.0, 0.2]}, r"std is 0\.2 0\.0 0\.2; expected numbers above 0 to 1"),
        ({"std": [float("nan")]}, "std is nan"),
        ({"std": [float("inf")]}, "std is inf"),
    ],
)
def test_impossible_statistics_are_refused(stats, message):
    with pytest.raises(BadInput, match=message):
        build_dataset("synthetic", "train", **stats)
