"""Segmentation's data: label maps, pairs of files, scenes of garments, transforms of both."""

import hashlib
import pickle
import struct
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import CONTEXT
from PIL import Image
from test_datasets import write_fashion
from torch import Tensor

import util.data.sets.garments
from util.data import segmentation_transforms
from util.data.datasets import garment_scenes
from util.data.images import BadImage
from util.data.label_maps import (
    IGNORE,
    BadPair,
    check_label,
    coloured,
    overlay,
    palette,
    read_label_map,
    save_label_map,
)
from util.data.randomness import IterationSampler, Key, seeded
from util.data.samples import Samples
from util.data.segmentation_sets import build_segmentation_set, check_pairs
from util.data.segmentation_transforms import (
    SegmentEvalTransform,
    SegmentTransform,
    crop_place,
    distort,
    fitted,
    resize_image,
    resize_label,
    turned,
)
from util.data.sets.garments import GarmentImages, GarmentScenes
from util.data.sets.photos import photos
from util.data.source import ArraySource
from util.errors import BadInput


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def write_pairs(root: Path, count: int = 3, classes: int = 4) -> None:
    """A little set in the layout `folder`; sizes differ, every class occurs, some is ignored."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(count):
            shape = (20 + i, 30 - i)
            save(root / split / f"images/p{i}.jpg", rng.integers(0, 256, (*shape, 3), np.uint8))
            label = rng.integers(0, classes, shape, np.uint8)
            label[0, 0], label[1, 1] = IGNORE, classes - 1
            save(root / split / f"masks/p{i}.png", label)


def write_ade20k(root: Path, count: int = 2) -> None:
    """ADE20K's layout: 0 in a mask is nothing, 1 to 150 are the classes."""
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for i in range(count):
            name = f"ADE_{split}_{i:08d}"
            pixels = rng.integers(0, 256, (24, 32, 3), np.uint8)
            save(root / f"images/{split}/{name}.jpg", pixels)
            label = rng.integers(0, 151, (24, 32), np.uint8)
            label[0, :3] = 0, 1, 150
            save(root / f"annotations/{split}/{name}.png", label)


# ---- Label maps --------------------------------------------------------------------------------


