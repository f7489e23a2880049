"""Whatever the operating system answers, a person reads why; and files that grew are refused.

A packing is refused each of its operations in turn, and goes on to the same files. Every function
that turns such an answer into words is shown every answer.
"""

import errno
import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_disk import FaultyDisk
from PIL import Image
from test_durable_files import Pictures

from util.data.conversions import Conversion, note
from util.data.datasets import read_idx
from util.data.images import BadImage
from util.data.manifest import NAME_ENDS, NAMES, RECORDS
from util.data.packed import PackedSource
from util.data.packing import Recipe, pack
from util.data.sets import stl10
from util.errors import BadInput, CannotWrite, RunFailed
from util.files import (
    OURS,
    AppendedFile,
    at_start,
    build_whole,
    check_folder,
    link,
    reading,
    write_text,
    writing,
)
from util.runs.curves import Curve, draw_curves
from util.train.checkpoint import load_file, save_checkpoint
from util.train.lease import acquire, make_folder
from util.train.logger import RunLogger
from util.train.results import set_others_aside

CODES = [
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE,
    errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.EBUSY, errno.EFBIG,
    errno.ETIMEDOUT, errno.ENODEV,
]  # fmt: skip
BY_CODE = pytest.mark.parametrize("code", CODES, ids=lambda code: errno.errorcode[code])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is synced: a busy disk takes seconds for each. It can be refused all the same."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ---- Every answer has its words ------------------------------------------------------------------


@BY_CODE
def test_every_answer_is_told(code: int, tmp_path: Path) -> None:
    for turn, kind, verb in ((writing, CannotWrite, "write"), (reading, BadInput, "read")):
        with pytest.raises(kind) as caught, turn(tmp_path / "x"):
            raise OSError(code, os.strerror(code), "what torch was at")
        assert str(caught.value) == f"cannot {verb} {tmp_path / 'x'}: {os.strerror(code)}"
    with pytest.raises(BadInput, match="cannot write"), at_start():
        raise CannotWrite("cannot write x")
    assert (BadInput.exit_code, CannotWrite.exit_code) == (2, 1)


def state_of(step: int) -> dict[str, Any]:
    return {"task": "pretrain", "step": step, "w": torch.ones(50)}


def append(folder: Path) -> None:
    with writing(folder / "a"):
        AppendedFile(folder / "a").write(b"more")


def build(folder: Path) -> None:
    with writing(folder / "a"), build_whole(folder / "a") as place:
        place.write_text("new")


def record(folder: Path) -> None:
    RunLogger(folder / "a", None).record("train", 1, loss=0.5)


# What writes into a folder that holds a file a, and what a refusal of it raises.
ACTIONS: dict[str, tuple[Callable[[Path], Any], tuple[type[Exception], ...]]] = {
    "write_text": (lambda folder: write_text(folder / "a", "new"), (CannotWrite,)),
    "link": (lambda folder: link(folder / "a", folder / "b"), (CannotWrite,)),
    "build_whole": (build, (CannotWrite,)),
    "append": (append, (CannotWrite,)),
    "record": (record, (CannotWrite,)),
    "checkpoint": (lambda folder: save_checkpoint(folder, state_of(2), 1), (CannotWrite,)),
    "probe": (check_folder, (BadInput,)),
    "lease": (lambda folder: acquire(folder).release(), (BadInput,)),
    "new folder": (lambda folder: make_folder(folder / "more/inner"), (BadInput,)),
    "set aside": (lambda folder: set_others_aside(folder, ["a"], {"of": "x"}), (CannotWrite,)),
}  # fmt: skip


