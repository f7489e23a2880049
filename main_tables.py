"""Run the cells of a plan, each a command in a process of its own, and make tables of the results.

python main_tables.py --plan recipes/tables/fashion_mnist.yaml

python main_tables.py --papers recipes/papers/*.yaml --runs output_dir  the papers' tables
python main_tables.py --compare output_dir/demo docs/curves/demo.json   a run and a reference

A cell is a run of the plan at one seed. What is done stays done, and the same command goes on after
a stop. The tables are OUTPUT/tables.md and tables.json, written anew whenever a cell is done.
"""

import argparse
import fcntl
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from util.config import FlagParser, number
from util.curves import (
    TOLERANCE,
    WINDOW,
    compare,
    draw_curves,
    read_curve,
    save_curve,
    verdict,
)
from util.dist import STOP_SIGNALS
from util.errors import EXIT_STOPPED, BadInput, RunFailed, Stopped, command
from util.logger import METRICS, prepare_folder, say, write_text
from util.paper_tables import commands, find_runs, look_up, read_paper, to_csv
from util.paper_tables import markdown as papers_markdown
from util.plan import (
    DONE,
    STARTS,
    Cell,
    Plan,
    cells_of,
    check_unchanged,
    choose,
    read_plan,
)
from util.tables import check_metrics, fill_tables, markdown, show

ROOT = Path(__file__).resolve().parent
LOG, LOCK = "log.txt", ".lock"
# Seconds between looks at the children, and between notes of their time.
POLL, HEARTBEAT = 0.1, 30.0
SIGNALS = (*STOP_SIGNALS, signal.SIGINT, signal.SIGHUP)


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plan", help="YAML file, for example recipes/tables/fashion_mnist.yaml")
    parser.add_argument("--output_dir", help="default: output_dir/tables/NAME of the plan")
    parser.add_argument(
        "--seeds", type=number(int, 0, 2**32 - 1), nargs="+", help="default: the plan's"
    )
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="cells at once")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="runs (or seed-S/RUN) whose name matches, such as 'knn_*', and what they need",
    )
    parser.add_argument("--list", action="store_true", help="print the cells and leave")
    group = parser.add_argument_group("tables of papers, from runs that are there")
    group.add_argument(
        "--papers", nargs="+", metavar="FILE", help="such as recipes/papers/mae.yaml"
    )
    group.add_argument(
        "--runs", nargs="+", default=["output_dir"], metavar="FOLDER", help="where runs are found"
    )
    group.add_argument("--commands", action="store_true", help="print each row's commands instead")
    group = parser.add_argument_group("curves: loss by step")
    group.add_argument(
        "--compare", nargs=2, metavar=("RUN", "REFERENCE"), help="how far, and where they part"
    )
    group.add_argument(
        "--tolerance",
        type=number(float, 0),
        default=TOLERANCE,
        help="relative difference of a stretch of steps up to which curves are the same",
    )
    group.add_argument(
        "--window", type=number(int, 1), default=WINDOW, help="steps of such a stretch, at least"
    )
    group.add_argument(
        "--save_curve",
        nargs=2,
        metavar=("RUN", "FILE"),
        help="keep a run of this machine and these versions as a reference",
    )
    return parser


# ---- What is measured, and on what -------------------------------------------------------------


def from_json(name: str) -> Callable[[Path], dict[str, Any]]:
    """A reader of metrics that a command writes into its folder as JSON."""
    return lambda folder: json.loads((folder / name).read_text())


def from_records(folder: Path) -> dict[str, Any]:
    """The last measurement of each kind in a pretraining's records."""
    metrics: dict[str, Any] = {}
    for line in (folder / METRICS).read_text().splitlines():
        record = json.loads(line)
        if record["kind"] in ("epoch", "eval"):
            metrics |= record
    return metrics


# The commands that a plan may name, and where each leaves what it measured.
MAINS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "main_pretrain": from_records,
    "main_finetune": from_json("result.json"),
    "main_knn": from_json("knn.json"),
    "main_segment": from_json("result.json"),
    "main_visualize": from_json("reconstruction.json"),
}


