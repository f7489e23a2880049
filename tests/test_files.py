"""Files appear whole or not at all, and what killed writers leave is swept."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest
from launch import CONTEXT, until

from util import files
from util.errors import CannotWrite
from util.files import (
    build_whole,
    check_folder,
    link,
    open_whole,
    sweep,
    temporary_name,
    write_text,
)
from util.train.checkpoint import LAST, save_checkpoint


def state_of(step: int) -> dict:
    return {"task": "pretrain", "step": step}


def test_two_names_of_one_process_never_meet() -> None:
    names = {temporary_name(Path("run/checkpoint-last.pth")) for _ in range(1000)}
    assert len(names) == 1000 and all(files.OURS.fullmatch(p.name) for p in names)


def test_a_long_name_has_a_temporary_one_too(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 125 + ".txt")
    write_text(path, "content")
    assert path.read_text() == "content" and len(list(tmp_path.iterdir())) == 1


def test_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_killed_link_cannot_change_a_numbered_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """Killed between link and rename, and started again with the same process number."""
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == LAST:
            raise KeyboardInterrupt  # whatever ends a process there: nothing is cleaned up
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        patch.setattr(os, "getpid", lambda: 17)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, state_of(1), 1)
    before = (tmp_path / "checkpoint-1.pth").read_bytes()
    monkeypatch.setattr(os, "getpid", lambda: 17)
    save_checkpoint(tmp_path, state_of(2))  # checkpoint-last.pth alone
    assert (tmp_path / "checkpoint-1.pth").read_bytes() == before
    assert sweep(tmp_path, owned=True) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1.pth", LAST}


def test_one_file_under_two_names_is_stored_once(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_of(1), 1)
    assert path.samefile(tmp_path / LAST)


def test_linking_a_file_to_its_own_name_leaves_nothing(tmp_path: Path) -> None:
    """Renaming one name of a file to another of its names does nothing: both stay."""
    (tmp_path / "a").write_text("content")
    for _ in range(2):
        link(tmp_path / "a", tmp_path / "b")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_where_there_are_no_links_it_is_a_copy(tmp_path: Path, monkeypatch) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), fsync(handle)))
    (tmp_path / "a").write_text("content")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "content" and len(synced) == 2  # file and folder
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


EARLIER_LEFTOVERS = [
    ".checkpoint-last.pth.12.tmp", ".checkpoint-399.pth.4711.tmp", ".checkpoint-best.pth.1.tmp",
    ".checkpoint-last-pretrain.pth.5.tmp", ".config.yaml.7.tmp", ".config-finetune.yaml.7.tmp",
    ".bad_images.txt.7.tmp", ".result.json.7.tmp", ".probe.7", ".features-train.npy.tmp",
    ".nonfinite-step7-rank0.json.9.tmp",
]  # fmt: skip
NOT_OURS = [
    "checkpoint-1.pth", ".notes.txt.12.tmp", "a.mmae-tmp", ".a.mmae-tmp", ".git", "x.tmp",
    ".x.0123456789abcdef.mmae-tmp.bak", ".checkpoint-last.pth.tmp", "checkpoint-last.pth.12.tmp",
    ".x.0123456789ABCDEF.mmae-tmp", ".checkpoint-last.pth.12.tmp~",
]  # fmt: skip


def test_a_sweep_takes_ours_alone(tmp_path: Path) -> None:
    ours = [".a b\n.0123456789abcdef.mmae-tmp", ".checkpoint-1.pth.00000000000000ff.mmae-tmp"]
    for name in (*ours, *EARLIER_LEFTOVERS, *NOT_OURS):
        (tmp_path / name).write_text("")
    folder = tmp_path / ".vit.0123456789abcdef.mmae-tmp"
    (folder / "vit").mkdir(parents=True)
    # Not the folder's owner: an earlier version may still write what nobody locks.
    assert sweep(tmp_path) == len(ours) + 1
    assert {p.name for p in tmp_path.iterdir()} == {*EARLIER_LEFTOVERS, *NOT_OURS}
    assert sweep(tmp_path, owned=True) == len(EARLIER_LEFTOVERS)
    assert {p.name for p in tmp_path.iterdir()} == set(NOT_OURS)


def test_old_leftovers_need_no_owner(tmp_path: Path) -> None:
    path = tmp_path / ".result.json.7.tmp"
    path.write_text("")
    os.utime(path, (time.time() - 2 * files.DAY,) * 2)
    assert sweep(tmp_path) == 1


def write_for_ever(folder: Path) -> None:
    with open_whole(folder / "long") as file, build_whole(folder / "folder") as place:
        file.write(b"half")
        file.flush()
        place.mkdir()
        (folder / "ready").write_text("")
        time.sleep(600)


def test_a_living_writers_file_stays_and_a_killed_ones_goes(tmp_path: Path) -> None:
    child = CONTEXT.Process(target=write_for_ever, args=(tmp_path,))
    child.start()
    try:
        until(lambda: (tmp_path / "ready").exists() or not child.is_alive())
        assert sweep(tmp_path, owned=True) == 0 and len(list(tmp_path.iterdir())) == 3
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert sweep(tmp_path) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["ready"]


def test_anothers_sweep_leaves_the_probe_of_a_folder(tmp_path: Path, monkeypatch) -> None:
    """All processes of a run probe and sweep its folder, at about the same time."""
    unlink, swept = Path.unlink, []

    def late(path: Path, missing_ok: bool = False) -> None:
        if not swept:  # another process sweeps just before
            swept.append(path)
            assert sweep(path.parent) == 0
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    check_folder(tmp_path)
    assert swept and not list(tmp_path.iterdir())


def test_without_locks_age_decides(tmp_path: Path, monkeypatch) -> None:
    def refuse(*rest: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    write_text(tmp_path / "a", "written all the same")
    left = temporary_name(tmp_path / "b")
    left.write_text("")
    assert sweep(tmp_path) == 0 and sweep(tmp_path, owned=True) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_what_was_there_stays(code: int, tmp_path: Path, monkeypatch) -> None:
    write_text(tmp_path / "a", "before")

    def refuse(*rest: object) -> None:
        raise OSError(code, os.strerror(code))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(CannotWrite, match=f"a: {os.strerror(code)}"):
                write_text(tmp_path / "a", "after")
        assert (tmp_path / "a").read_text() == "before"
        assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_record_that_a_full_disk_cuts_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left"):
        files.AppendedFile(Path("/dev/full")).write(b"record\n")
