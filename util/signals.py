"""Stop signals from the first line of a command on, until the step loop takes them over.

Importing torch, listing a data set or compiling takes from seconds to minutes, and a scheduler's
signal may come at any moment. This module needs the standard library only, so that a command can
call `take_signals` before it imports anything else. A program that imports a main keeps its own
handlers: only a file that runs as a command calls it.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_INTERRUPTED = 130  # a shell's code for a program that Ctrl-C ended
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# What a terminal sends to all of a command's processes: at Ctrl-C, and when it is closed.
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)
# Seconds in which a start must act on a signal. Slurm and torchrun kill 30 seconds after SIGTERM.
PATIENCE = 5.0
# Where launchers say how many processes there are.
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SUBMITIT_LOCAL_NTASKS")


class StoppedAtStart(SystemExit):
    """A stop signal came before the step loop began; there is nothing to save.

    A SystemExit, because libraries catch every Exception here and there.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_STOPPED)
        self.signal = number

    def __str__(self) -> str:
        return (
            f"{signal.Signals(self.signal).name} before the first step of this start; nothing is "
            "lost, the same command begins again"
        )


def write_line(text: str) -> None:
    """A line on stderr, also from a signal handler that interrupted a print."""
    os.write(2, f"{text}\n".encode())


def leave_at_once(stopped: StoppedAtStart) -> None:
    """Say it and end the process, whatever it is doing."""
    write_line(f"stopped: {stopped}")
    os._exit(EXIT_STOPPED)


def interrupt_at_once() -> None:
    """End on Ctrl-C, whatever the process is doing."""
    write_line("stopped: Ctrl-C")
    os._exit(EXIT_INTERRUPTED)


@dataclass
class _Start:
    """The start of a command, as its signal handlers see it.

    Attributes:
        taken: the signals are ours, because this process runs as a command.
        phase: importing; running, with the imports done; over, once the loop has the signals.
        asked: number of the first stop signal that our handler got, 0: none.
        seen: the same of the watching thread, which misses none while others' handlers are set.
        several: other processes take part, and must leave together with this one.
        leave: ends the process.
        leaving: its thread is at that, whatever the main thread does meanwhile.
        over: set when the loop has taken over.
        wake: file handle that Python writes the number of every signal to.
    """

    taken: bool = False
    phase: str = "importing"
    asked: int = 0
    seen: int = 0
    several: bool = False
    leave: Callable[[StoppedAtStart], None] = leave_at_once
    leaving: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    wake: int = -1


_start = _Start()


def take_signals(leave: Callable[[StoppedAtStart], None] = leave_at_once) -> None:
    """Answer stop signals and Ctrl-C from now on; for the main thread of a command.

    One process leaves at once: during imports by ending itself, later by `StoppedAtStart`. Several
    agree where they next exchange something (`asked_at_start`). Whoever has not left after
    `PATIENCE` seconds, for it hangs in a library or somebody swallowed the exception, is ended.

    Called again, it takes the handlers back from who replaced them.

    Args:
        leave: ends the process; also called by a thread.
    """
    if not _start.taken:
        _start.taken, _start.leave = True, leave
        _start.several = any(os.environ.get(name, "1") not in ("", "1") for name in COUNTS)
        _start.over.clear()
        read, _start.wake = os.pipe()
        os.set_blocking(_start.wake, False)
        # Written by Python's C code even while the main thread is inside a library.
        signal.set_wakeup_fd(_start.wake, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(read,), name="signals", daemon=True).start()
        os.register_at_fork(after_in_child=_forget)
    for number in stoppable():
        signal.signal(number, _note)


def take_interrupt() -> None:
    """Answer Ctrl-C with one line while a command imports; for those that do not train."""
    if signal.SIGINT in stoppable():
        signal.signal(signal.SIGINT, _interrupt)


def stoppable() -> list[signal.Signals]:
    """The signals that stop a run.

    A terminal's too, unless whoever started us has us ignore them (`command &`, `nohup`).
    """
    heard = [n for n in TERMINAL_SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
    return [*STOP_SIGNALS, *heard]


def begin() -> None:
    """The imports are done: from now on a stop is an exception, which cleans up on its way."""
    if _start.phase == "importing":
        _start.phase = "running"
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def asked_at_start() -> int:
    """Number of the stop signal that this process noted before the loop; 0: none."""
    return 0 if _start.phase == "over" else _start.asked or _start.seen


def why_peers_left() -> int:
    """Number of the signal by which a start is ending, here and so for the others; 0: none.

    Slurm takes its time to end a job that is queued again, and the loop may begin meanwhile.
    """
    return (_start.asked or _start.seen) if _start.leaving else asked_at_start()


def hand_over() -> int:
    """The step loop has set its handlers; returns `asked_at_start` as the loop's to act on."""
    asked = asked_at_start()
    _start.phase = "over"
    _start.over.set()
    if _start.wake >= 0:
        signal.set_wakeup_fd(-1)
        os.close(_start.wake)
        _start.wake = -1
    return asked


def give_back(handlers: dict[int, Any]) -> None:
    """Set the handlers that were there before a run; a command that has run ignores the signals.

    One that comes so late must not turn the exit code of a finished run into a failure.
    """
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_IGN if _start.taken else handler)


def end() -> None:
    """The command is done or has failed, and is leaving: nothing can stop it any more."""
    if _start.taken:
        give_back(dict.fromkeys(stoppable()))
        hand_over()


def _note(number: int, frame: Any) -> None:
    """Handler of all stop signals during the start."""
    if _start.asked:
        if number == signal.SIGINT:  # again: at once
            interrupt_at_once()
        return
    _start.asked = number
    if _start.several or _start.phase == "over":
        return
    if _start.phase == "importing":
        _start.leave(StoppedAtStart(number))
    raise StoppedAtStart(number)


def _interrupt(number: int, frame: Any) -> None:
    """Handler of Ctrl-C while a command that does not train imports."""
    interrupt_at_once()


def _watch(read: int) -> None:
    """In a thread: end the process when it does not act on a signal in time."""
    while data := os.read(read, 64):
        for number in data:
            if number not in (*STOP_SIGNALS, *TERMINAL_SIGNALS):
                continue
            _start.seen = _start.seen or number
            if not _start.over.wait(PATIENCE):
                _start.leaving = True
                _start.leave(StoppedAtStart(number))
    os.close(read)


def _forget() -> None:
    """In a forked child: signals mean what they meant before, and are none of the parent's."""
    if _start.phase == "over":
        return
    hand_over()
    _start.taken = False
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL)
    for number in TERMINAL_SIGNALS:  # they come to the whole group, and the parent answers for all
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_IGN)
