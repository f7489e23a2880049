"""Errors for people, and the exit codes of every command.

0 done; 1 a fault of ours (with a traceback) or a run that failed; 2 bad input, one message; 75
stopped on a signal with nothing lost: the same command goes on from there; 130 Ctrl-C.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

from util.console import forget, print_text
from util.progress import EARLY
from util.signals import EXIT_INTERRUPTED, EXIT_STOPPED, StoppedAtStart, begin, end

P = ParamSpec("P")
R = TypeVar("R")

SMALLER = "lower --batch_size or the sizes of model and images (--dry_run says what is needed)"

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2


class BadInput(ValueError):
    """What the user gave cannot work: the message says what was given and expected, what to do."""

    exit_code = EXIT_BAD_INPUT


class RunFailed(RuntimeError):
    """A run that cannot go on, through nobody's bad input: diverged, or another process died."""

    exit_code = EXIT_FAILED


class CannotWrite(RunFailed):
    """The operating system refuses to write a file: the disk is full, the folder is gone ..."""


class Stopped(Exception):
    """The run was asked to stop, has written a checkpoint, and can go on.

    Attributes:
        signal: number of the signal that asked; 0: none did.
    """

    exit_code = EXIT_STOPPED

    def __init__(self, message: str, signal: int = 0) -> None:
        super().__init__(message)
        self.signal = signal


def needs(module: str, install: str) -> ModuleType:
    """Import an optional dependency, or say which command installs it.

    Args:
        module: dotted name to import, for example ``skimage.metrics``.
        install: what to hand to ``pip install``, for example ``scikit-image``.

    Raises:
        BadInput: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            f"this needs {module} ({error}); install it: pip install {install}"
        ) from None


def command(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate a ``main(argv)``: errors for people become one line on stderr and their exit code.

    Every other exception keeps its traceback, because it is ours to mend.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        begin()
        forget()
        EARLY.take()  # what an earlier command of this process said
        try:
            return main(*args, **kwargs)
        except (BadInput, RunFailed) as error:
            print_text(f"error: {error}", stream=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except (Stopped, StoppedAtStart) as stopped:
            print_text(f"stopped: {stopped}", stream=sys.stderr)
            raise SystemExit(EXIT_STOPPED) from None
        except KeyboardInterrupt:
            print_text("stopped: Ctrl-C", stream=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0] or "Python could not allocate"
            print_text(f"error: out of memory: {reason}; {SMALLER}", stream=sys.stderr)
            raise SystemExit(EXIT_FAILED) from None
        finally:
            end()

    return wrapped


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python or torch means that memory, of host or device, is full."""
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
