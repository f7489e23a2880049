"""The operating system refuses: one line, the right exit code, and nothing lost."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faulty_disk import FaultyDisk
from launch import TINY
from runs import records
from trained import Trained

import main_pretrain
from util.errors import EXIT_STOPPED
from util.files import EARLIER, OURS
from util.train.agreement import Agreement, Wish
from util.train.checkpoint import LAST, load_file, newest

# Of hundreds of runs, each in a tenth of a second.
pytestmark = pytest.mark.usefixtures("small_models")
# Two epochs of two steps, a numbered checkpoint after each.
FLAGS = [
    *TINY, "--model=mae_vit_pico_patch4", "--epochs=2", "--train_images=8", "--batch_size=4",
    "--save_every=1",
]  # fmt: skip
PARTS = 6
VALUES = ("step", "loss", "lr", "grad_norm")


def stopped_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a run is asked to stop after so many steps."""
    original, steps = Agreement.after_step, [0]

    def after_step(self: Agreement) -> Wish:
        steps[0] += 1
        return Wish(stop=signal.SIGTERM) if steps[0] == step else original(self)

    monkeypatch.setattr(Agreement, "after_step", after_step)


@pytest.fixture(scope="module")
def whole(small_models: None, trained: Trained) -> Path:
    return trained("main_pretrain", FLAGS)


@pytest.fixture(scope="module")
def begun(small_models: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in the middle of the second epoch."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
        stopped_after(3, patch)
        main_pretrain.main([*FLAGS, f"--output_dir={folder}"])
    return folder


def same_end(folder: Path, whole: Path) -> None:
    """Whether a run came to the end of the undisturbed one, and left nothing behind."""
    mine, theirs = load_file(folder / LAST), load_file(whole / LAST)
    assert mine["step"] == theirs["step"] == 4
    assert all(torch.equal(mine["model"][k], v) for k, v in theirs["model"].items())
    for kind in ("train", "epoch"):
        a, b = ([[r.get(k) for k in VALUES] for r in records(f, kind)] for f in (folder, whole))
        assert a == b
    assert not leftovers(folder)


def leftovers(folder: Path) -> list[str]:
    return [n for n in os.listdir(folder) if OURS.fullmatch(n) or EARLIER.fullmatch(n)]


def points(done: list[str]) -> list[int]:
    """The first of operations that are the same; of many also one in the middle, and the last."""
    starts = [i for i, name in enumerate(done) if not i or done[i - 1] != name]
    found = []
    for start, end in zip(starts, [*starts[1:], len(done)], strict=True):
        found += sorted({start, (start + end) // 2, end - 1}) if end - start > 9 else [start]
    return found


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["once", "from then on"])
@pytest.mark.parametrize("part", range(PARTS))
def test_each_file_operation_fails_in_turn(
    part: int, kind: str, whole: Path, begun: Path, tmp_path: Path, monkeypatch, run_main: Callable
) -> None:
    code, lasting = (errno.EIO, False) if kind == "once" else (errno.ENOSPC, True)

    def run(folder: Path, refuse: int) -> tuple[FaultyDisk, int, str]:
        shutil.copytree(begun, folder)
        disk = FaultyDisk(folder, refuse, code, lasting=lasting)
        with disk.in_place(monkeypatch):
            result, out, err = run_main("main_pretrain", [*FLAGS, f"--output_dir={folder}"])
        return disk, result, out + err

    done = run(tmp_path / "undisturbed", -1)[0].done
    begins = done.index("write metrics.jsonl")
    kept = (begun / "checkpoint-0.pth").read_bytes()
    for refuse in points(done)[part::PARTS]:
        folder = tmp_path / str(refuse)
        disk, result, text = run(folder, refuse)
        context = f"{done[refuse]}, operation {refuse} of {len(done)}: exit {result}\n{text}"
        assert len(disk.done) > refuse, context
        assert "Traceback" not in text and "Exception ignored" not in text, context
        # A full disk that a start can do without (its log) may still end the run later.
        at_start = (0, 1, 2) if lasting else (0, 2)
        assert result in (at_start if refuse < begins else (0, 1)), context
        assert (folder / "checkpoint-0.pth").read_bytes() == kept, context
        assert newest(folder, "pretrain").path is not None, context
        assert run_main("main_pretrain", [*FLAGS, f"--output_dir={folder}"])[0] == 0, context
        same_end(folder, whole)
        shutil.rmtree(folder)


@pytest.mark.smoke
def test_a_folder_that_vanishes_ends_the_run_clearly(tmp_path: Path, monkeypatch, run_main) -> None:
    folder, original = tmp_path / "run", Agreement.after_step

    def after_step(self: Agreement) -> Wish:
        shutil.rmtree(folder, ignore_errors=True)
        return original(self)

    monkeypatch.setattr(Agreement, "after_step", after_step)
    code, _, err = run_main("main_pretrain", [*FLAGS, f"--output_dir={folder}"])
    assert code == 1 and "cannot write" in err and "No such file" in err
    assert "Traceback" not in err


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "log-rank0.txt", "events"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_something_else_in_the_place_of_a_file(
    name: str, kind: str, tmp_path: Path, run_main
) -> None:
    flags = [*FLAGS, f"--output_dir={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()
    place = tmp_path / "run" / name
    if name == "events":  # TensorBoard's folder, which here is none
        flags.append(f"--log_dir={place}")
    if kind == "pipe" or name == "events":
        os.mkfifo(place)
    else:
        place.mkdir()
    code, _, err = run_main("main_pretrain", flags)
    if (name, kind) == ("config.yaml", "pipe"):  # a rename takes its place
        assert code == 0
    else:
        assert code == 2 and f"cannot write {place}" in err and "Traceback" not in err


@pytest.mark.smoke
def test_the_run_goes_on_without_tensorboard(
    whole: Path, tmp_path: Path, monkeypatch, run_main
) -> None:
    """Its file gets full after the first records: said once, and training's own are all there."""
    disk = FaultyDisk(tmp_path / "events", 9, lasting=True)
    flags = [*FLAGS, f"--output_dir={tmp_path / 'run'}", f"--log_dir={tmp_path / 'events'}"]
    with disk.in_place(monkeypatch):
        code, out, err = run_main("main_pretrain", flags)
    assert code == 0 and out.count("going on without TensorBoard") == 1
    assert "Traceback" not in out + err
    same_end(tmp_path / "run", whole)


@pytest.mark.smoke
def test_the_log_of_a_process_fails_alone(
    whole: Path, tmp_path: Path, monkeypatch, run_main
) -> None:
    original = FaultyDisk.ask

    def ask(self: FaultyDisk, operation: str, path: object) -> None:
        if operation in ("write", "flush") and "log-rank" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, operation, path)

    monkeypatch.setattr(FaultyDisk, "ask", ask)
    with FaultyDisk(tmp_path, lasting=False).in_place(monkeypatch):
        code, _, err = run_main("main_pretrain", [*FLAGS, f"--output_dir={tmp_path / 'run'}"])
    assert code == 0 and err.count("log-rank0.txt: No space left on device") == 1
    assert "Logging error" not in err
    same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_is_no_fault(
    code: int, whole: Path, tmp_path: Path, monkeypatch, run_main
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    assert run_main("main_pretrain", [*FLAGS, f"--output_dir={tmp_path / 'run'}"])[0] == 0
    same_end(tmp_path / "run", whole)
