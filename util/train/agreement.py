"""What all processes agree on between steps: to stop, to save, to go on."""

import signal
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from util.errors import Stopped
from util.signals import (
    give_back,
    hand_over,
    interrupt_at_once,
    stoppable,
    write_line,
)
from util.train.dist import Processes


@dataclass
class Wish:
    """What all processes agreed to do after this step.

    Attributes:
        stop: number of the signal to stop for, 0: go on.
        save: write a checkpoint now.
    """

    stop: int = 0
    save: bool = False


@dataclass
class Agreement:
    """Signals and the clock, agreed on by all processes, without stalling the device.

    Every `every` steps each process sends what it knows in a reduction that runs in the background
    and is read `every` steps later; so all act after the same step, at most 2 x `every` steps after
    a signal reached any of them. One process acts after the step in which the signal came.

    Args:
        procs: the processes.
        save_minutes: minutes between checkpoints by the clock of the main process, 0: never.
        every: steps.
    """

    procs: Processes
    save_minutes: float = 0.0
    every: int = 4
    signal: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    pending: Any = None
    steps: int = 0
    interrupted: bool = False
    handlers: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "Agreement":
        """Take the stop signals from now on, and one that came during the start."""
        self.handlers = {number: signal.signal(number, self._note) for number in stoppable()}
        earlier = hand_over()
        self.signal = self.signal or earlier
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Give the signals back, and end the exchange under way (unless a process is lost)."""
        give_back(self.handlers)
        if kind is None or issubclass(kind, Stopped):
            self._receive()

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        if number != signal.SIGINT:
            return
        if self.interrupted:
            interrupt_at_once()
        self.interrupted = True
        if self.procs.main:
            write_line("\nCtrl-C: saves and stops after this step; press again to leave at once")

    def after_step(self) -> Wish:
        """What to do now. Every process must call it once after every step."""
        self.steps += 1
        if self.procs.world_size == 1:
            return self._decide(self._own())
        if self.steps % self.every:
            return Wish()
        wish = self._decide(self._receive())
        own = self._own()
        self.pending = (
            own,
            dist.all_reduce(own, op=dist.ReduceOp.MAX, group=self.procs.control, async_op=True),
        )
        return wish

    def _own(self) -> torch.Tensor:
        minutes = (time.monotonic() - self.saved_at) / 60
        due = self.procs.main and 0 < self.save_minutes <= minutes
        return torch.tensor([self.signal, int(due)])

    def _receive(self) -> torch.Tensor:
        if self.pending is None:
            return torch.zeros(2, dtype=torch.int64)
        (values, work), self.pending = self.pending, None
        work.wait()
        return values

    def _decide(self, values: torch.Tensor) -> Wish:
        stop, save = values.tolist()
        if save:
            self.saved_at = time.monotonic()
        return Wish(stop, bool(save))