def test_indices_are_read_whatever_their_colours(tmp_path: Path) -> None:
    label = np.arange(12, dtype=np.uint8).reshape(3, 4)
    gray = save(tmp_path / "gray.png", label)
    other = Image.fromarray(label).convert("P")
    other.putpalette(bytes(reversed(range(256))) * 3)
    other.save(tmp_path / "palette.png")
    save(tmp_path / "wide.png", label.astype(np.uint16) * 100)
    save_label_map(tmp_path / "ours.png", label, palette(12))
    save(tmp_path / "bits.png", label % 2 == 1)
    for name in ("gray", "palette", "ours"):
        assert np.array_equal(read_label_map(tmp_path / f"{name}.png"), label), name
    assert np.array_equal(read_label_map(tmp_path / "wide.png"), label.astype(int) * 100)
    assert np.array_equal(read_label_map(tmp_path / "bits.png"), label % 2)
    assert read_label_map(gray).dtype == np.uint8


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_of_few_bits_keeps_its_values(bits: int, tmp_path: Path) -> None:
    """Pillow stretches them to 0..255. The file is written by hand, for Pillow writes none."""
    label = np.array([list(range(2**bits)), list(reversed(range(2**bits)))], dtype=np.uint8)
    packed = b""
    for row in label:
        joined = 0
        for value in row:
            joined = joined << bits | int(value)
        packed += b"\0" + joined.to_bytes(len(row) * bits // 8, "big")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", label.shape[1], label.shape[0], bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")
    (tmp_path / "few.png").write_bytes(content)
    assert np.array_equal(read_label_map(tmp_path / "few.png"), label)


def test_values_become_classes() -> None:
    values = np.array([[0, 1, 150, 255]], dtype=np.uint8)
    assert check_label(values, 150, "m.png", first=1).tolist() == [[255, 0, 149, 255]]
    assert check_label(values % 150, 106, "m.png").tolist() == [[0, 1, 0, 105]]


@pytest.mark.parametrize(("value", "classes", "first"), [(4, 4, 0), (151, 150, 1), (300, 150, 1)])
def test_a_value_that_is_no_class_is_named(value: int, classes: int, first: int) -> None:
    values = np.full((3, 5), first, dtype=np.int32)
    values[2, 4] = value
    with pytest.raises(BadPair, match=rf"m\.png holds the value {value} \(row 2, column 4\)"):
        check_label(values, classes, "m.png", first=first)


def test_colours_are_those_of_pascal_voc() -> None:
    """The first of the published table, and no two of 255 alike."""
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    assert [tuple(c) for c in palette(6).tolist()] == known
    assert tuple(palette(21)[20]) == (0, 64, 128)
    assert len({tuple(c) for c in palette(255).tolist()}) == 255
    label = np.array([[1, IGNORE]], dtype=np.uint8)
    assert coloured(label, palette(2)).tolist() == [[[128, 0, 0], [255, 255, 255]]]
    gray = np.full((1, 2, 3), 100, dtype=np.uint8)
    assert overlay(gray, label, palette(2))[0, 0].tolist() == [114, 50, 50]


# ---- Pairs of files ----------------------------------------------------------------------------


def test_ade20k_is_read_as_published(tmp_path: Path) -> None:
    write_ade20k(tmp_path)
    table = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t.1\t1\t1\t1\twall", "2\t.1\t1\t1\t1\ta, b"]
    for split, folder in (("train", "training"), ("val", "validation")):
        source = build_segmentation_set("ade20k", split, tmp_path)
        assert len(source) == 2 and len(source.classes) == 150
        assert source.classes[0] == "class 1"
        for i in range(2):
            stored = np.asarray(
                Image.open(tmp_path / f"annotations/{folder}/ADE_{folder}_{i:08d}.png")
            )
            image, label = source[i]
            assert image.mode == "RGB" and image.size == (32, 24)
            expected = np.where(stored == 0, 255, stored.astype(int) - 1)
            assert label.dtype == np.uint8 and np.array_equal(label, expected)
            assert Path(source.file_name(i)).exists()
    (tmp_path / "objectInfo150.txt").write_text("\n".join(table))
    assert build_segmentation_set("ade20k", "val", tmp_path).classes[:3] == ["wall", "a", "class 3"]


def test_a_folder_of_pairs(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    source = build_segmentation_set("folder", "val", tmp_path)
    assert source.classes == ["class 0", "class 1", "class 2", "class 3"]
    for i in range(3):
        stored = np.asarray(Image.open(tmp_path / f"val/masks/p{i}.png"))
        assert np.array_equal(source[i][1], stored)
    assert len(pickle.dumps(source)) < 4000
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert build_segmentation_set("folder", "train", tmp_path).classes == list("abcde")
    assert check_pairs(source, range(3)) == 3
    # Masks without an image are left alone.
    save(tmp_path / "val/masks/more.png", np.zeros((4, 4), np.uint8))
    assert len(build_segmentation_set("folder", "val", tmp_path)) == 3


def no_mask(root: Path) -> None:
    (root / "train/masks/p1.png").unlink()


def another_size(root: Path) -> None:
    save(root / "train/masks/p1.png", np.zeros((5, 6), np.uint8))


def out_of_range(root: Path) -> None:
    save(root / "train/masks/p1.png", np.full((21, 29), 9, np.uint8))


def colours(root: Path) -> None:
    save(root / "train/masks/p1.png", np.zeros((21, 29, 3), np.uint8))


def jpeg(root: Path) -> None:
    path = root / "train/masks/p1.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()


def two_of_a_name(root: Path) -> None:
    save(root / "train/images/p1.png", np.zeros((21, 29, 3), np.uint8))


def empty(root: Path) -> None:
    for path in (root / "train/images").iterdir():
        path.unlink()


def no_split(root: Path) -> None:
    (root / "train").rename(root / "training")


# Fault, and what the message names.
FAULTS = {
    no_mask: r"train/images/p1\.jpg has no mask .*train/masks/p1\.png",
    another_size: r"train/masks/p1\.png is 6 x 5 pixels, its image .*p1\.jpg 29 x 21",
    out_of_range: r"train/masks/p1\.png holds the value 9 .*classes 0 to 3",
    colours: r"train/masks/p1\.png is a picture of mode RGB; expected one channel",
    jpeg: r"train/images/p1\.jpg has no mask .*masks end in \.png",
    two_of_a_name: r"train/images holds both p1\.jpg and p1\.png",
    empty: r"no image in .*train/images .*expected DATA",
    no_split: r"no folder .*train/images; expected DATA",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_bad_pairs_are_named(fault, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    fault(tmp_path)
    with pytest.raises(BadInput, match=FAULTS[fault]) as caught:
        source = build_segmentation_set("folder", "train", tmp_path, num_classes=4)
        check_pairs(source, range(len(source)))
    assert "\n" not in str(caught.value)


def test_roots_and_names_that_are_wrong(tmp_path: Path) -> None:
    write_ade20k(tmp_path / "ADEChallengeData2016")
    write_fashion(tmp_path)
    for name, options, expected in (
        ("ade20k", {}, "give --data_path .*ADEChallengeData2016"),
        ("ade20k", {"data_path": None}, "needs a folder"),
        ("folder", {"data_path": tmp_path / "none"}, "no folder .*expected DATA"),
        ("ade20", {}, r"unknown segmentation set 'ade20' \(did you mean ade20k\?\)"),
        ("garments", {"num_classes": 7}, "garments has 11 classes"),
        ("garments", {"size": 8}, "at least 16"),
        ("garments", {"mean": [1.0, 2.0]}, "expected 1 number or 3"),
    ):
        with pytest.raises(BadInput, match=expected):
            build_segmentation_set(name, "train", **{"data_path": tmp_path, **options})
    write_pairs(tmp_path / "own")
    (tmp_path / "own/classes.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(BadInput, match=r"--nb_classes 3, but .*classes\.txt names 4"):
        build_segmentation_set("folder", "train", tmp_path / "own", num_classes=3)


def test_a_damaged_mask_is_a_bad_image(tmp_path: Path) -> None:
    """So another pair takes its place, and it is listed, as with damaged images elsewhere."""
    write_pairs(tmp_path)
    path = tmp_path / "train/masks/p1.png"
    path.write_bytes(path.read_bytes()[:60])
    source = build_segmentation_set("folder", "train", tmp_path, num_classes=4)
    with pytest.raises(BadImage, match=r"masks/p1\.png"):
        source[1]
    sample = Samples(source, SegmentTransform((8, 8), scale=(30, 20)), 0)[Key(0, 1)]
    assert sample["bad"].tolist() == [1, -1, -1, -1]


# ---- Garments ----------------------------------------------------------------------------------


def digest(split: str, folder: Path, index: int) -> str:
    image, label = garment_scenes(split, folder, 48).scene(index)
    return hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()


def test_a_scene_is_a_function_of_split_and_index(tmp_path: Path) -> None:
    """Also in another process, in any order."""
    write_fashion(tmp_path)
    cases = [(split, tmp_path, i) for split in ("train", "val") for i in (0, 7)]
    with CONTEXT.Pool(1) as pool:
        there = pool.starmap(digest, reversed(cases))
    here = [digest(*case) for case in cases]
    assert here == there[::-1] and len(set(here)) == len(cases)


def test_a_scene_is_what_its_garments_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garments that are full squares, on a ground of one colour: every pixel can be told."""
    ground = photos("train", None)
    ground.images = [Image.new("RGB", (200, 100), (9, 9, 9))]
    squares = ArraySource(
        "fashion_mnist",
        "train",
        (np.full((10, 28, 28), 200, np.uint8), np.arange(10)),
        ((0.5,), (0.5,)),
        [str(i) for i in range(10)],
    )
    scenes = GarmentScenes(squares, ground, 40)
    assert scenes.classes == ["background", *map(str, range(10))]
    counts = []
    for i in range(40):
        image, label = scenes.scene(i)
        assert image.shape == (40, 40, 3) and image.dtype == label.dtype == np.uint8
        assert np.array_equal(label == 0, (image == 9).all(axis=2))
        # Of one class and not hidden, a square's pixels are all of one tint.
        found = np.unique(label[label > 0])
        counts.append(len(found))
        for c in found:
            tints = {tuple(p) for p in image[label == c].tolist()}
            assert len(tints) <= 5 and all(min(t) >= 0.35 * 200 - 1 for t in tints)
    assert min(counts) >= 1 and max(counts) >= 4
    # Dark pixels are the ground's: at the threshold and below it.
    squares.images[:] = util.data.sets.garments.OWN_PIXELS - 1
    assert (scenes.scene(0)[1] == 0).all()
    squares.images[:] = util.data.sets.garments.OWN_PIXELS
    assert (scenes.scene(0)[1] > 0).any()
    with pytest.raises(IndexError):
        scenes.scene(len(scenes))


def test_statistics_and_splits_of_garments() -> None:
    scenes = garment_scenes("train", None, 96)
    images, labels = zip(*(scenes.scene(i) for i in range(500)), strict=True)
    pixels = np.stack(images).reshape(-1, 3) / 255
    assert np.allclose(pixels.mean(axis=0), util.data.sets.garments.MEAN, atol=1e-3)
    assert np.allclose(pixels.std(axis=0), util.data.sets.garments.STD, atol=1e-3)
    shares = np.bincount(np.stack(labels).ravel(), minlength=11) / np.stack(labels).size
    assert 0.5 < shares[0] < 0.8 and shares[1:].min() > 0.01
    held_out = {p.tobytes() for p in photos("val", None).images}
    assert held_out and not held_out & {p.tobytes() for p in scenes.photographs.images}
    image, label = GarmentImages(scenes)[3]
    most = np.bincount(scenes.scene(3)[1].ravel()).argmax()
    assert np.array_equal(np.asarray(image), scenes.scene(3)[0]) and label == most


# ---- Transforms --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 5), (64, 64), (23, 91), (1, 1), (29, 31)])
def test_resizing_invents_no_class(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    label = torch.from_numpy(rng.choice([0, 7, 100, 255], (29, 31)).astype(np.uint8))
    resized = resize_label(label, size)
    assert resized.shape == size and set(resized.unique().tolist()) <= {0, 7, 100, 255}
    # Each pixel takes the class at its own centre.
    rows, columns = (
        np.floor((np.arange(n) + 0.5) * old / n).astype(int)
        for n, old in zip(size, label.shape, strict=True)
    )
    assert np.array_equal(resized, label.numpy()[np.ix_(rows, columns)])


def test_images_are_resized_bilinearly_at_pixel_centres() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20, 30), np.uint8))
    for size in ((40, 60), (9, 11)):
        expected = F.interpolate(
            image[None].double(), size, mode="bilinear", align_corners=False
        ).round()
        difference = (resize_image(image, size).double() - expected[0]).abs().max()
        assert difference <= 1  # a tie may round either way


def test_sizes_within_two_bounds() -> None:
    """Worked out by hand: (2048, 512) makes the short side 512, unless the long one passes 2048."""
    for shape, scale, expected in (
        ((480, 640), (2048, 512), (512, 683)),
        ((640, 480), (512, 2048), (683, 512)),
        ((100, 1000), (2048, 512), (205, 2048)),
        ((2000, 1000), (2048, 512), (1024, 512)),
        ((1, 5000), (2048, 512), (1, 2048)),
    ):
        assert fitted(shape, scale) == expected


def picture_of(label: np.ndarray) -> Image.Image:
    """A picture that is its own label."""
    return Image.fromarray(np.repeat(label[..., None], 3, axis=2))


def test_image_and_label_are_transformed_together() -> None:
    """Columns and rows as gray levels survive crop and flip exactly; blocks survive scaling."""
    label = np.add.outer(np.arange(40), 3 * np.arange(50)).astype(np.uint8)
    plain = SegmentTransform(
        (24, 32), scale=(50, 40), ratio=(1, 1), most_of_one=1, distortion=False
    )
    seen = set()
    for seed in range(12):
        with seeded(seed):
            view = plain(picture_of(label), label)
        assert view["x"].shape == (3, 24, 32) and view["x"].dtype == torch.uint8
        assert all(torch.equal(channel, view["y"]) for channel in view["x"])
        assert view["extent"].tolist() == [24, 32]
        seen.add(view["y"].numpy().tobytes())
    assert len(seen) > 8  # crops differ
    blocks = np.kron(np.array([[0, 200], [80, 140]]), np.ones((20, 30))).astype(np.uint8)
    for seed in range(12):
        with seeded(seed):
            view = SegmentTransform((30, 30), scale=(60, 40), distortion=False)(
                picture_of(blocks), blocks
            )
        inside = view["y"] != IGNORE
        agree = (view["x"][0].int() - view["y"].int()).abs() <= 1
        assert agree[inside].float().mean() > 0.85  # all but the blurred borders
        h, w = view["extent"].tolist()
        assert inside[:h, :w].all() and inside.sum() == h * w
        assert (view["x"][:, h:] == 0).all() and (view["x"][:, :, w:] == 0).all()


def test_a_crop_has_at_most_three_quarters_of_one_class() -> None:
    """mmsegmentation's rule, told by counting; ignored pixels are not counted."""
    label = np.zeros((64, 64), np.uint8)
    label[:, 40:] = 1
    label[48:] = IGNORE
    maps = torch.from_numpy(label)
    within = ended = 0
    for seed in range(60):
        with seeded(seed):
            crop = maps[crop_place(maps, (24, 24), 0.75)]
        assert crop.shape == (24, 24)
        counts = torch.bincount(crop[crop != IGNORE], minlength=2)
        within += int(counts.max() / counts.sum() < 0.75)
        with seeded(seed):
            crop = maps[crop_place(maps, (24, 24), 1.0)]
        counts = torch.bincount(crop[crop != IGNORE], minlength=2)
        ended += int(counts.sum() > 0 and counts.max() / counts.sum() < 0.75)
    assert within >= 55 and ended < 45  # tries end after ten; without the rule it is luck
    one = torch.zeros(40, 40, dtype=torch.uint8)
    with seeded(0):
        assert one[crop_place(one, (8, 8), 0.75)].shape == (8, 8)  # never to be had: taken anyway
    with seeded(0):
        assert one[crop_place(one, (64, 64), 1.0)].shape == (40, 40)


def test_distortion_keeps_to_its_ranges() -> None:
    gray = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    seen = set()
    for seed in range(200):
        with seeded(seed):
            out = distort(gray)
        assert out.dtype == torch.uint8 and (out == out[0, 0, 0]).all()  # gray has no hue
        seen.add(int(out[0, 0, 0]))
    # From (100 - 32) / 2 to 1.5 (100 + 32); a quarter is left as it is.
    assert min(seen) >= 33 and max(seen) <= 198 and 100 in seen and len(seen) > 60
    red = torch.zeros(3, 2, 2, dtype=torch.uint8)
    red[0] = 200
    assert turned(red, 1.0, 120)[:, 0, 0].tolist() == pytest.approx([0, 200, 0], abs=6)
    pale = turned(red, 0.5, 0)[:, 0, 0].tolist()
    assert pale == pytest.approx([200, 100, 100], abs=2)


def test_each_part_of_the_distortion_has_even_odds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brightness, contrast, saturation and hue; contrast comes last in half of its cases."""
    done: list[str] = []

    def linear(image: Tensor, factor: float, shift: float) -> Tensor:
        done.append("brightness" if shift else "contrast")
        assert (factor == 1) == bool(shift)
        return image

    def turned(image: Tensor, saturation: float, degrees: float) -> Tensor:
        done.extend([*["saturation"] * (saturation != 1), *["hue"] * (degrees != 0), "turned"])
        return image

    monkeypatch.setattr(segmentation_transforms, "linear", linear)
    monkeypatch.setattr(segmentation_transforms, "turned", turned)
    count, seen = 2000, Counter()
    for seed in range(count):
        done.clear()
        with seeded(seed):
            distort(torch.zeros(3, 1, 1, dtype=torch.uint8))
        seen.update(done)
        seen["contrast and more"] += {"contrast", "turned"} <= set(done)
        seen["contrast last"] += "turned" in done and done[-1] == "contrast"
    # Odds of 2 to 1 would be 15 deviations away.
    for part in ("brightness", "contrast", "saturation", "hue"):
        assert abs(seen[part] / count - 0.5) < 0.05, part
    assert abs(seen["contrast last"] / seen["contrast and more"] - 0.5) < 0.08


def test_samples_are_functions_of_seed_and_key(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    source = build_segmentation_set("folder", "train", tmp_path, num_classes=4)
    samples = Samples(source, SegmentTransform((16, 16), scale=(40, 20)), 5)
    first = samples[Key(2, 1)]
    np.random.seed(99)
    again = samples[Key(2, 1)]
    assert all(torch.equal(first[k], again[k]) for k in ("x", "y", "extent"))
    others = [samples[Key(epoch, 1)]["x"] for epoch in range(3, 8)]
    assert not all(torch.equal(first["x"], other) for other in others)
    view = Samples(source, SegmentEvalTransform((60, 40)), 0)[Key(0, 0)]
    assert view["x"].shape == (3, 40, 60) and view["y"].shape == (20, 30)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_iterations_cross_epochs_at_any_step(world: int) -> None:
    """Any cut of the run gives the same keys, each epoch a permutation of its own."""
    steps = 17

    def keys(rank: int, cuts: list[int]) -> list:
        sampler = IterationSampler(26, 2, accum_iter=2, world_size=world, rank=rank, seed=3)
        found = []
        for first, last in pairwise(cuts):
            sampler.between(first, last)
            part = list(sampler)
            assert len(part) == len(sampler) == 2 * (last - first)
            found += part
        return found

    whole = [keys(rank, [0, steps]) for rank in range(world)]
    assert whole == [keys(rank, [0, 1, 6, 7, 12, 13, 13, steps]) for rank in range(world)]
    per_epoch = 26 // (4 * world)
    for epoch in range(steps // per_epoch):
        used = [
            key.index
            for epochs in whole
            for batch in epochs[2 * per_epoch * epoch : 2 * per_epoch * (epoch + 1)]
            for key in batch
            if key.epoch == epoch
        ]
        assert len(used) == len(set(used)) == per_epoch * 4 * world
