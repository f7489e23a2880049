"""The study of M-MAE's terms and settings: runs, effects with intervals, a document with plots.

python -m lab.study --plan recipes/tables/study.yaml             # make study: all of it, resumable
python -m lab.study --plan ... --only factorial/mask_on-lscale_off-offset_off --seeds 7
python -m lab.study --plan ... --report                          # from what is done so far

Each stage is a plan that main_tables.py runs: the factorial and the screening of settings as the
file says, then what the screening chose, on new seeds. What is done stays done.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lab.study.analysis import (
    Finished,
    Study,
    candidates,
    compare_training,
    confirmed,
    estimate_effects,
    read_study,
    summarise_arms,
    with_arms,
)
from lab.study.report import draw, markdown
from util.config.flags import FlagParser, number
from util.console import print_text
from util.errors import EXIT_BAD_INPUT, EXIT_STOPPED, BadInput, RunFailed, Stopped, command, needs
from util.files import write_text
from util.flag_types import expanded_path, processes_flag
from util.names import nearest
from util.progress import say
from util.runs.plan import Cell, Plan, list_cells, read_plan
from util.runs.tables import fill_tables, show
from util.signals import STOP_SIGNALS, TERMINAL_SIGNALS
from util.train.logger import prepare_folder

ROOT = Path(__file__).resolve().parents[2]
# The commands that a study's plan may name; how their results are read is main_tables.py's.
COMMANDS = ("main_pretrain", "main_finetune", "main_knn", "main_visualize")
RESULT, DOCUMENT, PICTURES = "study.json", "study.md", "pictures"
RATES = "results/lscale_lr.json"  # what main_tables.py made of recipes/tables/lscale_lr.yaml
SIGNALS = (*STOP_SIGNALS, *TERMINAL_SIGNALS)


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python -m lab.study --plan recipes/tables/study.yaml --jobs 2",
        first=("plan", "output_dir", "docs", "jobs", "only", "seeds", "report"),
    )
    parser.add_argument(
        "--plan",
        type=expanded_path,
        default="recipes/tables/study.yaml",
        help="YAML file with a `study`",
    )
    add_run_flags(parser, "study", f"{RESULT}, {DOCUMENT} and plots")
    parser.add_argument(
        "--only",
        metavar="ROW",
        help="run one row of the study again, such as factorial/mask_on-lscale_on-offset_on, and "
        "compare it with what the study found; nothing is written into --docs; default: all rows",
    )
    parser.add_argument(
        "--seeds",
        type=number(int, 0, 2**32 - 1),
        nargs="+",
        help="seeds of --only; default: one of its own",
    )
    parser.add_argument(
        "--from_docs",
        action="store_true",
        help=f"run nothing, write the document anew from --docs/{RESULT} and the plan's remarks",
    )
    return parser


def add_run_flags(parser: FlagParser, name: str, written: str) -> None:
    """Where the runs of such a study are, where its document, and how many run at once.

    Args:
        name: of the folder of the runs. written: what goes into `--docs`.
    """
    parser.add_argument(
        "--output_dir",
        type=expanded_path,
        default=f"output_dir/{name}",
        help="folder of the runs",
    )
    parser.add_argument("--docs", type=expanded_path, default="docs", help=f"folder for {written}")
    parser.add_argument("--jobs", type=processes_flag(1), default=1, help="runs at the same time")
    parser.add_argument("--report", action="store_true", help="run nothing, write the document")


# ---- Running -----------------------------------------------------------------------------------


def run_plan(path: Path, output: Path, jobs: int) -> None:
    """Have main_tables.py run a plan, and hand it the signals that we get.

    Raises:
        Stopped, BadInput, RunFailed: as it ended; it has said why.
    """
    words = [f"--plan={path}", f"--output_dir={output}", f"--jobs={jobs}"]
    # In a session of its own: Ctrl-C reaches us alone, and we hand it on once.
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main_tables.py"), *words], cwd=ROOT, start_new_session=True
    )
    before = {n: signal.signal(n, lambda n, _: process.send_signal(n)) for n in SIGNALS}
    try:
        code = process.wait()
    finally:
        for number_, handler in before.items():
            signal.signal(number_, handler)
    if code == EXIT_STOPPED:
        raise Stopped("the same command goes on from there")
    if code == EXIT_BAD_INPUT:
        raise BadInput(f"{path} cannot be run as it is, see above")
    if code:
        raise RunFailed(f"main_tables.py ended with code {code} on {path}, see above")


def write_plan(path: Path, given: Mapping[str, Any], why: str) -> Path:
    """A plan that we made ourselves, as a file that main_tables.py also takes alone."""
    text = yaml.safe_dump(dict(given), sort_keys=False)
    write_text(path, f"# {why}\n{text}")
    return path


# ---- What came out -----------------------------------------------------------------------------


def cells_in(plan: Plan, output: Path) -> dict[str, Cell]:
    """The plan's cells at its own seeds."""
    return list_cells(plan, plan.seeds, output.resolve())


