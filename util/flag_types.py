"""What a flag takes: numbers within bounds, sizes, and paths. Each is a `type` of argparse.

The bounds are generous: what is beyond them cannot be meant, and would fill memory, start
processes without end or overflow before anybody said why.
"""

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

from util.console import SHOWN, shown
from util.errors import BadInput

MOST = 10**12  # of whole numbers and of others, where nothing else bounds them
PER_CORE = 64  # processes or threads for each core of this machine
MOST_PREFETCHED = 1000  # batches ready per loading process
MOST_IN_BATCH = 10**6  # images per process and micro-step
MOST_SIDE = 16_384  # pixels of an image
MOST_IMAGE = 2**36  # pixels of an image file, 275 GB while it is decoded
MOST_CHANNELS = 4096  # of an image
MOST_WIDTH = 65_536  # numbers in a token, or channels of a head
MOST_BLOCKS = 200
MOST_CLASSES = 10**6
MOST_PATCHES = 10**8  # that a PCA is fitted on
MOST_LSCALE = 1000
MOST_TASKS = 10**6  # of a job
MOST_RATE = 10**6  # learning rates and weight decay: float32 overflows not far beyond
LEAST_CROP = 1e-4  # share of an image's area; less is less than a pixel of most images
LONGEST_PATH = 4096  # characters, as Linux has it

# What --data_path may begin with; a path follows.
PREFIXES = ("packed:", "hf:")


def most_processes() -> int:
    """How many processes or threads this machine may be asked for."""
    return PER_CORE * (os.cpu_count() or 1)


def number(
    kind: type,
    low: float,
    high: float = MOST,
    *,
    open_low: bool = False,
    open_high: bool = False,
    why: str = "",
) -> Callable[[str], Any]:
    """An argparse type: an int or float within bounds, with a message that says which.

    Args:
        open_low, open_high: the bound itself is not allowed.
        why: the reason of the upper bound, for the message.
    """

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {name}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a finite number")
        plain = text if len(text) <= SHOWN else shown(text)
        if value < low or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"{plain} is not {span}")
        if value > high or (open_high and value == high):
            raise argparse.ArgumentTypeError(
                f"{plain} is not {most if high == MOST else span}{why and ': '}{why}"
            )
        return value

    least = f"above {low:,}" if open_low else f"at least {low:,}"
    most = f"{'below' if open_high else 'at most'} {high:,}"
    span = least if high == MOST else f"{least} and {most}"
    return convert


def processes_flag(low: int) -> Callable[[str], Any]:
    """An argparse type: processes or threads to start on this machine."""
    return number(int, low, most_processes(), why=f"{PER_CORE} for each core of this machine")


def optional(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type that also takes the word `none`."""
    return lambda text: None if text.lower() == "none" else convert(text)


def size_pair(text: str) -> tuple[int, int]:
    """An argparse type: `224`, or `160x224` as height x width."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and len(p) < SHOWN and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a size such as 224 or 160x224")
    if max(map(int, parts)) > MOST_SIDE:
        raise argparse.ArgumentTypeError(f"{shown(text)} has a side above {MOST_SIDE:,} pixels")
    return int(parts[0]), int(parts[-1])


def expanded_path(text: str) -> str:
    """An argparse type: a path, `~` expanded, also behind `packed:` and `hf:`.

    Every flag that names a file or folder has it, so that `~` means the same in all of them, on the
    command line and in YAML, where no shell expands it.
    """
    prefix = next((p for p in PREFIXES if text.startswith(p)), "")
    try:
        return prefix + expand_home(text[len(prefix) :])
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def expand_home(text: str) -> str:
    """A path with `~` and `~user` expanded.

    Raises:
        BadInput: empty, no possible name of a file, or the home of nobody here.
    """
    if not text:
        raise BadInput("is empty, expected a path; leave the flag out for its default")
    if "\0" in text or len(text) > LONGEST_PATH:
        raise BadInput(f"{shown(text)} cannot be a path: it is too long, or holds a NUL")
    expanded = os.path.expanduser(text)
    if expanded == text and text.startswith("~"):
        raise BadInput(f"{text}: there is no such home folder; ./{text} means one of that name")
    return expanded
