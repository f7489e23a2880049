"""A disk that refuses one operation: every file operation of a piece of code in turn."""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BY_NAME = (
    "open", "replace", "rename", "link", "mkdir", "unlink", "truncate", "stat", "listdir",
    "scandir", "rmdir",
)  # fmt: skip
BY_HANDLE = ("fsync", "fstat")


class FaultyFile:
    """A file whose operations are asked about first."""

    def __init__(self, file: Any, ask: Callable[[str, str], None], name: str) -> None:
        self._file, self._ask, self._name = file, ask, name

    def write(self, data: Any) -> int:
        self._ask("write", self._name)
        return self._file.write(data)

    def read(self, *count: int) -> Any:
        self._ask("read", self._name)
        return self._file.read(*count)

    def flush(self) -> None:
        self._ask("flush", self._name)
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "FaultyFile":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class FaultyDisk:
    """Counts the operations on files below a folder, and refuses one of them.

    Args:
        folder: of the files that count.
        refuse: number of the operation to refuse, -1: none.
        code: the refusal's errno.
        lasting: also refuse all that write after it, as a full disk does.

    Attributes:
        done: "operation name" of each, in order; random parts of names are left out.
    """

    WRITES = ("open for writing", "write", "flush", "fsync", "mkdir", "link")

    def __init__(self, folder: Path, refuse: int = -1, code: int = errno.ENOSPC, *, lasting: bool):
        self.folder, self.refuse, self.code, self.lasting = str(folder), refuse, code, lasting
        self.done: list[str] = []
        self.active = False

    def ask(self, operation: str, path: Any) -> None:
        """Raise if this operation is to be refused."""
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not self.active or not name.startswith(self.folder):
            return
        number = len(self.done)
        self.done.append(f"{operation} {short(name)}")
        later = self.lasting and 0 <= self.refuse < number and operation in self.WRITES
        if number == self.refuse or later:
            raise OSError(self.code, os.strerror(self.code), name)

    @contextmanager
    def in_place(self, monkeypatch: Any) -> Iterator["FaultyDisk"]:
        """Stand between Python and the operating system inside the block."""
        with monkeypatch.context() as patch:
            for name in BY_NAME:
                patch.setattr(os, name, self._by_name(name, getattr(os, name)))
            for name in BY_HANDLE:
                patch.setattr(os, name, self._by_handle(name, getattr(os, name)))
            patch.setattr(builtins, "open", self._opening(builtins.open))
            patch.setattr(io, "open", self._opening(io.open))
            self.active = True
            try:
                yield self
            finally:
                self.active = False

    def _by_name(self, operation: str, real: Callable) -> Callable:
        def call(path: Any = ".", *rest: Any, **named: Any) -> Any:
            self.ask(operation, path)
            return real(path, *rest, **named)

        return call

    def _by_handle(self, operation: str, real: Callable) -> Callable:
        def call(handle: Any, *rest: Any, **named: Any) -> Any:
            try:
                name = os.readlink(f"/proc/self/fd/{handle}")
            except OSError:
                name = ""
            self.ask(operation, name)
            return real(handle, *rest, **named)

        return call

    def _opening(self, real: Callable) -> Callable:
        def call(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
            writes = set(mode) & set("wax+")
            self.ask("open for writing" if writes else "open for reading", name)
            file = real(path, mode, *rest, **named)
            return FaultyFile(file, self.ask, name) if name.startswith(self.folder) else file

        return call


def short(name: str) -> str:
    """The file's name without what differs from run to run."""
    last = os.path.basename(name)
    if last.endswith(".mmae-tmp"):
        return ".".join(last.split(".")[:-2]) + ".tmp"
    return "events" if last.startswith("events.out") else last
