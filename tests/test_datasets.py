"""Every data set of the registry, against torchvision's readers where it has one; bad input."""

import gzip
import hashlib
import os
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

import util.data.datasets as datasets
import util.data.sets.stl10
from util.data.datasets import DATASETS, SyntheticSource, build_dataset, read_idx
from util.data.images import BadImage
from util.data.sets.photos import PHOTOS, photo_crop
from util.data.source import Source
from util.errors import BadInput


def write_folder(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dög"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.png")


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_fashion(root: Path, gray: int = 0) -> None:
    """A little Fashion-MNIST in the four gzipped files; `gray` is its darkest pixel."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for prefix, count in (("train", 20), ("t10k", 10)):
        files = {
            "images-idx3": rng.integers(gray, 256, (count, 28, 28)),
            "labels-idx1": np.arange(count) % 10,
        }
        for kind, array in files.items():
            (root / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(array)))


def write_jpeg(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path, quality=95)


def write_places(root: Path, size: str = "256") -> None:
    """A little Places365 in torchvision's layout; the classes are not in alphabetical order."""
    rng = np.random.default_rng(2)
    root.mkdir(parents=True, exist_ok=True)
    classes = ["/a/airfield", "/z/zoo", "/b/bar", "/a/apartment/outdoor"]
    categories = "".join(f"{name} {k}\n" for k, name in enumerate(classes))
    (root / "categories_places365.txt").write_text(categories)
    train = [(f"{name}/{i:08d}.jpg", k) for i in range(2) for k, name in enumerate(classes)]
    val = [(f"Places365_val_{i:08d}.jpg", k) for i, k in enumerate((2, 0, 3, 1, 1))]
    for file, folder, entries in (
        ("places365_train_standard.txt", f"data_{size}_standard", train),
        ("places365_val.txt", f"val_{size}", val),
    ):
        (root / file).write_text("".join(f"{name} {k}\n" for name, k in entries))
        for name, _ in entries:
            write_jpeg(root / folder / name.lstrip("/"), rng)


