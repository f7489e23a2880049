"""A bar where someone watches; in a file, plain lines now and then and no copy of the bar."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
import threading
from functools import partial
from pathlib import Path

import pytest
from launch import TINY, launch, wait

from util import progress
from util.progress import Progress, duration

# Of TINY: 10 steps an epoch, 30 steps.
LINE = re.compile(
    r"epoch \d of 3, step [\d,]+ of 30 \(\d+%\)  loss \d\.\d{4}  lr \d\.\d\de[+-]0\d  "
    r"[\d,]+ images/s  \d+ s left"
)


def test_a_log_in_a_file_has_lines_and_no_bar(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"  # of both, as by > log.txt 2>&1
    assert wait(launch([*TINY, f"--output_dir={tmp_path / 'run'}"], log)) == [0]
    for path in (log, tmp_path / "run" / "log-rank0.txt"):
        text = path.read_text()
        assert "\r" not in text and "step/s" not in text and "it/s" not in text
        # Every tenth of an epoch is every step here.
        assert len(LINE.findall(text)) == 30
        assert text.count("global batch 24") == 1  # the header is in the run's own log too
        lines = text.splitlines()
        first = next(i for i, line in enumerate(lines) if LINE.search(line))
        assert any("global batch 24" in line for line in lines[:first])
    assert len(log.read_text().splitlines()) < 60


def on_terminal(name: str) -> None:
    """Make a terminal this process's stderr."""
    os.dup2(os.open(name, os.O_RDWR | os.O_NOCTTY), 2)


def read_all(terminal: int, seen: list[bytes]) -> None:
    """What is written to a terminal, until the last writer has closed it."""
    with contextlib.suppress(OSError):  # which is how Linux says that
        while part := os.read(terminal, 4096):
            seen.append(part)


def test_a_terminal_has_the_bar(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    seen: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(ours, seen), daemon=True)
    reader.start()
    out = tmp_path / "out.txt"
    argv = [*TINY, f"--output_dir={tmp_path / 'run'}"]
    children = launch(argv, out, prepare=partial(on_terminal, os.ttyname(theirs)))
    assert wait(children) == [0]
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    text = b"".join(seen).decode()
    assert "\r" in text and "30/30" in text and "step" in text and "loss=" in text
    assert "epoch 3 of 3" in text
    assert not LINE.search(out.read_text())
    log = (tmp_path / "run" / "log-rank0.txt").read_text()
    assert len(LINE.findall(log)) == 30 and "\r" not in log


def test_a_long_run_says_a_hundred_lines_and_a_slow_one_is_not_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Progress(10_000, show=True, every=100)
    for step in range(1, 10_001):
        bar.update()
        if step % 20 == 0:
            bar.report(1.0, 1e-3, 100.0)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 100 and err == ""
    assert "step 10,000 of 10,000 (100%)" in out.splitlines()[-1]

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress(10_000, show=True, every=5000)
    for _ in range(10):
        now[0] += 200
        bar.update()
        bar.report(1.0, 1e-3, 100.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" of ")[0] for line in lines] == ["step 3", "step 6", "step 9"]
    assert "555 h" in lines[0]  # 200 s a step


def test_a_resumed_run_counts_on(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(100, 50, show=True, every=10)
    for _ in range(50):
        bar.update()
        bar.report(1.0, 1e-3, 100.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" of ")[0] for line in lines] == [f"step {n}" for n in (60, 70, 80, 90, 100)]


def test_work_of_seconds_says_nothing_and_work_of_minutes_each_tenth(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for seconds, expected in ((0.04, 0), (1.0, 10)):
        with Progress(200, show=True, unit="batch", where=lambda _: "features of val") as bar:
            for _ in range(200):
                now[0] += seconds
                bar.update()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == expected
    assert lines[0] == "features of val, batch 20 of 200 (10%)  3 min left"
    with Progress(10, show=False) as bar:
        for _ in range(10):
            now[0] += 100
            bar.update()
    assert capsys.readouterr().out == ""


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 99, 101, 3500, 3600, 7500)] == [
        "0 s", "99 s", "2 min", "58 min", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip


def test_what_is_said_early_is_in_the_log_of_its_own_command_alone(tmp_path: Path) -> None:
    from util.errors import command
    from util.progress import say
    from util.train.rank_log import rank_log

    @command
    def main(name: str, *, fails: bool) -> None:
        say(f"{name} before")
        if fails:
            raise SystemExit(3)
        with rank_log(tmp_path, 0):
            say(f"{name} after")

    with pytest.raises(SystemExit):
        main("first", fails=True)
    main("second", fails=False)
    main("third", fails=False)
    said = [line.split(" ", 2)[2] for line in (tmp_path / "log-rank0.txt").read_text().splitlines()]
    starts = said[0]
    assert said == [
        starts, "second before", "second after", "done",
        starts, "third before", "third after", "done",
    ]  # fmt: skip
