"""JPEG by torchvision, crops of tensors: the pictures, faults and boxes of the path by Pillow."""

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_files import bad_files, good_files, odd_files
from PIL import Image
from torchvision.transforms import v2

import util.data.images
import util.data.jpeg as jpeg
from util.data.datasets import build_dataset
from util.data.images import BadImage, read_image
from util.data.jpeg import plain_header, read_pixels
from util.data.samples import collate, empty_batch
from util.data.sets.photos import photos
from util.data.transforms import PretrainTensorTransform, PretrainTransform, crop_box
from util.errors import BadInput

GOOD, BAD = good_files(), bad_files()


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Real ones, 500 pixels at most."""
    images = [image.copy() for image in photos("train", None).images]
    for image in images:
        image.thumbnail((500, 500))
    return images


@pytest.fixture
def by_torchvision(monkeypatch) -> list[int]:
    """Grows by one for each image that torchvision decoded."""
    calls = []

    def decode(*args, **kwargs):
        image = decode_jpeg(*args, **kwargs)
        calls.append(1)
        return image

    decode_jpeg = jpeg.decode_jpeg
    monkeypatch.setattr(jpeg, "decode_jpeg", decode)
    return calls


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def compare(path: Path, channels: int) -> None:
    """Both readers give the same picture, or the same fault."""
    try:
        expected = np.asarray(read_image(path, channels))
    except BadImage as fault:
        with pytest.raises(BadImage) as caught:
            read_pixels(path, channels)
        assert (caught.value.path, caught.value.reason) == (fault.path, fault.reason)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read_pixels(path, channels)
    assert got.dtype == torch.uint8 and got.shape == (channels, *expected.shape[:2])
    assert np.array_equal(got.permute(1, 2, 0).reshape(expected.shape).numpy(), expected), path


# --- Decoding ---


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_file_gives_the_same_picture_or_fault(tmp_path, channels):
    for name, content in {**{name: good[0] for name, good in GOOD.items()}, **BAD}.items():
        path = tmp_path / name
        path.write_bytes(content)
        compare(path, channels)


def test_what_is_no_regular_file_has_the_same_fault(tmp_path):
    for name in odd_files(tmp_path):
        compare(tmp_path / name, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 92}, {"quality": 30}, {"progressive": True}, {"subsampling": 0},
        {"optimize": True, "subsampling": 1}, {"comment": b"of \xff\xd9 and more"},
        {"restart_marker_blocks": 7},
    ],
)  # fmt: skip
def test_photographs_are_decoded_by_torchvision_and_alike(
    tmp_path, photographs, by_torchvision, options
):
    for number, image in enumerate(photographs):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(saved(image, **options))
        compare(path, 3)
        path.write_bytes(saved(image.convert("L"), **options))
        for channels in (1, 3):
            compare(path, channels)
    assert len(by_torchvision) == 3 * len(photographs)


@pytest.mark.parametrize("orientation", range(0, 10))
def test_orientation_is_undone(tmp_path, photographs, by_torchvision, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.jpg"
    path.write_bytes(saved(photographs[0].crop((3, 5, 100, 70)), exif=exif.tobytes(), quality=90))
    compare(path, 3)
    assert len(by_torchvision) == (1 <= orientation <= 8)  # odd ones are Pillow's to judge
    assert read_pixels(path, 3).stride(0) == 1


def test_every_cut_has_the_same_fault_or_picture(tmp_path, photographs):
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = saved(photographs[1].crop((0, 0, 40, 30)), exif=exif.tobytes())
    path = tmp_path / "x.jpg"
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        compare(path, 3)
        path.write_bytes(whole[:end] + bytes(len(whole) - end))  # a tail that was never written
        compare(path, 3)


def test_damaged_headers_have_the_same_fault_or_picture(tmp_path, photographs):
    """A byte of the header changed at a time: sizes, tables, components, EXIF, lengths."""
    exif = Image.Exif()
    exif[0x0112] = 3
    whole = saved(photographs[2].crop((0, 0, 40, 30)), exif=exif.tobytes())
    path = tmp_path / "x.jpg"
    rng = np.random.default_rng(0)
    scan = plain_header(whole).scan
    for at in rng.choice(np.arange(2, scan), 150, replace=False).tolist():
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        compare(path, 3)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, by_torchvision):
    path = tmp_path / "x.jpg"
    path.write_bytes(saved(Image.new("RGB", (64, 48))))
    monkeypatch.setattr(util.data.pixel_limits, "MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(BadImage, match="exceeds limit"):
        read_pixels(path, 3)
    assert not by_torchvision
    monkeypatch.setattr(util.data.pixel_limits, "MOST_PIXELS", 64 * 48)
    assert read_pixels(path, 3).shape == (3, 48, 64)


def test_a_header_is_plain_or_left_to_pillow():
    image = Image.new("RGB", (40, 30), "red")
    plain = saved(image)
    assert plain_header(plain).pixels == 1200 and plain_header(plain).orientation == 1
    assert plain_header(saved(image.convert("CMYK"))) is None
    assert plain_header(plain[:-2]) is None  # no end-of-image marker
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>"
    several = b"MPF\0" + bytes(20)
    for kind, segment in ((0xE1, xmp), (0xE2, several)):
        marked = plain[:2] + struct.pack(">BBH", 0xFF, kind, len(segment) + 2) + segment + plain[2:]
        assert plain_header(marked) is None
    assert all(plain_header(plain[:end]) is None for end in range(len(plain) - 1))


def test_a_fault_of_the_machine_is_not_one_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "x.jpg"
    path.write_bytes(saved(Image.new("RGB", (8, 8))))

    def fail(*args):
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(util.data.images.os, "open", fail)
    with pytest.raises(OSError, match="Too many open files") as caught:
        read_pixels(path, 3)
    assert not isinstance(caught.value, BadImage)


# --- Crops ---


def test_boxes_are_torchvisions_draw_for_draw():
    rng = np.random.default_rng(0)
    for scale in ((0.2, 1.0), (0.08, 0.5), (0.9, 1.0)):
        official = v2.RandomResizedCrop(8, scale=scale)
        for seed in range(200):
            height, width = rng.integers(1, 600, 2).tolist()
            torch.manual_seed(seed)
            box = official.make_params([torch.empty(3, height, width)])
            expected = tuple(box[side] for side in ("top", "left", "height", "width"))
            generator = torch.Generator().manual_seed(seed)
            assert crop_box(height, width, scale, generator) == expected


def test_both_paths_crop_and_flip_alike(photographs):
    """Mean difference below 1.5 of 255 on every view (the bound of the issue), and mostly tiny."""
    ours, by_pil = PretrainTensorTransform((96, 128)), PretrainTransform((96, 128))
    means = []
    for number, image in enumerate(photographs):
        tensor = v2.functional.pil_to_tensor(image)
        for seed in range(6):
            torch.manual_seed(seed + 100 * number)
            expected = by_pil(image)
            for given in (image, tensor):
                view = ours(given, torch.Generator().manual_seed(seed + 100 * number))
                assert view.dtype == torch.uint8 and view.shape == (3, 96, 128)
                means.append((view.int() - expected.int()).abs().float().mean().item())
    assert max(means) < 1.5 and np.mean(means) < 0.5, (max(means), np.mean(means))


def test_folders_and_photographs_differ_little_between_decoders(tmp_path, photographs):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number, image in enumerate(photographs[:6]):
            (tmp_path / split / "a" / f"{number}.jpg").write_bytes(saved(image, quality=92))
    transforms = {
        "pil": PretrainTransform((64, 64)),
        "torchvision": PretrainTensorTransform((64, 64)),
    }
    views = {}
    for decoder, transform in transforms.items():
        source = build_dataset("imagefolder", "train", tmp_path).with_decoder(decoder)
        views[decoder] = []
        for index in range(len(source)):
            torch.manual_seed(index)
            views[decoder].append(transform(source[index][0]))
    difference = torch.stack(views["pil"]).int() - torch.stack(views["torchvision"]).int()
    assert 0 < difference.abs().float().mean() < 1.5


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_number_of_channels(channels):
    image = torch.randint(0, 256, (channels, 40, 30), dtype=torch.uint8)
    view = PretrainTensorTransform((16, 24))(image, torch.Generator().manual_seed(0))
    assert view.shape == (channels, 16, 24) and view.dtype == torch.uint8


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("inner", [True, False])
def test_a_batch_is_its_samples_in_either_memory_order(channels, inner):
    images = [torch.randint(0, 256, (channels, 8, 8), dtype=torch.uint8) for _ in range(4)]
    if inner:
        images = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]
    room = empty_batch(4, images[0])
    samples = []
    for i, image in enumerate(images):
        room[i].copy_(image)
        samples.append({"x": room[i], "index": i})
    assert torch.equal(samples[1]["x"], images[1])
    batch = collate(samples)
    assert torch.equal(batch["x"], torch.stack(images)) and batch["index"].tolist() == [*range(4)]
    assert batch["x"].data_ptr() == room.data_ptr()  # not copied
    # Another order, another count and images from elsewhere are stacked.
    for order in ([2, 0, 1, 3], [0, 1], [3]):
        chosen = collate([samples[i] for i in order])
        assert torch.equal(chosen["x"], torch.stack([images[i] for i in order]))
    mixed = collate([{"x": image} for image in (images[0], room[1])])
    assert torch.equal(mixed["x"], torch.stack(images[:2]))


# --- The flag ---


def test_an_unknown_decoder_is_refused():
    with pytest.raises(BadInput, match="torchvision, pil"):
        build_dataset("digits", "train").with_decoder("turbo")


def test_a_run_refuses_to_go_on_with_another_decoder(run_main, tmp_path):
    from launch import TINY

    flags = [*TINY, "--epochs=1", "--warmup_epochs=0", f"--output_dir={tmp_path}"]
    assert run_main("main_pretrain", flags)[0] == 0
    code, _, err = run_main("main_pretrain", [*flags, "--decode=pil"])
    assert code == 2 and "decode: was torchvision, is pil" in err
