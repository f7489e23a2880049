"""The tables of a plan: mean and deviation over seeds, and what the runs cost."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from util.errors import BadInput
from util.names import nearest
from util.runs.plan import DONE, Cell, Plan, TableRow


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and sample standard deviation (n - 1); None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def fill_row(row: TableRow, cells: Sequence[Cell], dones: Mapping[str, dict[str, Any]]) -> dict:
    """A row as data: for each metric its values by seed, mean and deviation; and what it cost.

    Args:
        cells: the row's run at every seed.
        dones: records of the cells that are done, by title.
    """
    there = [cell for cell in cells if cell.title in dones]
    metrics = {}
    for name in row.metrics:
        values = {
            cell.seed: dones[cell.title]["metrics"][name]
            for cell in there
            if name in dones[cell.title]["metrics"]
        }
        mean, deviation = mean_and_deviation(list(values.values()))
        metrics[name] = {"values": values, "mean": mean, "deviation": deviation}
    families = [[cell.title, *cell.at_seed(cell.run.needs)] for cell in there]
    totals = [sum(dones[t]["seconds"] for t in f) for f in families if dones.keys() >= set(f)]
    return {
        "label": row.label,
        "run": row.run,
        "n": len(there),
        "missing": [cell.seed for cell in cells if cell.title not in dones],
        "metrics": metrics,
        "seconds": mean_and_deviation([dones[cell.title]["seconds"] for cell in there])[0],
        "seconds_with_needs": mean_and_deviation(totals)[0],
    }


def fill_tables(plan: Plan, cells: Mapping[str, Cell]) -> dict[str, Any]:
    """All tables as data, with where their numbers come from."""
    found = {title: cell.read(DONE) for title, cell in cells.items()}
    dones = {title: done for title, done in found.items() if done is not None}

    def distinct(name: str) -> list[str]:
        texts = (
            ", ".join(f"{k} {v}" for k, v in done[name].items())
            if name == "versions"
            else str(done[name])
            for done in dones.values()
        )
        # A run that was stopped may have gone on elsewhere, and then names both.
        return list(dict.fromkeys(part for text in texts for part in text.split("; ")))

    return {
        "plan": plan.path.name,
        "cells": len(cells),
        "done": len(dones),
        "seeds": list(dict.fromkeys(cell.seed for cell in cells.values())),
        "seconds": round(sum(done["seconds"] for done in dones.values()), 3),
        "finished": max((done["finished"] for done in dones.values()), default=None),
        **{name: distinct(name) for name in ("machine", "jobs", "versions", "commit")},
        "tables": [
            {
                "title": table.title,
                "columns": table.metrics,
                "rows": [
                    fill_row(row, [c for c in cells.values() if c.run.name == row.run], dones)
                    for row in table.rows
                ],
            }
            for table in plan.tables
        ],
    }


def show(mean: float | None, deviation: float | None = None) -> str:
    """`92.13 ± 0.21`; four digits below 10, where losses and shares are."""
    if mean is None:
        return "-"
    digits = 2 if abs(mean) >= 10 else 4
    tail = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{mean:.{digits}f}{tail}"


def markdown(report: Mapping[str, Any]) -> str:
    """The tables for people."""
    header = [f"{report['done']} of {report['cells']} runs done"]
    if report["done"]:
        header += [
            f"{report['seconds']:.0f} s in all",
            "; ".join(report["machine"]),
            f"{' or '.join(report['jobs'])} at once",
            "; ".join(report["versions"]),
            f"commit {'; '.join(report['commit'])}",
            f"{report['finished']}",
        ]
    lines = [f"{report['plan']}: {'; '.join(header)}.", ""]
    lines += [
        f"Mean ± sample deviation over seeds {', '.join(map(str, report['seeds']))}; s: mean "
        "seconds of the run, and with the runs that it needs.",
        "",
    ]
    for table in report["tables"]:
        columns = ["run", *table["columns"], "n", "s", "s with needs"]
        lines += [f"**{table['title']}**", "", _line(columns), _line(["---"] * len(columns))]
        for row in table["rows"]:
            values = [
                show(row["metrics"][m]["mean"], row["metrics"][m]["deviation"])
                if m in row["metrics"]
                else ""
                for m in table["columns"]
            ]
            missing = f" ({len(row['missing'])} missing)" if row["missing"] else ""
            times = [row["seconds"], row["seconds_with_needs"]]
            spent = ["-" if t is None else f"{t:.0f}" for t in times]
            lines.append(_line([row["label"], *values, f"{row['n']}{missing}", *spent]))
        lines.append("")
    return "\n".join(lines)


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line, by lines."""
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows), ""]


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def check_metrics(report: Mapping[str, Any], plan: Plan, cells: Mapping[str, Cell]) -> None:
    """A metric that a done run does not have is a fault of the plan, not a missing run.

    Raises:
        BadInput: see above.
    """
    for table in report["tables"]:
        for row in table["rows"]:
            for name, metric in row["metrics"].items():
                if len(metric["values"]) < row["n"]:
                    dones = [c.read(DONE) for c in cells.values() if c.run.name == row["run"]]
                    names = sorted({m for done in dones if done for m in done["metrics"]})
                    raise BadInput(
                        f"table {table['title']!r} of {plan.path} asks for {name!r} of "
                        f"{row['run']}, which has no such metric{nearest(name, names)}"
                    )