def metrics_of(cell: Cell) -> dict[str, float]:
    """The numbers that a run left in its folder.

    Raises:
        RunFailed: there are none.
    """
    try:
        found = MAINS[cell.run.main](cell.folder)
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


@contextmanager
def only_one(output: Path) -> Iterator[int]:
    """Lock the output folder; the children inherit the lock and hold it as long as they live.

    So neither a second start nor children that outlived a killed first one can write to a folder
    at the same time.

    Raises:
        BadInput: it is locked, or cannot be.
    """
    handle = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 100).decode(errors="replace").strip()
            raise BadInput(
                f"{output} is in use by another main_tables (process {holder}) or by runs that it "
                "left behind when it was killed; wait for them, or stop them"
            ) from None
        except OSError as error:
            raise BadInput(f"cannot lock {output / LOCK}: {error.strerror}") from None
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield handle
    finally:
        os.close(handle)


def start(cell: Cell, cells: Mapping[str, Cell], jobs: int, lock: int) -> Child:
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
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // jobs)), "OMP_WAIT_POLICY": "PASSIVE"}
    with (cell.folder / LOG).open("ab") as log:
        log.write(f"=== {now()} {shlex.join(words)}\n".encode())
        log.flush()
        # In a session of its own: Ctrl-C reaches us alone, and we stop the child in our way.
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **threads},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
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
    metrics, starts = metrics_of(cell), child.record["starts"]
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
class Progress:
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
    lock: int,
    stop: StopRequest,
    after_each: Callable[[Cell, dict[str, float]], str],
) -> dict[str, str]:
    """Run the wanted cells in their order, `jobs` at once, as what they need is done.

    Args:
        wanted: titles, those that they need among them.
        lock: handle that the children inherit.
        stop: once asked, the children are stopped and no other is started.
        after_each: called when a cell is done; what to tell of it.

    Returns:
        title to reason, of cells that failed or could not be started because another did.
    """
    done = {title for title, cell in cells.items() if cell.stamp()}
    progress = Progress([title for title in wanted if title not in done], done)
    running: list[Child] = []
    acted = 0
    try:
        while True:
            while not stop.times and len(running) < jobs and (title := progress.next(cells)):
                say(f"[{len(done)}/{len(cells)}] {title} starts")
                running.append(start(cells[title], cells, jobs, lock))
            if not running:
                return progress.failed
            time.sleep(POLL)
            if stop.times > acted:
                say(f"stopping {len(running)} runs ({stop.reason}); asked again, they are killed")
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


# ---- The command -------------------------------------------------------------------------------


def say_list(cells: Mapping[str, Cell], wanted: Sequence[str]) -> None:
    """Every wanted cell: how far it is, and its command line."""
    for title in wanted:
        cell = cells[title]
        state = "done" if cell.stamp() else "begun" if cell.read(STARTS) else "to do"
        print(f"{title}  [{state}]\n    {shlex.join(['python', *cell.words(ROOT)])}")


def paper_tables(args: argparse.Namespace) -> None:
    """The papers' tables with a column for the runs that are finished."""
    recipes = ROOT / "recipes"
    tables = [table for path in args.papers for table in read_paper(Path(path), recipes)]
    if args.commands:
        for table in tables:
            print(f"\n# {table.paper}: {table.title}")
            for row in table.rows:
                lines = commands(row, table.metric, recipes)
                print("\n".join([f"# {row.name}", *(lines or ["# no system of ours"])]))
        return
    runs = find_runs([Path(root) for root in args.runs])
    filled = [
        (table, [look_up(row, table.metric, runs, recipes) for row in table.rows])
        for table in tables
    ]
    output = Path(args.output_dir or "output_dir/tables/papers")
    prepare_folder(output)
    text = papers_markdown(filled)
    write_text(output / "papers.md", text)
    write_text(output / "papers.csv", to_csv(filled))
    print(text)
    found = {f.folder: f"{t.title}: {r.name}" for t, fs in filled
             for r, f in zip(t.rows, fs, strict=True) if f.folder}  # fmt: skip
    if found:
        curves = [(name, read_curve(folder)) for folder, name in found.items()]
        draw_curves(curves, output / "curves.png")
        say(f"curves  {output / 'curves.png'}")
    say(f"tables  {output / 'papers.md'}, {output / 'papers.csv'}")


