"""Which checkpoint a run goes on from: the one with most steps inside that can be read."""

import itertools
import os
import random
from pathlib import Path

import pytest
import torch

from util.data.packed import checksum
from util.errors import BadInput
from util.train import checksums
from util.train.checkpoint import (
    BEST,
    LAST,
    find_resume,
    newest,
    renew_last,
    save_checkpoint,
    verify,
)
from util.train.checksums import COMMENT, Signed

NAMES = ("checkpoint-0.pth", "checkpoint-9.pth", "checkpoint-10.pth", LAST)


def write(folder: Path, name: str, step: int, task: str = "pretrain", **more: object) -> Path:
    """A checkpoint under any name."""
    state = {"task": task, "step": step, "w": torch.full((3000,), float(step)), **more}
    place = folder / "elsewhere"
    place.mkdir(exist_ok=True)
    return save_checkpoint(place, state).rename(folder / name)


def set_times(paths: list[Path], rng: random.Random) -> None:
    """Times of change in an order of their own."""
    for path, moment in zip(paths, rng.sample(range(1, 99), len(paths)), strict=True):
        os.utime(path, (1e9 + moment, 1e9 + moment))


@pytest.mark.parametrize("steps", [*itertools.permutations((1, 2, 3, 20))])
def test_the_steps_inside_decide(steps: tuple[int, ...], tmp_path: Path) -> None:
    """Not the number in the name, nor the time of change, nor which was written last."""
    rng = random.Random(str(steps))
    order = [*zip(NAMES, steps, strict=True)]
    rng.shuffle(order)
    paths = {step: write(tmp_path, name, step) for name, step in order}
    set_times([*paths.values()], rng)
    for step in (20, 3, 2, 1):
        found = newest(tmp_path, "pretrain")
        assert found.path == paths[step] and not found.skipped
        paths[step].unlink()
    assert newest(tmp_path, "pretrain").path is None


def test_of_two_with_the_same_steps_the_last_one_is_further(tmp_path: Path) -> None:
    """Its epoch is done, where the numbered one's is still to be measured."""
    for name in ("checkpoint-5.pth", "checkpoint-last-pretrain.pth"):
        write(tmp_path, name, 4)
    assert newest(tmp_path, "pretrain").path == tmp_path / "checkpoint-last-pretrain.pth"
    (tmp_path / "checkpoint-last-pretrain.pth").rename(tmp_path / LAST)
    assert newest(tmp_path, "pretrain").path == tmp_path / LAST


def test_the_best_one_and_other_files_are_nothing_to_go_on_from(tmp_path: Path) -> None:
    path = write(tmp_path, "checkpoint-1.pth", 2)
    for name in (BEST, "checkpoint-1.pth.aside", "checkpoint-x.pth", "my-checkpoint-7.pth"):
        write(tmp_path, name, 9)
    assert newest(tmp_path, "pretrain").path == path


def test_other_tasks_have_their_own_newest(tmp_path: Path) -> None:
    paths = {
        task: write(tmp_path, f"checkpoint-{number}.pth", step, task)
        for number, (task, step) in enumerate(
            [("segment", 9), ("pretrain", 2), ("finetune", 7)]
        )
    }  # fmt: skip
    for task, path in paths.items():
        assert newest(tmp_path, task).path == path
    paths["finetune"].write_bytes(paths["finetune"].read_bytes()[:-1])
    found = newest(tmp_path, "pretrain")
    # Whose a damaged one was cannot be known for sure: it is named, and not gone on from.
    assert found.path == paths["pretrain"]
    assert newest(tmp_path, "finetune").path is None


@pytest.mark.parametrize("chunk", [100, 1000, 1 << 22])
@pytest.mark.parametrize("where", ["last byte", "last block", "its comment", "cut", "longer"])
def test_damage_at_the_end_of_the_newest(
    where: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read in pieces, and the last one is shorter; it counts as all others do."""
    monkeypatch.setattr(checksums, "CHUNK", chunk)
    paths = [write(tmp_path, name, step) for name, step in (("checkpoint-7.pth", 1), (LAST, 2))]
    data = bytearray(paths[1].read_bytes())
    assert (len(data) - COMMENT) % 100 and (len(data) - COMMENT) % 1000
    if where == "cut":
        del data[-1:]
    elif where == "longer":
        data += b"\0"
    else:
        place = {"last byte": len(data) - COMMENT - 1, "last block": len(data) - COMMENT - 60}
        data[place.get(where, len(data) - 5)] ^= 1
    paths[1].write_bytes(data)
    assert verify(paths[0]) is None and verify(paths[1]) is not None
    found = newest(tmp_path, "pretrain")
    assert found.path == paths[0] and len(found.skipped) == 1 and LAST in found.skipped[0]
    path, notes = find_resume(tmp_path, "pretrain", "auto")
    assert path == paths[0] and notes == [f"skipped a checkpoint: {found.skipped[0]}"]
    # The next start of the run writes over it: the older one is the last one now.
    assert renew_last(tmp_path, "pretrain") and newest(tmp_path, "pretrain").path == tmp_path / LAST
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(BadInput, match="none is readable"):
        find_resume(tmp_path, "pretrain", "auto")


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 1000])
def test_a_signature_does_not_depend_on_how_the_file_was_written(
    pieces: int, tmp_path: Path
) -> None:
    """Down to its last bytes, which are held back until the end."""
    content = random.Random(0).randbytes(999) + b"\0\0"
    path = tmp_path / "x"
    with path.open("wb") as file:
        signed = Signed(file)
        for start in range(0, len(content), pieces):
            signed.write(content[start : start + pieces])
        signed.sign()
    whole = path.read_bytes()
    assert whole[: len(content) - 2] == content[:-2] and len(whole) == len(content) + COMMENT
    assert verify(path) is None
    for place in (*range(0, len(whole), 50), *range(len(content) - 4, len(content))):
        damaged = bytearray(whole)
        damaged[place] ^= 128
        path.write_bytes(damaged)
        assert verify(path) is not None, place


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 5])
def test_the_checksum_of_a_shard_is_of_all_its_blocks(size: int, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(size))
    known = checksum(path)
    for place in {0, size // 2, size - 1} if size else ():
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"1")
            file.flush()
            assert checksum(path) != known
            file.seek(place)
            file.write(b"\0")
    assert checksum(path) == known
    with path.open("ab") as file:
        file.write(b"\0")
    assert checksum(path) != known
