"""What a flag changes, told by a run: named traces of a command, and rows of a table over flags.

A row gives a flag another value and names every trace that then differs from a run without it. The
names are all of what a run has: one that differs and is not named is a fault as well, and so is a
flag without a row.
"""

import gc
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import signals_kept
from tiny import add_small_models
from torch import Tensor

Trace = dict[str, Any]
# Flags that only the parser itself knows; tests/test_help.py and tests/test_config_files.py have
# what they do, for every main.
OF_THE_PARSER = {"--help", "--help_all", "--config", "--plugin"}


@dataclass(frozen=True)
class Row:
    """Another value of a flag, and all that it changes.

    Attributes:
        flags: words of the command line.
        changes: names of the traces that differ, separated by blanks; all others are the same.
        beside: words that both runs have, without which the value would not count.
        without: flags that neither run has, though all others do.
        says: a text that this run prints and the other one does not.
        free: a resume may go on with this value although the weights change.
    """

    flags: str
    changes: str = ""
    beside: str = ""
    without: str = ""
    says: str = ""
    free: bool = False


@dataclass(frozen=True)
class Told:
    """A flag that a test of its own tells about: its name, in the module of the table."""

    test: str


Table = dict[str, Row | list[Row] | Told]


def rows_of(table: Table) -> list[tuple[str, Row]]:
    """Every row, under the name that its test has."""
    found = []
    for flag, entry in table.items():
        rows = [entry] if isinstance(entry, Row) else entry if isinstance(entry, list) else []
        found += [(f"{flag} {row.flags}" if len(rows) > 1 else flag, row) for row in rows]
    return found


def cases(table: Table) -> pytest.MarkDecorator:
    """A test for every row of a table, under its flag's name."""
    named = rows_of(table)
    return pytest.mark.parametrize("row", [r for _, r in named], ids=[n for n, _ in named])


def flags_of(parser: Any) -> set[str]:
    """The flags of a parser by their longest word; a positional one by its name."""
    return {max(a.option_strings, key=len, default=a.dest) for a in parser._actions}


def check_complete(table: Table, parser: Any, module: str, *classes: type) -> None:
    """Every flag has an entry, every entry has a flag, a row gives its flag, a test is there."""
    flags = flags_of(parser) - OF_THE_PARSER
    missing, gone = sorted(flags - table.keys()), sorted(table.keys() - flags)
    assert not missing, f"flags without an entry in the table of {module}: {' '.join(missing)}"
    assert not gone, f"entries of flags that are no more, in {module}: {' '.join(gone)}"
    for flag, entry in table.items():
        if isinstance(entry, Told):
            places = (sys.modules[module], *classes)
            assert any(hasattr(p, entry.test) for p in places), f"{flag}: no test {entry.test}"
            continue
        for row in entry if isinstance(entry, list) else [entry]:
            given = {word.split("=")[0] for word in row.flags.split()}
            assert flag in given or not flag.startswith("--"), f"{flag}: its row is {row.flags}"