def compare_curves(args: argparse.Namespace) -> None:
    """Say how far a run is from a reference.

    Raises:
        RunFailed: beyond the tolerance.
    """
    run, reference = (read_curve(Path(path)) for path in args.compare)
    found = compare(run, reference, args.tolerance, args.window)
    print(verdict(run, reference, found))
    if not found.same:
        raise RunFailed(f"{args.compare[0]} does not follow {args.compare[1]}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done yet, and write the tables; see the module."""
    args = build_parser().parse(argv)
    jobs = [n for n in ("plan", "papers", "compare", "save_curve") if getattr(args, n)]
    if len(jobs) != 1:
        given = f"not {', '.join('--' + name for name in jobs)}" if jobs else "none was given"
        raise BadInput(
            f"give one of --plan (such as recipes/tables/fashion_mnist.yaml), --papers, --compare "
            f"and --save_curve; {given}"
        )
    if args.papers:
        paper_tables(args)
        return
    if args.compare:
        compare_curves(args)
        return
    if args.save_curve:
        run, path = args.save_curve
        prepare_folder(Path(path).parent)
        about = surroundings(1)
        save_curve(read_curve(Path(run)), Path(path), {"saved": now(), **about})
        say(f"curve   {path}")
        return

    # ------------------------------------------------------------------------------- plan
    plan = read_plan(Path(args.plan), MAINS)
    output = Path(args.output_dir or f"output_dir/tables/{plan.path.stem}").resolve()
    seeds = list(dict.fromkeys(args.seeds or plan.seeds))
    # The tables hold all seeds of the plan also when only some are to be run.
    cells = cells_of(plan, list(dict.fromkeys([*plan.seeds, *seeds])), output)
    wanted = choose(cells, seeds, args.only or ["*"])
    if args.list:
        say_list(cells, wanted)
        return
    prepare_folder(output)
    with only_one(output) as lock, StopRequest() as stop:
        run_plan(args, plan, cells, wanted, output, lock, stop)


def run_plan(
    args: argparse.Namespace,
    plan: Plan,
    cells: Mapping[str, Cell],
    wanted: Sequence[str],
    output: Path,
    lock: int,
    stop: StopRequest,
) -> None:
    """Check, run, and write the tables, with the output folder to ourselves."""
    check_unchanged(cells)

    def write_tables() -> dict[str, Any]:
        report = fill_tables(plan, cells)
        write_json(output / "tables.json", report)
        write_text(output / "tables.md", markdown(report))
        return report

    def after_each(cell: Cell, metrics: dict[str, float]) -> str:
        write_tables()
        shown = dict.fromkeys(
            m for table in plan.tables for row in table.rows for m in row.metrics
            if row.run == cell.run.name and m in metrics
        )  # fmt: skip
        return "".join(f", {name} {show(metrics[name])}" for name in shown)

    # ------------------------------------------------------------------------------- runs
    failed = run_cells(cells, wanted, args.jobs, lock, stop, after_each)

    # ----------------------------------------------------------------------------- tables
    report = write_tables()
    failures = "".join(f"\n  {title}: {reason}" for title, reason in failed.items())
    if stop.times:
        more = f"; failed so far:{failures}" if failed else ""
        raise Stopped(
            f"{stop.reason}; {report['done']} of {report['cells']} runs are done, the same command "
            f"goes on from there{more}"
        )
    print(f"\n{markdown(report)}")
    say(f"tables  {output / 'tables.md'}")
    check_metrics(report, plan, cells)
    if failed:
        raise RunFailed(
            f"runs that failed, which the same command tries again: {len(failed)}{failures}"
        )


if __name__ == "__main__":
    main()
