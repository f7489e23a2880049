"""What a command says while it works: lines for the reader, and how far it is."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from util.console import first_time, hang_up_if_lost, printable

log = logging.getLogger("mmae")
log.setLevel(logging.INFO)
log.propagate = False

SILENCE = 600  # seconds after which a long run says where it is
QUIET = 10  # seconds between lines of a loop that may be short
REMEMBERED = 1000  # lines said before the process's log is open


class EarlyLines(logging.Handler):
    """Keeps what is said before the process's log file is open, for the file to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[str] = deque(maxlen=REMEMBERED)

    def emit(self, record: logging.LogRecord) -> None:
        """Remember one."""
        self.lines.append(record.getMessage())

    def take(self) -> list[str]:
        """What was said so far; nothing is left."""
        lines = list(self.lines)
        self.lines.clear()
        return lines


EARLY = EarlyLines()
log.addHandler(EARLY)


def say(text: str) -> None:
    """A line for the reader, which does not tear the progress bar, and for the process's log."""
    with hang_up_if_lost(sys.stdout):
        tqdm.write(printable(text, sys.stdout), file=sys.stdout)
        sys.stdout.flush()
    log.info(text)


def say_once(text: str) -> None:
    """As `say`, by the main process alone and once in a command, however often it is told."""
    from torch import distributed  # here: a start says things before torch is loaded

    main = not distributed.is_initialized() or distributed.get_rank() == 0
    if main and first_time(text):
        say(text)


class Progress:
    """How far a command is: a bar where stderr is a terminal, else a plain line now and then.

    The process's log holds the plain lines in either case, and never the bar.

    Args:
        total: units of work; `initial` of them are done.
        show: False in all processes but one, which then say nothing.
        unit: what is counted.
        every: units between two lines of `report`; 0: `update` says each tenth of the work, but
            nothing for work of seconds.
        where: what bar and lines begin with, by the units done.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        *,
        show: bool,
        unit: str = "step",
        every: int = 0,
        where: Callable[[int], str] = lambda done: "",
    ) -> None:
        self.total, self.initial, self.n, self.told = total, initial, initial, initial
        self.show, self.unit, self.every, self.where = show, unit, every, where
        self.watched = sys.stderr.isatty()
        self.start = self.told_at = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=initial,
            disable=not (show and self.watched),
            unit=unit,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def update(self, count: int = 1) -> None:
        """So many units more are done."""
        self.n += count
        if self.watched:
            self.bar.set_description_str(self.where(self.n), refresh=False)
        self.bar.update(count)
        if not self.every and self._passed(-(-self.total // 10)) and self._silent(QUIET):
            self._tell("")

    def report(self, loss: float, lr: float, images_per_s: float) -> None:
        """What training has come to; a line if one is due."""
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}")
        if self._passed(self.every) or self._silent(SILENCE):
            self._tell(f"  loss {loss:.4f}  lr {lr:.2e}  {images_per_s:,.0f} images/s")

    def _passed(self, every: int) -> bool:
        done = self.n == self.total and self.told < self.n
        return done or self.n // max(every, 1) > self.told // max(every, 1)

    def _silent(self, seconds: float) -> bool:
        return time.monotonic() - self.told_at >= seconds

    def _tell(self, values: str) -> None:
        now = time.monotonic()
        left = (now - self.start) / max(self.n - self.initial, 1) * (self.total - self.n)
        where = self.where(self.n)
        text = (
            f"{where}{where and ', '}{self.unit} {self.n:,} of {self.total:,} "
            f"({self.n / max(self.total, 1):.0%}){values}  {duration(left)} left"
        )
        self.told, self.told_at = self.n, now
        if self.show and self.watched:
            log.info(text)
        elif self.show:
            say(text)


def duration(seconds: float) -> str:
    """Seconds for the reader: 40 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