def write_cifar(root: Path, classes: int) -> None:
    """A little CIFAR-10 or -100 in its pickled batches."""
    rng = np.random.default_rng(classes)
    label_key, meta, names = "fine_labels", "meta", ["train", "test"]
    folder = root / "cifar-100-python"
    if classes == 10:
        label_key, meta = "labels", "batches.meta"
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in names:
        data = rng.integers(0, 256, (8, 3072), dtype=np.uint8)
        labels = [int(k) for k in rng.integers(0, classes, 8)]
        batch = {"data": data, label_key: labels, "filenames": [f"{i}.png" for i in range(8)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    key = "label_names" if classes == 10 else "fine_label_names"
    (folder / meta).write_bytes(pickle.dumps({key: [f"c{k}" for k in range(classes)]}, protocol=2))


def write_stl10(root: Path) -> None:
    """A little STL-10 in its binary files, in torchvision's folder."""
    rng = np.random.default_rng(5)
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for part, count in STL10_COUNTS.items():
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            rng.integers(1, 11, count, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(util.data.sets.stl10.CLASSES) + "\n")


# Sets that read files; the others come inside a package or are drawn.
STL10_COUNTS = {"train": 6, "test": 5, "unlabeled": 9}
WRITERS = {
    "imagefolder": write_folder,
    "fashion_mnist": write_fashion,
    "places365": write_places,
    "cifar10": lambda root: write_cifar(root, 10),
    "cifar100": lambda root: write_cifar(root, 100),
    "stl10": write_stl10,
    "stl10_unlabeled": write_stl10,
}


def accept(monkeypatch, root: Path) -> None:
    """Make the sums and counts that are published those of the little sets under root."""

    def sums(folder: str, listed: list) -> list:
        return [[name, md5(root / folder / name)] for name, *_ in listed]

    def md5(path: Path) -> str | None:
        return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else None

    sets = torchvision.datasets
    for reader in (sets.CIFAR10, sets.CIFAR100, sets.STL10):
        for name in ("train_list", "test_list"):
            listed = sums(reader.base_folder, getattr(reader, name))
            monkeypatch.setattr(reader, name, listed)
        if reader is not sets.STL10:
            known = md5(root / reader.base_folder / reader.meta["filename"])
            monkeypatch.setattr(reader, "meta", reader.meta | {"md5": known})
    places = sets.Places365
    (categories,) = sums("", [places._CATEGORIES_META])
    monkeypatch.setattr(places, "_CATEGORIES_META", categories)
    lists = {split: sums("", [meta])[0] for split, meta in places._FILE_LIST_META.items()}
    monkeypatch.setattr(places, "_FILE_LIST_META", lists)
    monkeypatch.setattr(util.data.sets.stl10, "COUNTS", STL10_COUNTS)


@pytest.fixture(params=sorted(DATASETS))
def name(request) -> str:
    return request.param


@pytest.fixture
def data_path(name, tmp_path, monkeypatch) -> Path | None:
    if name not in WRITERS:
        return None
    WRITERS[name](tmp_path / "data")
    accept(monkeypatch, tmp_path / "data")
    return tmp_path / "data"


def pixels(image: Image.Image | torch.Tensor) -> np.ndarray:
    return np.asarray(image)


def some(source: Source) -> list[int]:
    return sorted({0, 1, len(source) // 2, len(source) - 1})


# --- Every set ---


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_set_is_what_it_says(name, data_path, split):
    source = build_dataset(name, split, data_path)
    assert source.name == name and len(source) > 0
    assert len(source.mean) == len(source.std) == source.channels
    assert all(0 < value < 1 for value in source.mean + source.std)
    assert len(set(source.classes)) == len(source.classes)
    for i in some(source):
        image, label = source[i]
        if source.channels in (1, 3):
            assert isinstance(image, Image.Image)
            assert image.mode == {1: "L", 3: "RGB"}[source.channels]
        else:
            assert image.dtype == torch.uint8 and image.shape[0] == source.channels
        unknown = (name, split) == ("stl10_unlabeled", "train")
        assert type(label) is int and (label == -1 if unknown else 0 <= label < len(source.classes))
    names = {source.file_name(i) for i in range(len(source))}
    assert len(names) == len(source) and all(isinstance(n, str) for n in names)
    with pytest.raises(IndexError):
        source[len(source)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_set_is_the_same_each_time_and_after_pickling(name, data_path, split):
    source = build_dataset(name, split, data_path)
    others = build_dataset(name, split, data_path), pickle.loads(pickle.dumps(source))
    for other in others:
        assert len(other) == len(source) and other.classes == source.classes
        for i in reversed(some(source)):
            assert np.array_equal(pixels(source[i][0]), pixels(other[i][0]))
            assert source[i][1] == other[i][1]
            assert source.file_name(i) == other.file_name(i)


def test_train_and_val_share_classes_and_no_image(name, data_path):
    train, val = (build_dataset(name, split, data_path) for split in ("train", "val"))
    assert train.classes == val.classes
    seen = {pixels(train[i][0]).tobytes() for i in range(min(len(train), 300))}
    assert not any(pixels(val[i][0]).tobytes() in seen for i in range(min(len(val), 300)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_turns_gray_or_rgb(name, data_path, channels):
    plain = build_dataset(name, "train", data_path)
    source = build_dataset(name, "train", data_path, channels=channels)
    assert source.channels == channels and source[0][0].mode == {1: "L", 3: "RGB"}[channels]
    for got, own in ((source.mean, plain.mean), (source.std, plain.std)):
        assert got == pytest.approx([np.mean(own)] * channels if len(own) != channels else own)
    assert len(source) == len(plain) and source[1][1] == plain[1][1]


def test_a_set_gives_or_refuses_other_channels(name, data_path):
    if name == "synthetic":
        source = build_dataset(name, "train", channels=5, size=(24, 40))
        assert source[0][0].shape == (5, 24, 40) and source.channels == len(source.mean) == 5
    else:
        with pytest.raises(BadInput, match=rf"channels is 5, but {name} .*gray \(1\) or RGB \(3\)"):
            build_dataset(name, "train", data_path, channels=5)


# --- Folders ---


def test_imagefolder_lists_what_torchvision_lists(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train/cat/deeper").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "train/cat/deeper/more.png")
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    source = build_dataset("imagefolder", "train", tmp_path)
    reference = torchvision.datasets.ImageFolder(str(tmp_path / "train"))
    listed = [(source.file_name(i), int(source.labels[i])) for i in range(len(source))]
    assert listed == reference.samples and len(listed) == 7
    assert source.classes == reference.classes
    assert len(pickle.dumps(source)) < 2000


def test_imagefolder_names_a_file_that_is_gone(tmp_path):
    write_folder(tmp_path)
    source = build_dataset("imagefolder", "train", tmp_path)
    Path(source.file_name(1)).unlink()
    with pytest.raises(BadImage, match=r"cannot read the image .*cat_1\.png: No such file"):
        source[1]


# --- Places365 ---


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", ["large", "256"])
def test_places_lists_what_torchvision_lists(tmp_path, monkeypatch, split, size):
    write_places(tmp_path, size)
    accept(monkeypatch, tmp_path)
    source = build_dataset("places365", split, tmp_path)
    reference = torchvision.datasets.Places365(
        str(tmp_path), {"train": "train-standard"}.get(split, split), small=size == "256"
    )
    listed = [(source.file_name(i), int(source.labels[i])) for i in range(len(source))]
    assert listed == reference.imgs and len(listed) == {"train": 8, "val": 5}[split]
    assert {name: k for k, name in enumerate(source.classes)} == reference.class_to_idx
    assert np.array_equal(pixels(source[1][0]), pixels(reference[1][0]))


def test_places_takes_the_size_that_both_splits_have(tmp_path):
    write_places(tmp_path, "256")
    (tmp_path / "val_large").mkdir()
    for split, folder in (("train", "data_256_standard"), ("val", "val_256")):
        assert f"/{folder}/" in build_dataset("places365", split, tmp_path).file_name(0)
    (tmp_path / "data_large_standard").mkdir()
    for split, folder in (("train", "data_large_standard"), ("val", "val_large")):
        assert f"/{folder}/" in build_dataset("places365", split, tmp_path).file_name(0)
    os.rename(tmp_path / "val_256", tmp_path / "elsewhere")
    os.rename(tmp_path / "val_large", tmp_path / "elsewhere2")
    train = build_dataset("places365", "train", tmp_path)
    assert "/data_large_standard/" in train.file_name(0)


def test_places_in_folders_is_an_image_folder(tmp_path):
    write_folder(tmp_path)
    for split in ("train", "val"):
        source = build_dataset("places365", split, tmp_path)
        reference = torchvision.datasets.ImageFolder(str(tmp_path / split))
        listed = [(source.file_name(i), int(source.labels[i])) for i in range(len(source))]
        assert listed == reference.samples and source.classes == reference.classes


TRAIN_LIST, CATEGORIES = "places365_train_standard.txt", "categories_places365.txt"


@pytest.mark.parametrize(
    "file, text, message",
    [
        (
            TRAIN_LIST,
            None,
            r"has neither places365_train_standard\.txt nor train/; .*download=True",
        ),
        (CATEGORIES, None, r"cannot read .*categories_places365\.txt: No such file"),
        (CATEGORIES, "/a/airfield 0\n/b/bar 2\n", "does not number its classes from 0 on"),
        (CATEGORIES, "/a/airfield\n", r"has a line '/a/airfield\\n'; expected a name"),
        (TRAIN_LIST, "/a/airfield/1.jpg -1\n", "has a line '/a/airfield/1.jpg -1"),
        (TRAIN_LIST, "/a/airfield/1.jpg 4\n", "lists 1 images with labels up to 4; .* 4 classes"),
        (TRAIN_LIST, "", "lists 0 images"),
        (TRAIN_LIST, "<html>not found</html>", "has a line '<html>"),
    ],
)
def test_places_names_a_broken_list(tmp_path, file, text, message):
    write_places(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(BadInput, match=message):
        build_dataset("places365", "train", tmp_path)


def test_places_without_images_or_path_says_what_was_expected(tmp_path):
    write_places(tmp_path)
    os.rename(tmp_path / "val_256", tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"has no val_large; expected .*val_256.*download=True"):
        build_dataset("places365", "val", tmp_path)
    with pytest.raises(BadInput, match="needs a folder, and none was given"):
        build_dataset("places365", "val")


# --- CIFAR, STL-10 ---


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_torchvisions(tmp_path, monkeypatch, classes, split):
    write_cifar(tmp_path, classes)
    accept(monkeypatch, tmp_path)
    reader = getattr(torchvision.datasets, f"CIFAR{classes}")
    reference = reader(str(tmp_path), train=split == "train")
    for data_path in (tmp_path, tmp_path / reader.base_folder):
        source = build_dataset(f"cifar{classes}", split, data_path)
        assert len(source) == len(reference) and source.classes == reference.classes
        for (image, label), (image2, label2) in zip(source, reference, strict=True):
            assert np.array_equal(pixels(image), pixels(image2)) and label == label2


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["stl10", "stl10_unlabeled"])
def test_stl10_is_torchvisions(tmp_path, monkeypatch, name, split):
    write_stl10(tmp_path)
    accept(monkeypatch, tmp_path)
    part = "test" if split == "val" else {"stl10": "train"}.get(name, "unlabeled")
    reference = torchvision.datasets.STL10(str(tmp_path), part)
    for data_path in (tmp_path, tmp_path / "stl10_binary"):
        source = build_dataset(name, split, data_path)
        assert len(source) == len(reference) and source.classes == reference.classes
        for (image, label), (image2, label2) in zip(source, reference, strict=True):
            assert np.array_equal(pixels(image), pixels(image2)) and label == label2


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_what_is_missing_is_downloaded_by_torchvision(tmp_path, monkeypatch, name):
    reader = getattr(torchvision.datasets, name.upper())

    def download(self) -> None:
        WRITERS[name](Path(self.root))
        accept(monkeypatch, Path(self.root))

    monkeypatch.setattr(reader, "download", download)
    monkeypatch.chdir(tmp_path)
    assert len(build_dataset(name, "val")) > 0 and (tmp_path / "data").is_dir()
    monkeypatch.setattr(reader, "download", None)
    assert len(build_dataset(name, "val", tmp_path / "data")) > 0


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "stl10_unlabeled"])
def test_a_failed_download_says_what_was_expected(tmp_path, monkeypatch, name):
    def download(self) -> None:
        raise RuntimeError("no route to host")

    reader = getattr(torchvision.datasets, name.upper().removesuffix("_UNLABELED"))
    monkeypatch.setattr(reader, "download", download)
    with pytest.raises(BadInput, match=rf"no route to host.*--data_path .*{reader.base_folder}"):
        build_dataset(name, "train", tmp_path)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_cifar_that_is_not_the_published_one_is_named_and_not_unpickled(
    tmp_path, monkeypatch, damage
):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    def download(self) -> None:
        raise AssertionError("would overwrite the folder")

    write_cifar(tmp_path, 10)
    accept(monkeypatch, tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    file = tmp_path / "cifar-10-batches-py/data_batch_3"
    file.unlink() if damage == "gone" else file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput, match=r"missing or not the published files: data_batch_3; give"):
        build_dataset("cifar10", "train", tmp_path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("train_X.bin", lambda data: data[:-1], r"train_X\.bin holds \d+ bytes, but .* has"),
        ("train_y.bin", lambda data: data + b"1", r"train_y\.bin holds 7 bytes, but .* has 6"),
        ("train_y.bin", lambda data: b"\0" * 6, r"train_y\.bin holds labels outside 1\.\.10"),
        ("train_y.bin", lambda data: b"\x0b" * 6, r"train_y\.bin holds labels outside 1\.\.10"),
        ("train_y.bin", None, r"train_y\.bin holds 0 bytes, but .* has 6; fetch"),
    ],
)
def test_stl10_names_a_broken_file(tmp_path, monkeypatch, file, change, message):
    write_stl10(tmp_path)
    accept(monkeypatch, tmp_path)
    path = tmp_path / "stl10_binary" / file
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadInput, match=message):
        build_dataset("stl10", "train", tmp_path)


def test_the_published_counts_of_stl10():
    assert util.data.sets.stl10.COUNTS == {"train": 5000, "test": 8000, "unlabeled": 100_000}


# --- Photographs ---


def test_photos_hold_out_whole_files():
    train, val = PHOTOS["train"], PHOTOS["val"]
    assert not set(train) & set(val) and len(set(train + val)) == len(train + val)
    assert {"motorcycle_left.png", "motorcycle_right.png"} <= set(train)
    for split in PHOTOS:
        source = build_dataset("photos", split)
        shown = {source.classes[source[i][1]] for i in range(len(source))}
        assert shown == {Path(file).stem for file in PHOTOS[split]}
        assert all(source.classes[source[i][1]] in source.file_name(i) for i in some(source))


def test_photos_epoch_visits_every_file_equally():
    source = build_dataset("photos", "train")
    visits = np.bincount([source[i][1] for i in range(len(source))])
    assert abs(len(source) - 2048) <= len(visits) and len(set(visits)) == 1


def test_photos_val_crops_are_squares_of_every_scale():
    source = build_dataset("photos", "val")
    seen = {pixels(source[i][0]).tobytes() for i in range(len(source))}
    assert len(seen) == len(source) == 64
    for file in source.images:
        short = min(file.size)
        boxes = [photo_crop(*file.size, k) for k in range(21)]
        sides = np.array([(right - left, bottom - top) for left, top, right, bottom in boxes])
        assert (sides[:, 0] == sides[:, 1]).all()
        assert sides.max() == short and short / 3 <= sides.min() < short / 2.5
        assert all(min(left, top) >= 0 for left, top, _, _ in boxes)
        assert all(right <= file.width and low <= file.height for _, _, right, low in boxes)
    # Pinned: another box is another measurement set, and its PSNR compares with nothing before.
    assert photo_crop(600, 400, 0) == (100, 0, 500, 400)
    assert photo_crop(600, 400, 5) == (111, 107, 312, 308)


# --- Digits, Fashion-MNIST, drawn ---


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train, val = build_dataset("digits", "train"), build_dataset("digits", "val")
    assert (len(train), len(val)) == (1500, 297)
    for i, (source, j) in {0: (train, 0), 1499: (train, 1499), 1500: (val, 0)}.items():
        image, label = source[j]
        assert label == bunch.target[i]
        assert np.abs(pixels(image) / 255 * 16 - bunch.images[i]).max() <= 0.5 / 255 * 16
    levels = train.images / 255
    assert (levels.mean(), levels.std()) == pytest.approx((*train.mean, *train.std), abs=5e-4)


def test_synthetic_statistics_are_those_of_its_images():
    source = build_dataset("synthetic", "train")
    levels = np.stack([pixels(source[i][0]) for i in range(len(source))]) / 255
    assert levels.mean() == pytest.approx(source.mean[0], abs=0.02)
    assert levels.std() == pytest.approx(source.std[0], abs=0.02)


def test_synthetic_discs_are_round_and_everywhere():
    """Of 200 pictures of six each: one pixel is as often in a disc as its mirror images are."""
    source = SyntheticSource("train", 1, (33, 33))
    y, x = np.mgrid[0:1:33j, 0:1:33j]
    covered = np.zeros((33, 33))
    for seed in range(200):
        rng = np.random.default_rng(seed)
        cover = source.shape(rng, "discs", y, x)
        ramp = source.shape(np.random.default_rng(seed), "gradient", y, x)
        covered += cover != 0.5 * ramp
    for mirrored in (covered[::-1], covered[:, ::-1], covered.T):
        assert np.abs(covered - mirrored).max() <= 60  # of 200; 4 standard deviations
    assert covered[16, 16] > 1.5 * covered[0, 0]  # more centres are in reach
    assert covered.min() > 30


@pytest.mark.skipif(not datasets.FASHION_DEBIAN.is_dir(), reason="no Fashion-MNIST from Debian")
def test_fashion_mnist_of_debian_is_the_published_set():
    train, val = build_dataset("fashion_mnist", "train"), build_dataset("fashion_mnist", "val")
    assert (len(train), len(val)) == (60_000, 10_000)
    assert (np.bincount(train.labels) == 6000).all() and (np.bincount(val.labels) == 1000).all()
    levels = train.images / np.float32(255)
    assert levels.mean() == pytest.approx(train.mean[0], abs=1e-4)
    assert levels.std() == pytest.approx(train.std[0], abs=1e-4)


def test_fashion_mnist_is_searched_in_order(tmp_path, monkeypatch):
    def darkest(data_path: Path | None) -> int:
        return int(build_dataset("fashion_mnist", "val", data_path).images.min())

    def download(root: str, download: bool) -> None:
        assert download
        write_fashion(Path(root) / "FashionMNIST/raw", gray=30)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    monkeypatch.setattr(datasets, "FASHION_DEBIAN", tmp_path / "debian")
    assert darkest(tmp_path / "here") == 30 and darkest(None) == 30
    assert (tmp_path / "data/FashionMNIST/raw").is_dir()
    write_fashion(tmp_path / "debian", gray=20)
    assert darkest(None) == 20 and darkest(tmp_path / "empty") == 20
    assert darkest(tmp_path / "here") == 30
    write_fashion(tmp_path / "here", gray=10)
    assert darkest(tmp_path / "here") == 10


def test_fashion_mnist_nowhere_says_where_it_looked(tmp_path, monkeypatch):
    def offline(root: str, download: bool) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", offline)
    monkeypatch.setattr(datasets, "FASHION_DEBIAN", tmp_path / "debian")
    with pytest.raises(BadInput, match=r"given.*debian.*Error downloading.*--data_path"):
        build_dataset("fashion_mnist", "train", tmp_path / "given")


@pytest.mark.parametrize("labels", [np.arange(9), np.arange(10) + 1, np.zeros(0)])
def test_fashion_mnist_labels_must_fit_the_images(tmp_path, labels):
    write_fashion(tmp_path)
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(idx_bytes(labels)))
    with pytest.raises(BadInput, match=f"{file.name} holds {len(labels)} labels .* 10 images"):
        build_dataset("fashion_mnist", "val", tmp_path)


# --- idx files ---


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (0, 4, 5)])
def test_read_idx_reads_what_torchvision_reads(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape)
    plain, zipped = tmp_path / "x-ubyte", tmp_path / "x-ubyte.gz"
    plain.write_bytes(idx_bytes(array))
    zipped.write_bytes(gzip.compress(idx_bytes(array)))
    for path in (plain, zipped):
        got = read_idx(path, ndim=len(shape))
        assert got.dtype == np.uint8 and np.array_equal(got, array)
    if array.size:
        assert np.array_equal(read_sn3_pascalvincent_tensor(str(plain)).numpy(), array)


GOOD = idx_bytes(np.random.default_rng(0).integers(0, 256, (6, 4, 5)))
ZIPPED = gzip.compress(GOOD)
BROKEN = {
    "empty": (".idx", b""),
    "header cut": (".idx", GOOD[:9]),
    "pixels cut": (".idx", GOOD[:-1]),
    "pixels too many": (".idx", GOOD + b"0"),
    "floats": (".idx", bytes([0, 0, 13, 3]) + GOOD[4:]),
    "two dimensions": (".idx", bytes([0, 0, 8, 2]) + GOOD[4:]),
    "no idx": (".idx", b"<html>not found</html>"),
    "no gzip": (".gz", GOOD),
    "empty gzip": (".gz", b""),
    "gzip cut": (".gz", ZIPPED[:-20]),
    "gzip tail cut": (".gz", ZIPPED[:-3]),
    "gzip head broken": (".gz", ZIPPED[:10] + bytes([ZIPPED[10] ^ 0xFF]) + ZIPPED[11:]),
    "gzip bit flipped": (".gz", ZIPPED[:60] + bytes([ZIPPED[60] ^ 4]) + ZIPPED[61:]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_read_idx_names_a_broken_file(tmp_path, case):
    suffix, data = BROKEN[case]
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(data)
    with pytest.raises(BadInput) as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value)


def test_read_idx_unpacks_no_bomb(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(10)) + bytes(1 << 26), 9))
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="holds more bytes, but its sizes"):
            read_idx(path, ndim=1)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12))
    with pytest.raises(BadInput, match="4294967295 x 4294967295 x 4294967295 bytes; at most"):
        read_idx(path, ndim=3)


