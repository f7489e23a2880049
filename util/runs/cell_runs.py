"""Run cells of a plan, each a command in a process of its own, and record what they measured.

Of `main_tables.py`: what is done stays done, what was stopped goes on, no child outlives us.
"""

import importlib.metadata
import json
import os
import platform
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from util.console import counted
from util.errors import EXIT_STOPPED, RunFailed, Stopped
from util.files import write_text, writing
from util.progress import say
from util.runs.plan import DONE, STARTS, Cell
from util.signals import STOP_SIGNALS, TERMINAL_SIGNALS
from util.train.logger import METRICS, prepare_folder

ROOT = Path(__file__).resolve().parents[2]  # where the mains are
LOG = "log.txt"
# Seconds between looks at the children, and between notes of their time.
POLL, HEARTBEAT = 0.1, 30.0
SIGNALS = (*STOP_SIGNALS, *TERMINAL_SIGNALS)


# ---- What is measured, and on what -------------------------------------------------------------


def from_json(name: str, otherwise: str | None = None) -> Callable[[Path], dict[str, Any]]:
    """A reader of metrics that a command writes into its folder as JSON.

    Args:
        name: of the file. otherwise: the one of an evaluation, which a training does not write.
    """

    def read(folder: Path) -> dict[str, Any]:
        found = folder / name
        if otherwise is not None and not found.is_file() and (folder / otherwise).is_file():
            found = folder / otherwise
        return json.loads(found.read_text())

    return read


def from_records(folder: Path) -> dict[str, Any]:
    """The last measurement of each kind in a pretraining's records."""
    metrics: dict[str, Any] = {}
    for line in (folder / METRICS).read_text().splitlines():
        record = json.loads(line)
        if record["kind"] in ("epoch", "eval"):
            metrics |= record
    return metrics


# The commands that a plan may name, and where each leaves what it measured.
READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "main_pretrain": from_records,
    "main_finetune": from_json("result.json", "result-eval.json"),
    "main_knn": from_json("knn.json"),
    "main_segment": from_json("result.json", "result-eval.json"),
    "main_visualize": from_json("reconstruction.json"),
}


def read_metrics(cell: Cell) -> dict[str, float]:
    """The numbers that a run left in its folder.

    Raises:
        RunFailed: there are none.
    """
    try:
        found = READERS[cell.run.main](cell.folder)
    except (OSError, ValueError, KeyError) as error:
        raise RunFailed(f"it ended well but its result cannot be read: {error}") from None
    metrics = {
        k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    if not metrics:
        raise RunFailed(f"it ended well but left no number in {cell.folder}")
    return metrics


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> str:
    """Processor, usable cores and GPUs."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [(models or [platform.processor() or platform.machine()])[0], f"{cores()} cores"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return ", ".join(parts)


def commit() -> str:
    """The repository's commit, with `-dirty` where tracked files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def surroundings(jobs: int) -> dict[str, Any]:
    """What a number depends on beside its command line."""
    return {
        "machine": machine(),
        "cores": cores(),
        "jobs": jobs,
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": importlib.metadata.version("timm"),
        },
    }


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# ---- Running -----------------------------------------------------------------------------------


@dataclass
class Child:
    """A cell at work."""

    cell: Cell
    process: subprocess.Popen[bytes]
    record: dict[str, Any]
    began: float = field(default_factory=time.monotonic)
    noted: float = field(default_factory=time.monotonic)
    killed: bool = False

    def note(self) -> None:
        """Write down the time so far, so that even a killed start is paid for in the tables."""
        self.noted = time.monotonic()
        self.record["starts"][-1]["seconds"] = round(self.noted - self.began, 3)
        write_json(self.cell.folder / STARTS, self.record)

    @property
    def seconds(self) -> float:
        """Spent on the cell, over all starts, as last noted."""
        return sum(start["seconds"] for start in self.record["starts"])