@BY_CODE
@pytest.mark.parametrize("action", ACTIONS)
def test_each_operation_of_it_is_refused_in_turn(
    action: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works without it, or says why not; what was there stays, and nothing is left behind."""
    act, kinds = ACTIONS[action]

    def attempt(refuse: int) -> tuple[FaultyDisk, Exception | None, Path]:
        folder = tmp_path / str(refuse)
        folder.mkdir()
        (folder / "a").write_text("old")
        disk, error = FaultyDisk(folder, refuse, code, lasting=False), None
        with disk.in_place(monkeypatch):
            try:
                act(folder)
            except kinds as caught:
                error = caught
        return disk, error, folder

    done = attempt(-1)[0].done
    assert done
    refused = 0
    for number in range(len(done)):
        disk, error, folder = attempt(number)
        context = f"{disk.done[number]}: {error}"
        if error is not None:
            refused += 1
            # pathlib takes a name that leads in circles for one that is not there.
            circles = code == errno.ELOOP and "File exists" in str(error)
            assert os.strerror(code) in str(error) or circles, context
            if action not in ("append", "record"):  # which grow it
                kept = [p for p in folder.iterdir() if p.name.startswith("a")]
                assert any(p.read_text() in ("old", "new") for p in kept), context
        left = [p.name for p in folder.iterdir() if OURS.fullmatch(p.name)]
        # Unless it was the removal itself that was refused.
        removing = ("unlink", "fstat") if action == "build_whole" else ("unlink",)
        assert not left or error is None or disk.done[number].startswith(removing), context
    assert refused


@BY_CODE
def test_an_earlier_measurement_that_cannot_be_read_is_set_aside(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "result.json").write_text("{}")
    original = Path.read_text

    def refused(path: Path, *rest: Any, **named: Any) -> str:
        if path.name == "result.json":
            raise OSError(code, os.strerror(code))
        return original(path, *rest, **named)

    monkeypatch.setattr(Path, "read_text", refused)
    set_others_aside(tmp_path, ["result.json"], {})
    assert [p.name for p in tmp_path.iterdir()] == ["result-1.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_picture_of_curves_that_cannot_be_written(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    curves = [("one", Curve("one", [1, 2], [0.5, 0.4], {}, {}))]
    draw_curves(curves, tmp_path / "curves.png")
    before = (tmp_path / "curves.png").read_bytes()
    assert before.startswith(b"\x89PNG")

    def refuse(*rest: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CannotWrite, match=os.strerror(code)):
        draw_curves(curves, tmp_path / "curves.png")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    unchanged = (tmp_path / "curves.png").read_bytes() == before  # pytest would compare by line
    assert unchanged


# ---- A packing -----------------------------------------------------------------------------------

# 64 images a shard: three shards.
COUNT = 140


class Broken(Pictures):
    """Some cannot be decoded, some are converted, and one may not be readable at all."""

    def __init__(self, bad: tuple[int, ...] = (3, 70, 130), unreadable: int = -1) -> None:
        super().__init__(COUNT)
        self.bad, self.unreadable = bad, unreadable

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index in self.bad:
            raise BadImage(self.file_name(index), "broken for this test")
        if index == self.unreadable:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if index % 50 == 5:
            note([Conversion.CMYK], self.file_name(index))
        return super().__getitem__(index)


def packing(folder: Path, source: Pictures | None = None, limit: int = 9) -> dict[str, Any]:
    recipe = Recipe("raw", 0, 90)
    return pack(source or Broken(), folder, recipe, {}, num_workers=0, max_bad_images=limit)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def same_files(folder: Path, other: Path) -> None:
    """By name: of long contents pytest would make a comparison that takes minutes."""
    mine, theirs = contents(folder), contents(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "train"
    assert packing(folder)["images"] == COUNT - 3
    return folder


def points(done: list[str]) -> list[int]:
    """The first, one in the middle and the last of operations that are the same."""
    starts = [i for i, name in enumerate(done) if not i or done[i - 1] != name]
    ends = [*starts[1:], len(done)]
    return sorted({n for s, e in zip(starts, ends, strict=True) for n in (s, (s + e) // 2, e - 1)})


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_packing_is_refused_each_operation_in_turn(
    code: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk stays full. The same command then goes on to the same files."""
    disk = FaultyDisk(tmp_path / "none", lasting=False)
    with disk.in_place(monkeypatch):
        packing(tmp_path / "none")
    done, told = disk.done, 0
    for refuse in points(done):
        folder = tmp_path / str(refuse)
        disk = FaultyDisk(folder, refuse, code, lasting=code == errno.ENOSPC)
        with disk.in_place(monkeypatch):
            try:
                packing(folder)
            except (BadInput, RunFailed) as error:
                told += 1
                context = f"{done[refuse]}: {error}"
                assert os.strerror(code) in str(error), context
                assert "reading" not in str(error) and "checkpoint" not in str(error), context
                if ".bin.tmp" in done[refuse] and done[refuse].startswith("write"):
                    assert "cannot write" in str(error) and "of 3 shards" in str(error), context
        packing(folder)
        same_files(folder, whole)
        shutil.rmtree(folder)
    assert told > len(points(done)) / 2


def test_an_image_that_cannot_be_read_is_no_fault_of_the_disk_written_to(tmp_path: Path) -> None:
    with pytest.raises(RunFailed) as caught:
        packing(tmp_path / "train", Broken(unreadable=100))
    assert "cannot read 100.png: Stale file handle" in str(caught.value)
    assert not list((tmp_path / "train").glob(".*"))
    assert (tmp_path / "train/shard-00000.bin.json").exists()


@pytest.fixture
def cut_off(whole: Path, tmp_path: Path) -> Path:
    """A packing whose first two shards are whole, and no more."""
    folder = Path(shutil.copytree(whole, tmp_path / "train"))
    for path in folder.iterdir():
        if not path.name.startswith(("shard-00000", "shard-00001", "packing")):
            path.unlink()
    return folder


def test_shards_that_are_kept_keep_their_counts(
    cut_off: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images, bad images and conversions of before count with those of now."""
    kept = {p.name: p.stat().st_ino for p in cut_off.glob("shard*")}
    capsys.readouterr()
    about = packing(cut_off)
    out = capsys.readouterr().out
    assert about["images"] == COUNT - 3
    same_files(cut_off, whole)
    assert {n: (cut_off / n).stat().st_ino for n in kept} == kept  # not packed twice
    assert "(3 images so far, such as 005.png)" in out  # 5 and 55 of kept shards, 105 is not
    listed = (cut_off / "bad_images.txt").read_text().splitlines()
    assert [line[:7] for line in listed] == ["003.png", "070.png", "130.png"]
    assert len(PackedSource(cut_off, "train")) == COUNT - 3


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_bad_images_of_kept_shards_count_towards_too_many(limit: int, cut_off: Path) -> None:
    with pytest.raises(RunFailed, match=r"images? cannot be decoded, more than --max_bad_images"):
        packing(cut_off, limit=limit)
    listed = (cut_off / "bad_images.txt").read_text().splitlines()
    # With two in what is kept, nothing more is packed where one is too many.
    assert len(listed) == (3 if limit == 2 else 2)
    assert packing(cut_off, limit=3)["images"] == COUNT - 3


# ---- Files that grew -----------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["longer", "shorter"])
@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00002.bin", RECORDS, NAMES, NAME_ENDS])
def test_a_packed_file_of_another_length_is_refused(
    change: str, name: str, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "train"))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data + b"\0" if change == "longer" else data[:-1])
    with pytest.raises(BadInput, match=name):
        PackedSource(folder, "train")


@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_a_kept_shard_of_another_length_is_packed_once_more(
    change: str, cut_off: Path, whole: Path
) -> None:
    path = cut_off / "shard-00001.bin"
    data = path.read_bytes()
    path.write_bytes(data + b"\0" if change == "longer" else data[:-1])
    packing(cut_off)
    same_files(cut_off, whole)


def idx_file(path: Path, extra: int, zipped: bool) -> Path:
    data = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 3, 4) + bytes(range(24))
    data = data + b"\0" * extra if extra >= 0 else data[:extra]
    path = path.with_suffix(".gz") if zipped else path
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("extra", [-1, 0, 1, 1000])
def test_an_idx_file_of_another_length(extra: int, zipped: bool, tmp_path: Path) -> None:
    path = idx_file(tmp_path / "images", extra, zipped)
    if not extra:
        assert np.array_equal(read_idx(path, 3), np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
        return
    with pytest.raises(BadInput, match=f"holds {39 if extra < 0 else 'more'} bytes, but its sizes"):
        read_idx(path, 3)


@pytest.mark.parametrize("file", ["train_X.bin", "train_y.bin"])
@pytest.mark.parametrize("extra", [-1, 0, 1, stl10.IMAGE_BYTES])
def test_an_stl10_file_of_another_length(
    file: str, extra: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stl10.COUNTS, "train", 2)
    for name, size in (("train_X.bin", 2 * stl10.IMAGE_BYTES), ("train_y.bin", 2)):
        (tmp_path / name).write_bytes(b"\1" * (size + (extra if name == file else 0)))
    if not extra:
        assert len(stl10.stl10("train", tmp_path)) == 2
        return
    with pytest.raises(BadInput, match=f"{file} holds"):
        stl10.stl10("train", tmp_path)


@pytest.mark.parametrize("extra", [b"\0", b"mmae-sha256:", b"1" * 76, b"1" * 70_000])
def test_a_checkpoint_that_grew_is_refused(extra: bytes, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_of(1))
    with path.open("ab") as file:
        file.write(extra)
    with pytest.raises(BadInput, match=r"is not readable|holds a run of this program"):
        load_file(path)


def test_an_index_that_grew_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "train"))
    about = json.loads((folder / "packed.json").read_bytes())
    for changed in (about | {"more": 1}, {**about, "images": about["images"] + 1}):
        (folder / "packed.json").write_text(json.dumps(changed))
        with pytest.raises(BadInput, match=r"packed\.json"):
            PackedSource(folder, "train")