def test_read_idx_names_a_missing_file(tmp_path):
    with pytest.raises(BadInput, match=r"cannot read .*none\.gz"):
        read_idx(tmp_path / "none.gz", ndim=1)


# --- Bad input ---


@pytest.mark.parametrize(
    "given, nearest", [("fashion", "fashion_mnist"), ("photo", "photos"), ("Digit", "digits")]
)
def test_an_unknown_name_lists_the_valid_ones_nearest_first(given, nearest):
    with pytest.raises(BadInput) as caught:
        build_dataset(given, "train")
    message = str(caught.value)
    assert repr(given) in message and f"nearest first: {nearest}," in message
    assert all(name in message for name in DATASETS)


def test_an_unknown_split_is_refused(name, data_path):
    with pytest.raises(BadInput, match=f"unknown split 'test' of {name}; expected train or val"):
        build_dataset(name, "test", data_path)


@pytest.mark.parametrize(
    "make, message",
    [
        ([], r"no images in .*; expected DATA/train/<class>"),
        (["train/"], r"no images in .*train; .*expected DATA/train/<class>"),
        (["a.txt", "notes/b.txt"], r"no images in .*; expected DATA/train/<class>"),
        (["train/cat/a.png", "train/dog/"], r"no image in the class folders dog of .*train"),
        (["train/cat/a.txt"], r"no image in the class folders cat of .*train"),
        (["val/cat/a.png"], r"no folder .*train; expected DATA/train/<class>"),
    ],
)
def test_a_folder_without_images_says_what_was_expected(tmp_path, make, message):
    for entry in make:
        folder, _, file = entry.rpartition("/")
        os.makedirs(tmp_path / folder, exist_ok=True)
        if file:
            (tmp_path / entry).write_bytes(b"")
    with pytest.raises(BadInput, match=f"(?i){message}"):
        build_dataset("imagefolder", "train", tmp_path)


def test_imagefolder_without_a_path_says_what_was_expected():
    with pytest.raises(BadInput, match=r"none was given: .*DATA/train/<class>"):
        build_dataset("imagefolder", "train")


def test_synthetic_refuses_no_channels():
    with pytest.raises(BadInput, match="channels is 0"):
        build_dataset("synthetic", "train", channels=0)


@pytest.mark.parametrize(
    "module, install", [("skimage", "scikit-image"), ("sklearn", "scikit-learn")]
)
def test_photos_without_their_package_name_the_install(monkeypatch, module, install):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput, match=f"pip install {install}"):
        build_dataset("photos", "train")


def test_photos_missing_from_a_package_are_named(monkeypatch, tmp_path):
    import skimage

    monkeypatch.setattr(skimage, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BadInput, match=r"skimage .* ships no .*astronaut.png"):
        build_dataset("photos", "train")