def choose_arms(study: Study, plan: Plan, finished: Finished) -> dict[str, Any]:
    """What the screening chose; see `candidates`."""
    settings = plan.arms[study.settings]
    seeds = settings.seeds or plan.seeds
    values = {o.label: finished.values(o, list(settings.arms), seeds) for o in study.outcomes}
    return candidates(study, settings, values)


def build_report(study: Study, plan: Plan, output: Path) -> dict[str, Any]:
    """Everything that docs/study.json holds, from what is done so far."""
    cells = cells_in(plan, output / "main")
    finished = Finished.of(cells)
    choice = choose_arms(study, plan, finished)
    report = where_from(plan, cells)
    families = {o.label: o.family for o in study.outcomes}
    factorial = plan.arms[study.factorial]
    report |= {"about": study.about, "remarks": list(study.remarks)}
    report["outcomes"] = {o.label: f"{o.metric} of {o.run}" for o in study.outcomes}
    rows, found = [], {}
    for stage in (study.factorial, study.settings):
        arms = plan.arms[stage]
        seeds = arms.seeds or plan.seeds
        found[stage] = {o.label: finished.values(o, list(arms.arms), seeds) for o in study.outcomes}
        name = "factorial" if stage == study.factorial else "settings"
        rows += summarise_arms(name, arms.arms, found[stage])
    report["effects"] = estimate_effects(factorial, found[study.factorial], families)
    report["training"] = compare_training(study, factorial, finished, factorial.seeds or plan.seeds)
    report["screening"] = {k: v for k, v in choice.items() if k != "arms"}
    report["screening_seeds"] = list(plan.arms[study.settings].seeds or plan.seeds)
    report["rows"] = rows
    report["confirmed"] = []
    if (output / "confirm.yaml").is_file():
        add_confirmed(report, study, output)
    return report


def add_confirmed(report: dict[str, Any], study: Study, output: Path) -> None:
    """The runs that confirm what the screening chose, into the report."""
    plan = read_plan(output / "confirm.yaml", COMMANDS)
    cells = cells_in(plan, output / "confirm")
    added = where_from(plan, cells)
    for name in ("cells", "done", "seconds"):
        report[name] += added[name]
    for name in ("machine", "versions", "commit"):
        report[name] = list(dict.fromkeys([*report[name], *added[name]]))
    report["finished"] = max((report["finished"] or "", added["finished"] or ""))
    arms, finished = plan.arms["confirm"].arms, Finished.of(cells)
    values = {o.label: finished.values(o, list(arms), plan.seeds) for o in study.outcomes}
    report["rows"] += summarise_arms("confirm", arms, values)
    families = {o.label: o.family for o in study.outcomes}
    report["confirmed"] = confirmed(values, list(arms), families)


def where_from(plan: Plan, cells: Mapping[str, Cell]) -> dict[str, Any]:
    """How much is done, and on what."""
    tables = fill_tables(plan, cells)
    names = ("plan", "cells", "done", "seconds", "machine", "versions", "commit", "finished")
    return {name: tables[name] for name in names}


def check_not_less(report: Mapping[str, Any], output: Path, kept: Path, more: str = "") -> None:
    """Refuse to write a report of fewer runs over one of more.

    Args:
        output: folder of the runs. kept: the report that is there, or not. more: a way out.

    Raises:
        BadInput: see above.
    """
    there = json.loads(kept.read_text())["done"] if kept.is_file() else 0
    if report["done"] < there:
        raise BadInput(
            f"{output} holds {report['done']} finished runs, and {kept} is of {there}: it would "
            f"be lost; give another --docs{more}"
        )


def write_report(report: Mapping[str, Any], docs: Path) -> None:
    """JSON, plots and the document."""
    prepare_folder(docs)
    write_text(docs / RESULT, json.dumps(report, indent=1) + "\n")
    draw(report, docs / PICTURES)
    rates = json.loads((docs / RATES).read_text()) if (docs / RATES).is_file() else None
    write_text(docs / DOCUMENT, markdown(report, PICTURES, rates))
    say(f"document  {docs / DOCUMENT}\ndata      {docs / RESULT}")


