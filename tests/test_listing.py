"""Listing of image folders, against torchvision's, and the cache of the listing."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from torch.utils.data import DataLoader, Dataset

import util.data.listing as listing
from util import files
from util.data.folders import FolderSource, folder_by_class
from util.data.listing import Names, cache_file, list_images
from util.errors import BadInput

FILES = [
    "b/2.jpg", "b/10.jpg", "b/1.JPEG", "b/.hidden.png", "b/note.txt", "b/.jpg", "b/x.jpg.part",
    "a/sub/deep/1.webp", "a/sub/2.png", "a/sub-1/3.bmp", "a/sub.x/4.tif", "a/5.ppm", "a/Z/6.pgm",
    "a/sub/deep.png/7.tiff", "a/empty/note.txt", "\u00e4 \u4e2d \U0001f600/8.jpg", "B/9.jPg",
    os.fsdecode(b"\xff\xfe/\xe9.jpg"), "c/new\nline.jpg", ".dotted/1.jpg",
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MMAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(root: Path, files: list[str]) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def age(root: Path) -> None:
    """Let each folder have changed long ago; a listing of what just changed is not kept."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1e9, 1e9))


@pytest.fixture
def root(tmp_path) -> Path:
    write(tmp_path / "data", FILES)
    age(tmp_path / "data")
    return tmp_path / "data"


def samples(root: Path) -> list[tuple[str, int]]:
    found = list_images(root)
    return [(os.path.join(root, f), int(k)) for f, k in zip(found.files, found.labels, strict=True)]


def torchvisions(root: Path) -> list[tuple[str, int]]:
    """torchvision's samples without hidden names, labelled by the classes that are left."""
    reference = torchvision.datasets.ImageFolder(str(root))
    classes = [name for name in reference.classes if not name.startswith(".")]
    assert list_images(root).classes == classes
    return [
        (path, classes.index(reference.classes[label]))
        for path, label in reference.samples
        if "/." not in path.removeprefix(str(root))
    ]


def forbid(monkeypatch) -> None:
    def scan(root):
        raise AssertionError("listed again")

    monkeypatch.setattr(listing, "scan", scan)


# --- As torchvision ---


def test_the_listing_is_torchvisions(root):
    for _ in range(2):  # listed, then from the cache
        assert samples(root) == torchvisions(root)
    assert len(samples(root)) == 14


def test_links_are_followed_as_torchvision_does(root):
    write(root.parent / "elsewhere", ["1.jpg", "more/2.jpg"])
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root / "a/linked").symlink_to(root.parent / "elsewhere/more")
    (root / "b/file.jpg").symlink_to(root / "b/2.jpg")
    (root / "b/dangling.jpg").symlink_to("nowhere")
    (root / "b/dangling").symlink_to("nowhere")
    (root / "b/circle.jpg").symlink_to("circle.jpg")
    (root / "dangling").symlink_to("nowhere")
    (root / "c/pipe.jpg").symlink_to("/dev/zero")
    assert samples(root) == torchvisions(root) and len(samples(root)) == 21


def test_the_arrays_are_small(root):
    found = list_images(root)
    assert found.labels.dtype == np.int32 and found.files.data.dtype == np.uint8
    # Not as wide as the longest name for each.
    long = Names.of(["x" * 200, *(f"{i}.jpg" for i in range(10_000))])
    assert long.data.nbytes < 100_000 and long[0] == "x" * 200 and long[10_000] == "9999.jpg"


def test_names_are_a_sequence():
    names = ["a", "", "äö", os.fsdecode(b"\xff"), "b"]
    stored = Names.of(iter(names))
    assert list(stored) == names and len(stored) == 5
    assert list(Names.of([])) == [] and list(pickle.loads(pickle.dumps(stored))) == names
    for index in (-1, 5):
        with pytest.raises(IndexError):
            stored[index]


# --- Refused ---


@pytest.mark.parametrize(
    "files, message",
    [
        ([], "no images in .*; expected <class>/"),
        (["1.jpg"], "has no class folders; .*expected <class>/"),
        (["a/1.jpg", "b/1.txt", "c/d/x"], r"no image in the class folders b, c of .*\.jpg, \.jpeg"),
        ([f"{i:02}/x" for i in range(12)], "folders 00, 01, 02, 03, 04 and 7 more of"),
    ],
)
def test_a_folder_without_images_is_refused_also_from_the_cache(tmp_path, files, message):
    root = write(tmp_path / "data", files)
    root.mkdir(exist_ok=True)
    age(root)
    for _ in range(2):
        with pytest.raises(BadInput, match=message):
            folder_by_class("places365", "train", root, "<class>/*")


def test_a_folder_in_itself_is_refused(root):
    (root / "a/sub/loop").symlink_to(root / "a")
    with pytest.raises(BadInput, match="sub/loop is a link to a folder that contains it"):
        list_images(root)


