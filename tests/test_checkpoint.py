"""Checkpoints: whole or not at all, verified, and never run."""

import ctypes
import errno
import os
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from launch import CONTEXT, TINY, launch, repetitions, trial_seed, until, wait
from trained import Trained

import main_pretrain
from util import files
from util.errors import CannotWrite
from util.train.checkpoint import LAST, load_file, newest, save_checkpoint, verify


def state_of(step: int, task: str = "pretrain", size: int = 1000) -> dict:
    return {"task": task, "step": step, "model": {"w": torch.full((size,), float(step))}}


def save_for_ever(folder: Path) -> None:
    """Save larger and larger steps, a number of them under a name of their own."""
    torch.set_num_threads(1)
    found = newest(folder, "pretrain").path
    step = load_file(found)["step"] if found else 0
    while True:
        step += 1
        save_checkpoint(
            folder, state_of(step, size=500_000), step if step % 3 == 0 else None, keep=2
        )
        (folder / "done").write_text(str(step))


@pytest.mark.dist
def test_kills_while_saving_leave_a_readable_checkpoint(tmp_path: Path) -> None:
    for trial in repetitions(15, 50):
        child = CONTEXT.Process(target=save_for_ever, args=(tmp_path,))
        child.start()
        mark = tmp_path / "done"
        mark.unlink(missing_ok=True)
        until(mark.exists, pause=0.002)
        time.sleep(random.Random(trial_seed(trial)).uniform(0, 0.08))
        child.kill()
        child.join()
        text = mark.read_text()
        found = newest(tmp_path, "pretrain")
        assert found.path is not None and not found.skipped
        state = load_file(found.path)
        assert state["step"] >= int(text or 0)
        assert (state["model"]["w"] == state["step"]).all()


