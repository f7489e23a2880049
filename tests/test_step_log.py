"""Log lines: the images and the waiting of their own steps, by the seconds of training alone."""

import os
from pathlib import Path

import pytest
import torch
from runs import records

from util.data.conversions import Tally
from util.progress import Progress
from util.train import logger
from util.train.bad_images import BadImages
from util.train.dist import Processes
from util.train.logger import RunLogger, StepLog, StepReport
from util.train.run import due
from util.train.step import StepResult


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logger, "time", clock)
    return clock


def step_log(folder: Path, every: int) -> StepLog:
    procs = Processes(0, 1, 0, 1, torch.device("cpu"))
    bad = BadImages(folder / "bad", str, 0, lambda x: [x], tally=Tally(), write=True)
    return StepLog(
        RunLogger(folder / "metrics.jsonl", None), folder, procs, every=every, global_batch=6,
        nan_policy="stop", last_good=lambda: None, bar=Progress(9, show=False), bad_images=bad,
    )  # fmt: skip


def report(step: int, waited: float) -> StepReport:
    loss, zero = torch.tensor(2.0), torch.tensor(0.0)
    return StepReport(step, StepResult(loss, loss, zero, zero), 1e-3, waited, [], [])


def test_saving_within_a_log_line_is_no_training(tmp_path: Path, clock: Clock) -> None:
    """Ten seconds a step, two of them waiting; a checkpoint takes a minute after the fourth."""
    log = step_log(tmp_path, every=3)
    for step in range(1, 7):
        clock.now += 10
        log(report(step, 2.0))
        if step == 4:
            clock.now += 60
            log.restart_clock()
    clock.now += 60  # an evaluation
    log.restart_clock()
    clock.now += 5
    log(report(7, 1.0))
    assert log.end_epoch() == 2.0
    found = [(r["step"], r["images_per_s"], r["waiting"]) for r in records(tmp_path, "train")]
    assert found == [(3, 18 / 30, 6 / 30), (6, 18 / 30, 6 / 30), (7, 6 / 5, 1 / 5)]


def test_reporting_before_a_checkpoint_loses_no_seconds(tmp_path: Path, clock: Clock) -> None:
    log = step_log(tmp_path, every=2)
    clock.now += 10
    log(report(1, 0.0))
    clock.now += 1  # the device finishes the step
    log.report_pending()
    clock.now += 60
    log.restart_clock()
    clock.now += 9
    log(report(2, 0.0))
    assert [r["images_per_s"] for r in records(tmp_path, "train")] == [12 / 20]


def test_a_closed_log_holds_no_file(tmp_path: Path) -> None:
    log = RunLogger(tmp_path / "metrics.jsonl", tmp_path / "events")
    log.close()
    held = {os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
    assert not [path for path in held if path.startswith(str(tmp_path))]


@pytest.mark.parametrize(
    ("every", "epochs", "expected"),
    [(0, 4, []), (1, 3, [0, 1, 2]), (3, 7, [2, 5, 6]), (3, 6, [2, 5]), (9, 4, [3])],
)
def test_what_is_due_after_which_epoch(every: int, epochs: int, expected: list[int]) -> None:
    assert [epoch for epoch in range(epochs) if due(every, epoch, epochs)] == expected
