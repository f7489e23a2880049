"""A task of a submitit job: its first moments, before torch, and its end when it was stopped.

`python -m util.train.task -u -m submitit.core._submit FOLDER` takes the stop signals and then
starts that module: reading the job imports the project, which takes long enough for a time limit to
come. Standard library only, for the same reason.
"""

import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from util.console import print_text
from util.errors import EXIT_FAILED, EXIT_STOPPED, RunFailed, Stopped
from util.signals import StoppedAtStart, take_signals, write_line

LOCAL_REQUEUE = 144  # submitit.local.local.LOCAL_REQUEUE_RETURN_CODE
KILLED_WITHIN = 600  # seconds in which Slurm ends a job that it has queued again
_leaving = threading.Lock()  # a thread may find out that the task hangs while it wakes up


def leave(stopped: Stopped | StoppedAtStart) -> None:
    """End a stopped task. All of them were told; what was to be saved is written.

    Raises:
        SystemExit: always, unless Slurm kills the task first.
        RunFailed: the job could not be queued again.
    """
    if threading.current_thread() is threading.main_thread():
        # One that is repeated must not queue the job a second time; SIGTERM ends the waiting below.
        for repeated in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(repeated, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not _leaving.acquire(blocking=False):
        time.sleep(KILLED_WITHIN)
        raise SystemExit(EXIT_STOPPED)
    try:
        _leave(stopped)
    finally:
        _leaving.release()


def _leave(stopped: Stopped | StoppedAtStart) -> None:
    local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
    rank = os.environ.get("SUBMITIT_LOCAL_GLOBALID" if local else "SLURM_PROCID", "0")
    if rank == "0":
        print_text(f"stopped: {stopped}")
    # 0: nobody asked, but it cannot go on now and may later.
    again = stopped.signal in (signal.SIGUSR1, signal.SIGUSR2, 0)
    if local:
        raise SystemExit(LOCAL_REQUEUE if again else EXIT_STOPPED)
    if rank == "0":
        job = os.environ["SLURM_JOB_ID"]
        if not again and not being_preempted(job):
            print_text(f"job {job} was told to end; Slurm decides whether it comes back")
            raise SystemExit(EXIT_STOPPED)
        requeue(job)
    time.sleep(KILLED_WITHIN)
    raise SystemExit(EXIT_STOPPED)


def leave_at_once(stopped: StoppedAtStart) -> None:
    """`leave` in the middle of imports, or from a thread while the task hangs."""
    code = EXIT_STOPPED
    try:
        leave(stopped)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except RunFailed as error:
        write_line(f"error: {error}")
        code = EXIT_FAILED
    os._exit(code)


def being_preempted(job: str) -> bool:
    """Whether SIGTERM announced a preemption whose time of grace runs.

    A job that ends by itself in that time would not be queued again by Slurm. One that was
    cancelled or requeued is no longer RUNNING, and must be left alone.
    """
    answer = ask("scontrol", "show", "job", "--oneliner", job)
    state = re.search(r"\bJobState=(\w+)", answer.stdout)
    preempted = re.search(r"\bPreemptTime=(\S+)", answer.stdout)
    return bool(
        state and state.group(1) == "RUNNING" and preempted and preempted.group(1) != "None"
    )


def requeue(job: str) -> None:
    """Queue the job again, under its number.

    Raises:
        RunFailed: Slurm would not.
    """
    answer = ask("scontrol", "requeue", job)
    if answer.returncode:
        raise RunFailed(
            f"nothing is lost, but job {job} cannot be queued again: "
            f"{answer.stderr.strip()}; submit the same command, with the same --job_dir, to go on"
        )
    print_text(f"requeued job {job}; it goes on from the checkpoint when Slurm starts it")


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """A client command of Slurm; one that is missing or does not answer counts as failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def main(words: Sequence[str]) -> None:
    """Run a module as `python` would.

    Args:
        words: `-u -m MODULE ARGUMENT...`, as submitit appends them.
    """
    take_signals(leave_at_once)
    start = words.index("-m") + 1
    sys.argv = list(words[start:])
    runpy.run_module(words[start], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
