"""Run the cells of a plan, each a command in a process of its own, and make tables of the results.

python main_tables.py --plan recipes/tables/fashion_mnist.yaml

python main_tables.py --papers recipes/papers/*.yaml --runs output_dir  the papers' tables
python main_tables.py --compare output_dir/demo docs/curves/demo.json   a run and a reference

A cell is a run of the plan at one seed. What is done stays done, and the same command goes on after
a stop. The tables are OUTPUT/tables.md and tables.json, written anew whenever a cell is done.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_interrupt

    take_interrupt()

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.config.flag_parser import FlagParser
from util.config.tables_flags import add_curve_flags, add_paper_flags, add_plan_flags
from util.console import print_text
from util.errors import BadInput, RunFailed, Stopped, command
from util.files import write_text
from util.progress import say
from util.runs.cell_runs import (
    READERS,
    StopRequest,
    now,
    run_cells,
    surroundings,
    write_json,
)
from util.runs.curves import (
    TOLERANCE,
    WINDOW,
    compare,
    draw_curves,
    read_curve,
    save_curve,
    verdict,
)
from util.runs.paper_tables import commands, find_runs, look_up, read_paper, to_csv
from util.runs.paper_tables import markdown as papers_markdown
from util.runs.plan import STARTS, Cell, Plan, check_unchanged, choose, list_cells, read_plan
from util.runs.tables import check_metrics, fill_tables, markdown, show
from util.train.lease import Lease, acquire
from util.train.logger import prepare_folder

ROOT = Path(__file__).resolve().parent


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python main_tables.py --plan recipes/tables/fashion_mnist.yaml --jobs 2",
        first=("plan", "output_dir", "seeds", "jobs", "only", "list", "papers", "runs", "compare"),
    )
    add_plan_flags(parser)
    add_paper_flags(parser)
    add_curve_flags(parser, TOLERANCE, WINDOW)
    return parser


# ---- The command -------------------------------------------------------------------------------


def say_list(cells: Mapping[str, Cell], wanted: Sequence[str]) -> None:
    """Every wanted cell: how far it is, and its command line."""
    for title in wanted:
        cell = cells[title]
        state = "done" if cell.stamp() else "begun" if cell.read(STARTS) else "to do"
        print_text(f"{title}  [{state}]\n    {shlex.join(['python', *cell.words(ROOT)])}")


def paper_tables(args: argparse.Namespace) -> None:
    """The papers' tables with a column for the runs that are finished."""
    recipes = ROOT / "recipes"
    tables = [table for path in args.papers for table in read_paper(Path(path), recipes)]
    if args.commands:
        for table in tables:
            print_text(f"\n# {table.paper}: {table.title}")
            for row in table.rows:
                lines = commands(row, table.metric, recipes)
                print_text("\n".join([f"# {row.name}", *(lines or ["# no system of ours"])]))
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
    print_text(text)
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
    print_text(verdict(run, reference, found))
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
    plan = read_plan(Path(args.plan), READERS)
    output = Path(args.output_dir or f"output_dir/tables/{plan.path.stem}").resolve()
    seeds = list(dict.fromkeys(args.seeds or plan.seeds))
    # The tables hold all seeds of the plan also when only some are to be run.
    cells = list_cells(plan, list(dict.fromkeys([*plan.seeds, *seeds])), output)
    wanted = choose(cells, seeds, args.only or ["*"])
    if args.list:
        say_list(cells, wanted)
        return
    prepare_folder(output)
    with acquire(output) as lease, StopRequest() as stop:
        run_plan(args, plan, cells, wanted, output, lease, stop)


def run_plan(
    args: argparse.Namespace,
    plan: Plan,
    cells: Mapping[str, Cell],
    wanted: Sequence[str],
    output: Path,
    lease: Lease,
    stop: StopRequest,
) -> None:
    """Check, run, and write the tables, with the output folder to ourselves."""
    check_unchanged(cells)

    def write_tables() -> dict[str, Any]:
        lease.check()
        report = fill_tables(plan, cells)
        report["command"] = f"python main_tables.py --plan {args.plan} --jobs {args.jobs}"
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
    failed = run_cells(cells, wanted, args.jobs, stop, after_each)

    # ----------------------------------------------------------------------------- tables
    report = write_tables()
    failures = "".join(f"\n  {title}: {reason}" for title, reason in failed.items())
    if stop.times:
        more = f"; failed so far:{failures}" if failed else ""
        raise Stopped(
            f"{stop.reason}; {report['done']} of {report['cells']} runs are done, the same command "
            f"goes on from there{more}"
        )
    print_text(f"\n{markdown(report)}")
    say(f"tables  {output / 'tables.md'}")
    check_metrics(report, plan, cells)
    if failed:
        raise RunFailed(
            f"runs that failed, which the same command tries again: {len(failed)}{failures}"
        )


if __name__ == "__main__":
    main()