def test_a_folder_that_cannot_be_read_is_refused(root, monkeypatch):
    def scandir(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    original = os.scandir
    monkeypatch.setattr(listing.os, "scandir", scandir)
    with pytest.raises(BadInput, match=r"cannot list .*a/sub: Permission denied"):
        list_images(root)


# --- The cache ---


def test_an_unchanged_folder_is_not_listed_again(root, monkeypatch):
    expected = samples(root)
    forbid(monkeypatch)
    assert samples(root) == expected
    assert samples(root.parent / "data/../data") != []  # another name of the same folder


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "b/new.jpg").write_bytes(b""),
        lambda root: (root / "b/2.jpg").unlink(),
        lambda root: (root / "b/2.jpg").rename(root / "b/3.jpg"),
        lambda root: (root / "a/sub/deep/new.jpg").write_bytes(b""),
        lambda root: write(root, ["new/1.jpg"]),
        lambda root: (root / "B/9.jPg").unlink() or (root / "B").rmdir(),
        lambda root: (root / "c").rename(root / "d"),
    ],
    ids=["added", "removed", "renamed", "added deep", "new class", "class gone", "class renamed"],
)
def test_a_changed_folder_is_listed_again(root, change):
    before = samples(root)
    change(root)
    after = samples(root)
    assert after != before
    assert after == torchvisions(root)


def test_a_folder_that_just_changed_is_not_kept(root, cache):
    """A file that comes within the same tick of the clock leaves the folder's time as it is."""
    (root / "b/new.jpg").write_bytes(b"")
    samples(root)
    assert not cache.exists()
    stamp = (root / "b").stat()
    (root / "b/newer.jpg").write_bytes(b"")
    os.utime(root / "b", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert any(path.endswith("newer.jpg") for path, _ in samples(root))


@pytest.mark.parametrize("damage", ["empty", "short", "cut", "flipped", "zeros", "pickle"])
def test_a_damaged_cache_is_said_and_mended(root, cache, capsys, monkeypatch, damage):
    expected = samples(root)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    flipped = whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]
    file.write_bytes(
        {
            "empty": b"",
            "short": whole[:10],
            "cut": whole[:-1],
            "flipped": flipped,
            "zeros": bytes(len(whole)),
            "pickle": pickle.dumps(expected),
        }[damage]
    )
    assert samples(root) == expected
    assert f"{file} is damaged" in capsys.readouterr().out
    assert file.read_bytes() == whole
    forbid(monkeypatch)
    assert samples(root) == expected


def test_a_cache_runs_no_pickle(root, cache, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    samples(root)
    (file,) = cache.iterdir()
    array = np.empty(1, dtype=object)
    array[0] = Evil()
    with (tmp_path / "evil.npz").open("wb") as stream:
        np.savez(stream, files_data=array)
    content = (tmp_path / "evil.npz").read_bytes()
    file.write_bytes(listing.DIGEST(content).digest() + content)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        samples(root)
    assert not (tmp_path / "evil").exists()


def test_another_version_is_another_cache(root, monkeypatch):
    samples(root)
    monkeypatch.setattr(listing, "VERSION", listing.VERSION + 1)
    forbid(monkeypatch)
    with pytest.raises(AssertionError, match="listed again"):
        samples(root)


def test_two_folders_have_two_caches(root, cache):
    other = write(root.parent / "other", ["x/1.jpg"])
    age(other)
    assert [len(samples(root)), len(samples(other)), len(list(cache.iterdir()))] == [14, 1, 2]
    assert len(samples(root)) == 14


@pytest.mark.parametrize("obstacle", ["a file in its place", "full", "no rename"])
def test_a_cache_that_cannot_be_written_does_not_matter(root, cache, capsys, monkeypatch, obstacle):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if obstacle == "a file in its place":
        cache.write_text("")
    elif obstacle == "full":
        monkeypatch.setattr(files, "create_temporary", fail)
    else:
        monkeypatch.setattr(files.os, "replace", fail)
    assert samples(root) == torchvisions(root)
    assert "not kept" in capsys.readouterr().out
    assert not cache.is_dir() or not list(cache.iterdir())


def test_the_cache_is_in_the_home_unless_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MMAE_CACHE")
    assert cache_file("/data").parent == tmp_path / "home/.cache/mmae"


def test_the_second_start_of_many_files_asks_for_folders_alone(tmp_path, monkeypatch):
    """50,000 files in 20 folders: each folder is listed once, and never again."""
    root, listed = tmp_path / "data", []
    for label in range(20):
        (root / f"{label:02d}").mkdir(parents=True)
        for i in range(2500):
            os.close(os.open(root / f"{label:02d}/{i}.jpg", os.O_CREAT | os.O_WRONLY))
    age(root)

    def counting(path):
        listed.append(path)
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", counting)
    first = list_images(root)
    assert len(first.files) == 50_000 and len(listed) == 21
    second = list_images(root)
    assert len(listed) == 21
    assert np.array_equal(first.labels, second.labels) and list(first.files) == list(second.files)
    source = FolderSource("x", "train", root, second.files, second.labels, second.classes)
    assert len(pickle.dumps(source)) < 2_000_000  # 40 bytes a file


# --- Memory ---


class Memory(Dataset):
    """Reads every name and tells how much memory of its own the process then has."""

    def __init__(self, source: FolderSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        for i in range(len(self.source) if index else 0):
            self.source.file_name(i)
        fields = Path("/proc/self/smaps_rollup").read_text().split("Private_Dirty:")
        return int(fields[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_share_the_listing(root):
    """Of 400,000 names, 8 MB, a worker that reads them all owns next to nothing."""
    count = 400_000
    names = Names.of(f"a/{i:08d}.jpg.jpeg" for i in range(count))
    source = FolderSource("x", "train", root, names, np.zeros(count, np.int32), ["a"])
    assert len(pickle.dumps(source)) < 12_500_000
    loader = DataLoader(Memory(source), batch_size=1, num_workers=1, multiprocessing_context="fork")
    before, after = (int(kilobytes) for kilobytes in loader)
    assert after - before < 2000