@dataclass
class StopRequest:
    """Whether we were asked to stop, and how often: a second time means at once."""

    reason: str = ""
    times: int = 0
    handlers: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "StopRequest":
        """Take the signals."""
        self.handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *rest: object) -> None:
        """Give them back."""
        for number_, handler in self.handlers.items():
            signal.signal(number_, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.ask(signal.Signals(number).name)

    def ask(self, reason: str) -> None:
        """Stop, and remember why: the first reason counts."""
        self.reason = self.reason or reason
        self.times += 1


def start(cell: Cell, cells: Mapping[str, Cell], jobs: int) -> Child:
    """Start a cell's command, its output appended to its log."""
    prepare_folder(cell.folder)
    before = cell.read(STARTS) or {"starts": []}
    record = {
        "cell": cell.spec(),
        "made_from": {need: cells[need].stamp() for need in cell.at_seed(cell.run.reads)},
        "starts": [*before["starts"], {"at": now(), "seconds": 0.0, **surroundings(jobs)}],
    }
    write_json(cell.folder / STARTS, record)
    words = [sys.executable, *cell.words(ROOT)]
    # With several at once each gets its share of the cores; waiting threads must not spin.
    threads = {
        "OMP_NUM_THREADS": str(max(1, cores() // jobs)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "THP_MEM_ALLOC_ENABLE": "1",  # large pages, see the Makefile
    }
    with writing(cell.folder / LOG):
        log = (cell.folder / LOG).open("ab", buffering=0)
        log.write(f"=== {now()} {shlex.join(words)}\n".encode())
    with log:
        # In a session of its own: Ctrl-C reaches us alone, and we stop the child in our way.
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **threads},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Child(cell, process, record)


def settle(child: Child) -> dict[str, float]:
    """What came of a command that has ended: its metrics, recorded with what they cost.

    Raises:
        Stopped: somebody stopped it, we or another.
        RunFailed: it failed, or left no result.
    """
    cell, code = child.cell, child.process.returncode
    if code in (EXIT_STOPPED, *(-number_ for number_ in SIGNALS)) or (code and child.killed):
        raise Stopped(f"{cell.title} was stopped")
    if code:
        how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        raise RunFailed(f"{how}: {fault_in(cell.folder / LOG)} (log: {cell.folder / LOG})")
    metrics, starts = read_metrics(cell), child.record["starts"]
    last = starts[-1]
    done = {
        "id": secrets.token_hex(8),
        "command": shlex.join(["python", *cell.words(ROOT)]),
        "cell": cell.spec(),
        "made_from": child.record["made_from"],
        "seconds": round(child.seconds, 3),
        "starts": len(starts),
        **{name: last[name] for name in ("cores", "jobs", "versions")},
        # A run that was stopped may have gone on elsewhere, or from other code.
        "machine": "; ".join(dict.fromkeys(s["machine"] for s in starts)),
        "commit": "; ".join(dict.fromkeys(s["commit"] for s in starts)),
        "finished": now(),
        "metrics": metrics,
    }
    write_json(cell.folder / DONE, done)
    return metrics


def fault_in(path: Path) -> str:
    """The last line of a log that names an error; else the last that says something."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    # A progress bar, or what other processes say, may stand after it.
    named = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception)\b", line)]
    return (named or lines)[-1].strip()[:200]


def end_children(children: Sequence[Child], *, kill: bool) -> None:
    """SIGTERM to each command, which answers for its loading processes; SIGKILL to them as well."""
    for child in children:
        if child.process.poll() is None:
            child.killed = kill
            if kill:
                os.killpg(child.process.pid, signal.SIGKILL)
            else:
                child.process.terminate()


@dataclass
class CellQueue:
    """How far the cells are: titles, and why some failed."""

    waiting: list[str]
    done: set[str]
    failed: dict[str, str] = field(default_factory=dict)

    def next(self, cells: Mapping[str, Cell]) -> str | None:
        """Take the first waiting cell whose needs are done; those that lost one fail with it."""
        for title in list(self.waiting):
            needs = cells[title].at_seed(cells[title].run.needs)
            lost = [need for need in needs if need in self.failed]
            if lost:
                self.failed[title] = f"not started, it needs {lost[0]}"
                self.waiting.remove(title)
            elif self.done.issuperset(needs):
                self.waiting.remove(title)
                return title
        return None


def run_cells(
    cells: Mapping[str, Cell],
    wanted: Sequence[str],
    jobs: int,
    stop: StopRequest,
    after_each: Callable[[Cell, dict[str, float]], str],
) -> dict[str, str]:
    """Run the wanted cells in their order, `jobs` at once, as what they need is done.

    Args:
        wanted: titles, those that they need among them.
        stop: once asked, the children are stopped and no other is started.
        after_each: called when a cell is done; what to tell of it.

    Returns:
        title to reason, of cells that failed or could not be started because another did.
    """
    done = {title for title, cell in cells.items() if cell.stamp()}
    progress = CellQueue([title for title in wanted if title not in done], done)
    running: list[Child] = []
    acted = 0
    try:
        while True:
            while not stop.times and len(running) < jobs and (title := progress.next(cells)):
                say(f"[{len(done)}/{len(cells)}] {title} starts")
                running.append(start(cells[title], cells, jobs))
            if not running:
                return progress.failed
            time.sleep(POLL)
            if stop.times > acted:
                what = counted(len(running), "run")
                say(f"stopping {what} ({stop.reason}); asked again, they are killed")
                end_children(running, kill=acted > 0)
                acted = stop.times
            for child in list(running):
                ended = child.process.poll() is not None
                if ended or time.monotonic() - child.noted > HEARTBEAT:
                    child.note()
                if not ended:
                    continue
                running.remove(child)
                title, took = child.cell.title, f"after {child.seconds:.0f} s"
                try:
                    text = after_each(child.cell, settle(child))
                    done.add(title)
                    say(f"[{len(done)}/{len(cells)}] {title} done {took}{text}")
                except Stopped as error:
                    if not stop.times:
                        stop.ask(str(error))
                    say(f"{title} stopped {took}")
                except RunFailed as error:
                    progress.failed[title] = str(error)
                    say(f"{title} failed {took}: {error}")
    finally:  # whatever happened to us, no child is left behind
        end_children(running, kill=False)
        for child in running:
            child.process.wait()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")
