"""The log file of each process: what it said, and how it ended."""

import logging
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from util.console import visible
from util.errors import BadInput, RunFailed, Stopped
from util.files import AppendedFile, at_start, writing
from util.progress import EARLY, log


class _VisibleFormatter(logging.Formatter):
    """Lines for people, as on the terminal; see `util.console`."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class RankLog(logging.FileHandler):
    """A process's log file. If it cannot be written, that is said once, and the run goes on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        """Say once what failed, where logging would print a traceback for each line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            reason = f"cannot write {self.baseFilename}: {error.strerror}; going on without it"
            print(reason, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close it; lines that never got to the disk are given up, and were said to be."""
        try:
            super().close()
        except OSError as error:
            if not self.failed:
                print(f"cannot write {self.baseFilename}: {error.strerror}", file=sys.stderr)


@contextmanager
def rank_log(folder: Path, rank: int) -> Iterator[None]:
    """Keep what this process says, and how it ends, in `log-rank{rank}.txt` of the run folder.

    The file also gets what the command said before, when there was no folder yet.

    Raises:
        BadInput: it cannot be opened.
    """
    path = folder / f"log-rank{rank}.txt"
    with at_start(), writing(path):
        AppendedFile(path).close()  # refuses what is no file, a named pipe among them
        handler = RankLog(path, encoding="utf-8")
    handler.setFormatter(_VisibleFormatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        early = EARLY.take()
        log.info("starts: process %d on %s", rank, platform.node())
        for line in early:
            log.info(line)
        yield
        log.info("done")
    except BaseException as error:
        expected = isinstance(error, BadInput | RunFailed | Stopped)
        log.error("ends: %s: %s", type(error).__name__, error, exc_info=not expected)
        raise
    finally:
        log.removeHandler(handler)
        EARLY.take()  # they are in the file
        handler.close()
