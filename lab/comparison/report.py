"""The comparison for people: its Markdown and its plot, from its JSON alone."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.comparison.analysis import EQUAL, STEPS, TIME
from lab.study.effects import estimate
from lab.study.report import interval, remarks_of, say_where_from, sentence, verdict
from util.errors import needs
from util.runs.tables import show, table_lines

PLOT = "comparison.png"


def markdown(report: Mapping[str, Any], pictures: str) -> str:
    """docs/comparison.md.

    Args:
        report: what docs/comparison.json holds. pictures: folder of the plot, from the file.
    """
    lines = [
        "# The comparison",
        "",
        "Written by `make comparison` from `docs/comparison.json`; nothing here is typed by hand.",
        "",
        *([report["about"], ""] if report.get("about") else []),
        *_how(report),
        *remarks_of(report),
        *_in_short(report),
        *_stage(report, STEPS, pictures),
        *_stage(report, TIME, pictures),
        *_compared(report),
        *_rates(report),
    ]
    return "\n".join(lines)


def _how(report: Mapping[str, Any]) -> list[str]:
    if not report["done"]:
        return [say_where_from(report), ""]
    return [
        say_where_from(report),
        "",
        f"What was decided before the first run stands at the head of "
        f"`recipes/tables/{report['plan']}`. Values are mean ± sample deviation over seeds "
        f"{', '.join(map(str, report['seeds']))}. Intervals are 95 % by Student's t over seeds, "
        "each seed compared with itself. p is corrected after Holm within a family: one outcome, "
        "one table.",
        "",
    ]


def _rows_of(report: Mapping[str, Any], stage: str) -> dict[str, Mapping[str, Any]]:
    """Arm to its outcomes in a stage."""
    found = {}
    for row in report["rows"]:
        name, _, arm = row["row"].partition("/")
        if name == stage and row["outcomes"]:
            found[arm] = row["outcomes"]
    return found


def _kinds(report: Mapping[str, Any], stage: str) -> dict[str, list[Mapping[str, Any]]]:
    """Kind of comparison to its rows, in a stage."""
    rows = [row for row in report["compared"] if row["stage"] == stage]
    return {
        kind: [r for r in rows if r["kind"] == kind]
        for kind in dict.fromkeys(r["kind"] for r in rows)
    }


def _in_short(report: Mapping[str, Any]) -> list[str]:
    """What each comparison allows to say; also when that is nothing."""
    lines = []
    for stage, called in EQUAL.items():
        for kind, rows in _kinds(report, stage).items():
            lines += [f"At {called}, {kind}:", ""]
            for pair in dict.fromkeys(tuple(row["pair"]) for row in rows):
                own = [row for row in rows if tuple(row["pair"]) == pair]
                one, other = (report["names"][arm] for arm in pair)
                against = f" beside {other}" if kind == "in pairs" else ""
                lines.append(f"- **{one}**{against} {sentence(own)}.")
            lines.append("")
    if report["detectable"]:
        sizes = ", ".join(
            f"{show(size)} of {label}" for label, size in report["detectable"].items()
        )
        lines += [
            f"A single test would have found four times in five a difference of {sizes} (by the "
            "deviations between seeds, before Holm's correction): less than that can be there, and "
            "not show.",
            "",
        ]
    return ["## In short", "", *lines] if lines else []


def _stage(report: Mapping[str, Any], stage: str, pictures: str) -> list[str]:
    rows = _rows_of(report, stage)
    if not rows:
        return []
    labels = [*report["outcomes"], report["beside"]]
    reference = report["images_per_s"].get(report["reference"], {})
    base = statistics.fmean(reference.values()) if reference else None
    cells = []
    for arm, outcomes in rows.items():
        speeds = [*report["images_per_s"].get(arm, {}).values()]
        speed, ratio = "-", "-"
        if speeds and base:
            mean = statistics.fmean(speeds)
            speed, ratio = f"{mean:.0f}", f"{base / mean:.2f}"
        trained = arm in report["chosen"]
        seen = report["equal_steps_images"] if stage == STEPS else report["images"].get(arm, 0)
        values = [outcomes.get(label) for label in labels]
        cells.append(
            [
                report["names"][arm],
                report["chosen"].get(arm, "-"),
                f"{seen:,}" if trained else "-",
                *([speed, ratio] if stage == STEPS else []),
                *("-" if o is None else show(o["mean"], o["deviation"]) for o in values),
            ]
        )
    speed_columns = ["images a second", "time of a step, MAE 1"] if stage == STEPS else []
    picture = [f"![The outcomes of each method]({pictures}/{PLOT})", ""] if stage == STEPS else []
    return [
        f"## At {EQUAL[stage]}",
        "",
        *picture,
        *table_lines(["method", "rate", "images seen", *speed_columns, *labels], cells),
    ]


def _compared(report: Mapping[str, Any]) -> list[str]:
    text: list[str] = []
    header = ["method", "outcome", "mean", "95 % interval", "p (Holm)", "n", "says"]
    for stage, called in EQUAL.items():
        for kind, rows in _kinds(report, stage).items():
            text += [f"### At {called}, {kind}", ""]
            text += table_lines(
                header,
                [
                    [
                        " − ".join(report["names"][arm] for arm in row["pair"]),
                        row["outcome"],
                        *interval(row),
                        verdict(row),
                    ]
                    for row in rows
                ],
            )
    return ["## Differences", "", *text] if text else []


def _rates(report: Mapping[str, Any]) -> list[str]:
    rates = sorted({rate for own in report["rates"].values() for rate in own}, key=float)
    if not rates:
        return []
    rows = [
        [
            report["names"][arm],
            *(
                ("**{}**" if rate == report["chosen"].get(arm) else "{}").format(
                    show(own.get(rate))
                )
                for rate in rates
            ),
        ]
        for arm, own in report["rates"].items()
    ]
    return [
        "## The rates",
        "",
        "kNN on held-out training images, one seed; bold: the rate of the method.",
        "",
        *table_lines(["method", *rates], rows),
    ]


# ---- The plot ----------------------------------------------------------------------------------


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """The plot, a PNG file: each outcome of each method, with its interval.

    Raises:
        BadInput: matplotlib is not installed.
    """
    rows = {stage: _rows_of(report, stage) for stage in EQUAL}
    arms = list(rows[STEPS])
    if not arms:
        return
    needs("matplotlib", "matplotlib").use("Agg")  # no screen
    plt = needs("matplotlib.pyplot", "matplotlib")
    folder.mkdir(parents=True, exist_ok=True)
    labels = list(report["outcomes"])
    size = {"figsize": (2.9 * len(labels) + 1.5, 0.34 * len(arms) + 1.3), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(labels), squeeze=False, sharey=True, **size)
    styles = ((STEPS, "o", "C0", -0.12), (TIME, "s", "C1", 0.12))
    for axis, label in zip(axes[0], labels, strict=True):
        for stage, mark, colour, shift in styles:
            for place, arm in enumerate(arms):
                outcome = rows[stage].get(arm, {}).get(label)
                if outcome is not None:
                    _draw_interval(axis, [*outcome["values"].values()], place + shift, mark, colour)
        axis.set_yticks(range(len(arms)), [report["names"][arm] for arm in arms])
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(label, fontsize=9)
    axes[0][0].invert_yaxis()
    handles = [
        plt.Line2D([], [], color=colour, marker=mark, linestyle="", label=f"at {EQUAL[stage]}")
        for stage, mark, colour, _ in styles
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle("Mean of the seeds, 95 % intervals", fontsize=10)
    figure.savefig(folder / PLOT, dpi=110)
    plt.close(figure)


def _draw_interval(
    axis: Any, values: Sequence[float], place: float, mark: str, colour: str
) -> None:
    found = estimate(values)
    if found.low is not None:
        axis.plot([found.low, found.high], [place, place], color=colour, linewidth=1)
    axis.plot(found.mean, place, mark, color=colour, markersize=4)
