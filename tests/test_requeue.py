"""What each stop signal does to a job: SIGUSR1 and SIGUSR2 queue it again, the others do not.

The step loop gets a real signal, sent from inside of a step; Slurm's commands are pretended.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import submitit
from stopped_runs import JOBS

import main_pretrain
from util import signals, slurm
from util.errors import EXIT_STOPPED, RunFailed, Stopped
from util.signals import StoppedAtStart
from util.slurm import Training
from util.train import task
from util.train.checkpoint import LAST, load_file
from util.train.logger import StepReport
from util.train.run import Run
from util.train.task import LOCAL_REQUEUE, leave

# Written out: a signal that the program forgot would be left out here as well.
ALL = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
AGAIN = (signal.SIGUSR1, signal.SIGUSR2)
FLAGS = [
    *JOBS["pretrain"].flags, "--precision=fp32", "--target=pixels", "--train_images=8",
    "--batch_size=4", "--eval_every=0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A command that has ended ignores the signals; a test run should not."""
    before = {number: signal.getsignal(number) for number in ALL}
    for number in ALL:  # one that the program does not take must not end the tests
        signal.signal(number, lambda number, frame: None)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What Slurm is asked; nobody waits for the job to be ended."""
    found: list[tuple[str, ...]] = []

    def ask(*command: str) -> subprocess.CompletedProcess[str]:
        found.append(command)
        return subprocess.CompletedProcess(command, 0, "JobState=RUNNING PreemptTime=None", "")

    monkeypatch.setattr(task, "ask", ask)
    monkeypatch.setattr(task, "KILLED_WITHIN", 0)
    return found


def in_a_job(kind: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SUBMITIT_EXECUTOR": kind, "SLURM_PROCID": str(rank), "SLURM_JOB_ID": "7",
        "SUBMITIT_LOCAL_GLOBALID": str(rank), "SUBMITIT_LOCAL_JOB_ID": "7",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("when", [Stopped, StoppedAtStart])
@pytest.mark.parametrize("kind", [*ALL, 0])
@pytest.mark.parametrize("executor", ["slurm", "local"])
def test_which_signals_queue_a_job_again(
    executor: str, kind: int, when: type, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0: nobody asked, but the run cannot go on now and may later."""
    in_a_job(executor, 0, monkeypatch)
    if when is StoppedAtStart and not kind:
        return  # such a stop has a signal
    stopped = StoppedAtStart(kind) if when is StoppedAtStart else Stopped("it stopped", kind)
    again = kind in (*AGAIN, 0)
    with pytest.raises(SystemExit) as ended:
        leave(stopped)
    if executor == "local":  # submitit starts it again itself, by the exit code
        assert ended.value.code == (LOCAL_REQUEUE if again else EXIT_STOPPED) and not asked
        return
    assert ended.value.code == EXIT_STOPPED
    assert (("scontrol", "requeue", "7") in asked) == again
    # One that is told twice is queued once, and can still be ended.
    assert signal.getsignal(signal.SIGUSR1) == signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("kind", AGAIN)
def test_one_task_of_several_asks(
    kind: signal.Signals, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_job("slurm", 1, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        leave(Stopped("it stopped", kind))
    assert ended.value.code == EXIT_STOPPED and not asked


@pytest.mark.parametrize("kind", AGAIN)
def test_a_job_that_cannot_be_queued_again_has_failed(
    kind: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_job("slurm", 0, monkeypatch)
    monkeypatch.setattr(
        task, "ask", lambda *words: subprocess.CompletedProcess(words, 1, "", "no such job")
    )
    with pytest.raises(RunFailed, match="job 7 cannot be queued again: no such job"):
        leave(Stopped("it stopped", kind))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The next run gets a real signal in the middle of its third step."""

    def send(kind: int) -> None:
        original = Run.after_step

        def after_step(self: Run, report: StepReport) -> bool:
            if report.step == 3:
                os.kill(os.getpid(), kind)
            return original(self, report)

        monkeypatch.setattr(Run, "after_step", after_step)

    return send


@pytest.mark.parametrize("kind", ALL)
def test_a_command_saves_and_leaves_with_the_code_of_a_stop(
    kind: signal.Signals, sent: Callable, tmp_path: Path, run_main: Callable
) -> None:
    sent(kind)
    code, _, err = run_main("main_pretrain", [*FLAGS, f"--output_dir={tmp_path}"])
    assert code == EXIT_STOPPED and f"stopped: {kind.name} after step 3, in epoch 2" in err
    assert load_file(tmp_path / LAST)["step"] == 3


@pytest.mark.parametrize("kind", ALL)
def test_a_job_saves_and_is_queued_again_or_not(
    kind: signal.Signals,
    sent: Callable,
    asked: list,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As submitit calls it: the loop's signal is what the job ends by."""

    class Environment:
        job_id, global_rank = "7", 0

        def name(self) -> str:
            return "slurm"

    in_a_job("slurm", 0, monkeypatch)
    monkeypatch.setattr(submitit, "JobEnvironment", Environment)
    monkeypatch.setattr(slurm, "take_signals", lambda leave: None)  # this process is the tests'
    monkeypatch.setattr(signals, "_start", signals._Start())
    sent(kind)
    argv = [*FLAGS, f"--output_dir={tmp_path}/%j"]
    with pytest.raises(SystemExit) as ended:
        Training(main_pretrain.__name__, argv, os.getcwd(), 0)()
    assert ended.value.code == EXIT_STOPPED
    assert load_file(tmp_path / "7" / LAST)["step"] == 3
    assert (("scontrol", "requeue", "7") in asked) == (kind in AGAIN)
    assert (tmp_path / "7" / ".lease").exists() is False
    text: Any = capfd.readouterr().out
    assert f"stopped: {kind.name} after step 3" in text
    assert ("requeued job 7" in text) == (kind in AGAIN)