# ---- One row again -----------------------------------------------------------------------------


def rows_known(study: Study, plan: Plan, docs: Path) -> dict[str, dict[str, Any]]:
    """Every row by name: those that the study found, and those of the plan that were not run."""
    known = {}
    for stage, arms in (("factorial", study.factorial), ("settings", study.settings)):
        for row in summarise_arms(stage, plan.arms[arms].arms, {}):
            known[row["row"]] = row
    if (docs / RESULT).is_file():
        for row in json.loads((docs / RESULT).read_text())["rows"]:
            known[row["row"]] = row
    return known


def run_again(
    study: Study, plan: Plan, row: Mapping[str, Any], seeds: Sequence[int], output: Path, jobs: int
) -> None:
    """Run one row anew and compare it with the interval in which one more run lies."""
    stage, _, arm = row["row"].partition("/")
    again = output / "again" / stage / arm
    prepare_folder(again)
    given = with_arms(plan, "again", seeds, {arm: row["flags"]})
    path = write_plan(again / "plan.yaml", given, f"The row {row['row']} again")
    run_plan(path, again, jobs)
    made = read_plan(path, COMMANDS)
    finished = Finished.of(cells_in(made, again))
    inside = compared = 0
    for outcome in study.outcomes:
        stored = row["outcomes"].get(outcome.label)
        for seed, value in finished.values(outcome, [arm], seeds).get(arm, {}).items():
            line = f"{outcome.label:24s} seed {seed}: {show(value)}"
            if stored is not None:
                line += f"; the study: {show(stored['mean'], stored['deviation'])}"
                if str(seed) in stored["values"]:
                    line += f", at this seed {show(stored['values'][str(seed)])}"
                if stored["one_more"] is not None:
                    low, high = stored["one_more"]
                    within = low <= value <= high
                    compared, inside = compared + 1, inside + within
                    line += f"; one more run: {show(low)} to {show(high)}, "
                    line += "inside" if within else "OUTSIDE"
            print_text(line)
    print_text(
        f"{inside} of {compared} inside their 95 % intervals for one more run"
        if compared
        else "nothing to compare with: the study has fewer than two seeds of this row"
    )


# ---- The command -------------------------------------------------------------------------------


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done yet and write the document; see the module."""
    args = build_parser().parse(argv)
    for module, install in (("scipy.stats", "scipy"), ("matplotlib", "matplotlib")):
        needs(module, install)  # now, not after hours of runs
    plan = read_plan(Path(args.plan), COMMANDS)
    study = read_study(plan)
    output, docs = Path(args.output_dir).resolve(), Path(args.docs)

    # ---------------------------------------------------------------------------- one row
    if args.only:
        known = rows_known(study, plan, docs)
        if args.only not in known:
            raise BadInput(f"--only {args.only} is no row of the study{nearest(args.only, known)}")
        row = known[args.only]
        stored = [int(seed) for o in row["outcomes"].values() for seed in o["values"]]
        run_again(study, plan, row, args.seeds or stored[:1] or [0], output, args.jobs)
        return
    if args.seeds:
        raise BadInput("--seeds goes with --only; the study's own are in its plan")

    # ------------------------------------------------------------------------------ study
    if args.from_docs:
        if not (docs / RESULT).is_file():
            raise BadInput(f"--from_docs needs {docs / RESULT}, which is not there")
        report = json.loads((docs / RESULT).read_text())
        write_report(report | {"about": study.about, "remarks": list(study.remarks)}, docs)
        return
    prepare_folder(output)
    if not args.report:
        run_plan(Path(args.plan).resolve(), output / "main", args.jobs)
        choice = choose_arms(study, plan, Finished.of(cells_in(plan, output / "main")))
        given = with_arms(plan, "confirm", study.confirm_seeds, choice["arms"])
        why = "Written by lab.study: what the screening chose, on new seeds"
        path = write_plan(output / "confirm.yaml", given, why)
        run_plan(path, output / "confirm", args.jobs)

    # --------------------------------------------------------------------------- document
    report = build_report(study, plan, output)
    anew = ", or --from_docs to write that document anew"
    check_not_less(report, output, docs / RESULT, anew)
    write_report(report, docs)
