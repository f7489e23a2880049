"""TensorBoard's files of several starts in one folder, read as TensorBoard reads them."""

import os
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.train.events import EventFile


def starts(folder: Path, count: int) -> None:
    """Each start goes on one step behind the start before it and takes three steps."""
    for start in range(count):
        file = EventFile(folder, purge_step=start + 1)
        for step in range(start + 1, start + 4):
            file.scalar("loss", 100 * start + step, step)
        file.close()


def read(folder: Path) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars("loss")]


EXPECTED = [(1, 1.0), (2, 102.0), (3, 203.0), (4, 304.0), (5, 405.0), (6, 506.0), (7, 607.0)]
EXPECTED += [(8, 708.0), (9, 709.0), (10, 710.0)]


@pytest.mark.parametrize("clock", ["stands", "goes back"])
def test_the_later_start_counts(
    clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when they begin in one second, or on a machine whose clock is behind."""
    now = iter(range(1_795_715_672, 0, -7))
    seconds = (lambda: 1_795_715_672.5) if clock == "stands" else (lambda: float(next(now)))
    monkeypatch.setattr(time, "time", seconds)
    starts(tmp_path, 8)
    assert read(tmp_path) == EXPECTED


def test_a_strange_name_in_the_folder(tmp_path: Path) -> None:
    """Of another writer, without a number, or with the greatest one."""
    for name in ("events.out.tfevents.odd", f"events.out.tfevents.{10**10 - 1}.far"):
        (tmp_path / name).touch()
    starts(tmp_path, 2)
    assert len(os.listdir(tmp_path)) == 4