def flipped(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def damage_cases() -> list[str]:
    return ["truncated", "empty", "tail", "text", *(f"bit {i}" for i in range(40))]


@pytest.mark.parametrize("case", damage_cases())
def test_the_one_before_a_damaged_one_is_taken(case: str, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state_of(step), step)
    (tmp_path / LAST).unlink()
    path = tmp_path / "checkpoint-3.pth"
    size = path.stat().st_size
    if case == "truncated":
        os.truncate(path, size // 2)
    elif case == "empty":
        os.truncate(path, 0)
    elif case == "tail":
        os.truncate(path, size - 1)
    elif case == "text":
        path.write_text("not a checkpoint")
    else:
        flipped(path, random.Random(case).randrange(size * 8))
    assert verify(path) is not None
    found = newest(tmp_path, "pretrain")
    assert found.path == tmp_path / "checkpoint-2.pth"
    assert len(found.skipped) == 1 and "checkpoint-3.pth" in found.skipped[0]


def test_every_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_of(1, size=4))
    whole = path.read_bytes()
    unseen = []
    for bit in range(0, len(whole) * 8, 7):
        flipped(path, bit)
        if verify(path) is None:
            unseen.append(bit)
        path.write_bytes(whole)
    assert not unseen and verify(path) is None


def test_the_step_inside_decides_and_other_tasks_do_not(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(7), 0)
    (tmp_path / LAST).rename(tmp_path / "checkpoint-5.pth")
    save_checkpoint(tmp_path, state_of(9, task="finetune"), 99)
    assert newest(tmp_path, "pretrain").path == tmp_path / "checkpoint-5.pth"
    assert newest(tmp_path, "finetune").path == tmp_path / LAST
    assert newest(tmp_path, "segment").path is None


def test_keeping_some_never_deletes_another_tasks(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(1, task="finetune"), 7)
    for epoch in range(4):
        save_checkpoint(tmp_path, state_of(epoch + 1), epoch, keep=2)
    names = {p.name for p in tmp_path.iterdir()}
    moved = "checkpoint-last-finetune.pth"
    assert names == {"checkpoint-2.pth", "checkpoint-3.pth", "checkpoint-7.pth", LAST, moved}


def test_files_are_plain_torch_files(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_of(1))
    assert torch.load(path, weights_only=True)["step"] == 1  # without our reader


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("signed", [False, True])
def test_a_malicious_checkpoint_does_not_run(signed: bool, tmp_path: Path, run_main) -> None:
    folder, mark = tmp_path / "run", tmp_path / "ran"
    folder.mkdir()
    evil = state_of(1) | {"payload": Evil(mark)}
    if signed:
        save_checkpoint(folder, evil, 4)
    else:
        torch.save(evil, folder / LAST)
    code, _, err = run_main("main_pretrain", [*TINY, f"--output_dir={folder}"])
    assert code == 2 and "none is readable" in err
    path = folder / LAST
    code, _, err = run_main(
        "main_pretrain", [*TINY, f"--output_dir={tmp_path / 'new'}", f"--resume={path}"]
    )
    assert code == 2 and "could run code" in err and "weights_only" not in err
    assert not mark.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_loses_nothing(code: int, tmp_path: Path, monkeypatch) -> None:
    save_checkpoint(tmp_path, state_of(1), 1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(CannotWrite, match=os.strerror(code)):
        save_checkpoint(tmp_path, state_of(2), 2)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def limit_file_size() -> None:
    """As a full disk does, writing stops with an error in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))


def obey_permissions() -> None:
    """Give up root's right to write anywhere (CAP_DAC_OVERRIDE), and no other.

    Another user would find a folder read-only as well, but might not see this checkout, out of
    which torch still imports while it runs.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low words, high words
    override = 1 << 1
    if libc.capget(header, sets) == 0:
        sets[0] &= ~override
        sets[1] &= ~override
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.dist
def test_disk_full_in_the_middle_of_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = [*TINY, f"--output_dir={folder}"]
    children = launch(flags, tmp_path / "out", prepare=limit_file_size)
    assert wait(children) == [1]  # not bad input: the run had begun
    text = (tmp_path / "out").read_text()
    assert "cannot write" in text and "Traceback" not in text and "File too large" in text
    assert not list(folder.glob("*.pth")) and not list(folder.glob(".*"))
    assert wait(launch(flags, tmp_path / "out2")) == [0]  # the same command, with space


@pytest.mark.dist
def test_read_only_folder_is_known_before_the_first_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    main_pretrain.main([*TINY, "--epochs=1", f"--output_dir={folder}"])
    for path in (folder, *folder.iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    flags = [*TINY, "--epochs=1", f"--output_dir={folder}"]
    assert wait(launch(flags, tmp_path / "out", prepare=obey_permissions)) == [2]
    text = (tmp_path / "out").read_text()
    assert f"cannot write to folder {folder}" in text and "Traceback" not in text
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


CHANGES = {
    "model": (["--model=mae_vit_micro_patch8"], "model"),
    "term": (["--lscale_init=none"], "lscale_init"),
    "mask": (["--mask=random"], "mask"),
    "lr": (["--blr=1e-4"], "blr"),
    "epochs": (["--epochs=9"], "epochs"),
    "batch": (["--batch_size=48"], "global_batch"),
    "seed": (["--seed=4"], "seed"),
    "precision": (["--precision=bf16"], "precision"),
    "data": (["--dataset=digits", "--in_chans=3"], "dataset"),
}


@pytest.fixture(scope="module")
def finished(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return shutil.copytree(trained("main_pretrain", [*TINY, "--epochs=2"]), folder)


@pytest.mark.parametrize("case", CHANGES)
def test_changed_arithmetic_is_refused_with_the_difference(
    case: str, finished: Path, run_main
) -> None:
    flags, named = CHANGES[case]
    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    code, _, err = run_main(
        "main_pretrain", [*TINY, "--epochs=2", f"--output_dir={finished}", *flags]
    )
    assert code == 2 and f"{named}: was" in err and "--allow_changes" in err
    assert {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()} == before


def test_changed_arithmetic_is_taken_when_told(finished: Path, tmp_path: Path, run_main) -> None:
    folder = tmp_path / "longer"
    code, out, _ = run_main(
        "main_pretrain",
        [*TINY, "--epochs=3", f"--output_dir={folder}", f"--resume={finished / LAST}",
         "--allow_changes"],
    )  # fmt: skip
    assert code == 0 and "epochs: was 2, is 3" in out
    assert load_file(folder / LAST)["step"] == 30


def test_another_tasks_checkpoint_is_refused(tmp_path: Path, run_main) -> None:
    path = save_checkpoint(tmp_path, state_of(3, task="finetune"), 0)
    code, _, err = run_main(
        "main_pretrain", [*TINY, f"--output_dir={tmp_path / 'run'}", f"--resume={path}"]
    )
    assert code == 2 and "finetune" in err


def test_housekeeping_may_change(finished: Path) -> None:
    flags = ["--batch_size=12", "--accum_iter=2", "--log_every=5", "--num_workers=1", "--keep=1"]
    main_pretrain.main([*TINY, "--epochs=2", f"--output_dir={finished}", *flags])
