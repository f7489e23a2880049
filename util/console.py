"""Text for people: printed so that nothing in it can command the terminal or fail to be encoded.

File names, class names and decoders' messages come from outside. They may hold escape sequences,
and bytes that are no UTF-8, which Python keeps as lone surrogates.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

# Control characters (C0 without tab and newline, DEL, C1), line separators, marks that reverse the
# direction of writing, and surrogates.
_UNSAFE = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_TEXT = re.compile(f"[{_UNSAFE}]")
_IN_LINE = re.compile(f"[{_UNSAFE}\t\n]")
SHOWN = 40  # characters of a wrong value that a message repeats
_ESCAPED_BYTE = 0xDC00  # surrogateescape: byte b is U+DC00 + b


def visible(text: str) -> str:
    """A text of several lines with its control characters written out: ESC as \\x1b.

    A byte of a file name that is no UTF-8 becomes \\xNN as well. Other characters stay.
    """
    return _IN_TEXT.sub(_written_out, text)


def visible_line(text: str) -> str:
    """`visible` for a line of a list, which a name with a newline in it must not break."""
    return _IN_LINE.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match.group())
    if _ESCAPED_BYTE + 0x80 <= code <= _ESCAPED_BYTE + 0xFF:
        code -= _ESCAPED_BYTE
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def counted(count: float, noun: str) -> str:
    """A number and its noun: 1 image, 12,345 images, 2.5 epochs, 3 processes."""
    ending = "es" if noun.endswith(("s", "tch")) else "s"
    shown = f"{int(count):,}" if count == int(count) else f"{count:,.4g}"
    return f"{shown} {noun}" if count == 1 else f"{shown} {noun}{ending}"


def listed(values: Sequence[object], most: int = 6) -> str:
    """The first values of a list, and how many more."""
    more = f" and {len(values) - most:,} more" if len(values) > most else ""
    return f"{', '.join(map(str, values[:most]))}{more}"


def shown(text: str) -> str:
    """A value as a message repeats it: in quotes, and not all of a long one."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}... ({len(text):,} characters)"


def printable(text: str, stream: TextIO) -> str:
    """`visible`, with \\uNNNN for what the stream's encoding lacks (LANG=C)."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)


def print_text(text: str = "", *, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print a text for people and flush; the default stream is standard output."""
    stream = sys.stdout if stream is None else stream
    with hang_up_if_lost(stream):
        print(printable(text, stream), file=stream, end=end, flush=True)


# A pipe that nobody reads (`| head`, a `tee` that died), and a terminal that was closed.
LOST = (errno.EPIPE, errno.EIO)


@contextmanager
def hang_up_if_lost(stream: TextIO) -> Iterator[None]:
    """Write inside; where nobody reads the stream any more, what is written to it is lost.

    A run that trains goes on; its log has everything.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in LOST:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


# What the running command has said already, of what is said once.
_said: set[str] = set()


def first_time(text: str) -> bool:
    """Whether the running command says a text for the first time."""
    if text in _said:
        return False
    _said.add(text)
    return True


def forget() -> None:
    """Another command begins, which may say anything again."""
    _said.clear()