# ---- Traces ------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """A short text that is the same for equal values alone; of tensors, bit for bit."""
    total = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            total.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(part, Mapping):
            for key in sorted(part, key=str):
                total.update(str(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            total.update(str(len(part)).encode())
            for one in part:
                add(one)
        else:
            total.update(repr(part).encode())

    add(value)
    return total.hexdigest()[:12]


class Watched:
    """Something that is called or iterated over as before, and what it gives is noted."""

    def __init__(self, whole: Any, note: Callable[[Any], None]) -> None:
        self.whole, self.note = whole, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __call__(self, *rest: Any, **more: Any) -> Any:
        given = self.whole(*rest, **more)
        self.note(given)
        return given

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[Any]:
        for given in self.whole:
            self.note(given)
            yield given


def files_below(root: Path) -> list[str]:
    """What a command wrote, by name; the names of TensorBoard's files hold time and machine."""
    names = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return sorted(re.sub(r"tfevents\.\S+", "tfevents", name) for name in names)


def plain(text: str, *places: Path) -> list[str]:
    """Printed lines without bars of progress and the names of the test's own folders."""
    for place in places:
        text = text.replace(str(place), "HERE")
    return [line for line in text.splitlines() if "%|" not in line]


@dataclass
class Command:
    """Runs a main in this process, on what is small, and gives its trace.

    Attributes:
        name: of the main.
        base: words of every run.
        places: folders and files that rows may name, as `{name}`.
        root: folder for the runs.
        output: words that say where a run writes; `{root}` is its own folder.
    """

    name: str
    base: Sequence[str]
    places: dict[str, str]
    root: Path
    output: str = "--output_dir={root}/run"
    kept: dict[tuple[str, str], Trace] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        gc.collect()
        gc.freeze()  # what torch and we hold is not searched again for each small model

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """Before a run: have noted what it hands on."""

    def read(self, root: Path, trace: Trace) -> None:
        """After a run: what it has written."""

    def baseline(self, words: str = "", without: str = "") -> Trace:
        """The trace of a run of these words, run once."""
        if (words, without) not in self.kept:
            self.kept[words, without] = self(words, without=without)
        return self.kept[words, without]

    def check(self, row: Row) -> tuple[Trace, Trace]:
        """Run a row, and see that it changes what it says and nothing else."""
        before = self.baseline(row.beside, row.without)
        after = self(row.beside, row.flags, without=row.without)
        compare(row, before, after)
        return before, after

    def __call__(self, *words: str, folder: Path | None = None, without: str = "") -> Trace:
        self.number += 1
        root = self.root / str(self.number) if folder is None else folder
        root.mkdir(exist_ok=True)
        given = [word for word in self.base if word.split("=")[0] not in without.split()]
        given += " ".join([self.output, *words]).split()
        argv = [word.format(**self.places, root=root) for word in given]
        trace: Trace = {}
        with pytest.MonkeyPatch.context() as patch:
            add_small_models(patch)
            self.watch(patch, trace)
            out, err, trace["ends"] = call(self.name, argv)
        trace["text"] = out + err  # for `says`, not compared
        trace["files"] = files_below(root)
        self.read(root, trace)
        if not trace.keys() & NUMBERS:
            trace["said"] = plain(out + err, root)
        return trace


def call(name: str, argv: Sequence[str]) -> tuple[str, str, int]:
    """A main's output and exit code, in this process; its signal handlers are put back."""
    import contextlib
    import io

    out, err, code = io.StringIO(), io.StringIO(), 0
    with signals_kept(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(name).main(list(argv))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return out.getvalue(), err.getvalue(), code


# What a row does not have to name: it follows from the flags themselves, or is asked for apart.
NOT_COMPARED = {"agree", "text", "view"}
# Where a run has one of these, what it prints follows from the rest.
NUMBERS = {"start", "votes", "table", "masked", "weights", "shards", "asked"}


def compare(row: Row, before: Trace, after: Trace) -> None:
    """See that a row's traces differ, and no others."""
    assert not before["ends"], f"{row.beside}, without {row.flags}: {before['text'][-600:]}"
    names = (before.keys() | after.keys()) - NOT_COMPARED
    found = {name for name in names if before.get(name) != after.get(name)}
    expected = set(row.changes.split())
    told = f"{row.flags} {row.beside and f'beside {row.beside}'}: "
    lost, more = sorted(expected - found), sorted(found - expected)
    shown = "".join(f"\n  {n}: {before.get(n)}\n    -> {after.get(n)}" for n in more)
    if "ends" in more:
        shown = ""
    end = after["text"][-600:] if after.get("ends") else ""
    assert not lost and not more, (
        f"{told}was to change {lost or 'nothing more'}, and did not; changed beside it {more}"
        f"{shown}\n{end}"
    )
    if row.says:
        assert row.says in after["text"], f"{told}does not say {row.says!r}:\n{after['text']}"
        assert row.says not in before["text"], f"{told}it says {row.says!r} without it too"
