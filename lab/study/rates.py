"""What LScale is worth beside the learning rate and beside branches that begin small.

From the report of recipes/tables/lscale_lr.yaml alone; the plan says what was decided beforehand.
"""

from collections.abc import Mapping
from typing import Any

from lab.study.effects import BySeed, corrected, differences, estimate
from util.runs.tables import mean_and_deviation, show, table_lines

CHOOSES, REPORTED, RECONSTRUCTS = ("held_out", "top1"), ("test", "top1"), ("pretrain", "model_psnr")
STUDY_RATE = "1.2e-2"
NAMES = {"none": "MAE", "lscale": "MAE with LScale from .1", "control": "control"}
PAIRS = (("lscale", "none"), ("control", "none"), ("lscale", "control"))
By = dict[str, dict[str, BySeed]]  # scale, rate, seed


def collect_values(report: Mapping[str, Any], run: str, metric: str) -> By:
    """One outcome by scale, rate and seed."""
    found: By = {}
    for row in (row for table in report["tables"] for row in table["rows"]):
        name, _, arm = row["run"].partition(".")
        if name == run and metric in row["metrics"]:
            scale, rate = (part.partition("_")[2] for part in arm.split("-", 1))
            values = row["metrics"][metric]["values"]
            found.setdefault(scale, {})[rate] = {int(s): v for s, v in values.items()}
    return found


def best_rates(values: By) -> dict[str, str]:
    """For each scale the rate of the best mean; the first of equals."""
    return {
        scale: max(own, key=lambda rate: mean_and_deviation([*own[rate].values()])[0] or 0.0)
        for scale, own in values.items()
    }


def compare(values: By, rates: Mapping[str, str], family: str) -> list[dict[str, Any]]:
    """The differences of `PAIRS`, each scale at its rate, paired by seed; p after Holm."""
    rows = []
    for one, other in PAIRS:
        by_seed = differences(values[one][rates[one]], values[other][rates[other]])
        found = estimate([*by_seed.values()])
        rows.append({"pair": (one, other), "family": family, "by_seed": by_seed, **vars(found)})
    return corrected(rows)


def analyse(report: Mapping[str, Any]) -> dict[str, Any]:
    """The rates that held-out training images choose, and what is compared at them."""
    chosen = best_rates(collect_values(report, *CHOOSES))
    tested = collect_values(report, *REPORTED)
    rates = list(next(iter(tested.values())))
    at_study = dict.fromkeys(chosen, STUDY_RATE)
    return {
        "rates": rates,
        "chosen": chosen,
        "own_rate": compare(tested, chosen, "each at its own rate"),
        "study_rate": compare(tested, at_study, "at the study's rate"),
    }


def said(found: Mapping[str, Any]) -> list[str]:
    """What the comparisons allow to say, and where the rates end, a line each."""
    lines = []
    for key in ("own_rate", "study_rate"):
        rows = found[key]
        texts = [
            f"{' − '.join(NAMES[scale] for scale in row['pair'])} {row['mean']:+.2f} "
            f"({'shown' if row['p_holm'] is not None and row['p_holm'] < 0.05 else 'not shown'})"
            for row in rows
        ]
        lines.append(f"- {rows[0]['family'].capitalize()}: {', '.join(texts)}.")
    for scale, rate in found["chosen"].items():
        if rate in (found["rates"][0], found["rates"][-1]):
            lines.append(f"- {NAMES[scale]} has its best rate at the end of those that were tried.")
    return lines


def markdown(report: Mapping[str, Any]) -> list[str]:
    """A section of docs/study.md, by lines."""
    found = analyse(report)
    lines = [
        "## LScale, the learning rate, or small beginnings",
        "",
        f"`python main_tables.py --plan recipes/tables/{report['plan']} --jobs 2`, which says what "
        f"was decided before the first run: {report['done']} runs, {report['seconds']:,.0f} s in "
        f"all; {'; '.join(report['machine'])}; commit {'; '.join(report['commit'])}; finished "
        f"{report['finished']}; seeds {', '.join(map(str, report['seeds']))}. The control is MAE "
        "without LScale whose branches begin at a tenth of their size (`--branch_init 0.1`).",
        "",
    ]
    for title, key in (
        ("kNN on held-out training images, which chose the rates", CHOOSES),
        ("kNN on test images", REPORTED),
        ("PSNR of held-out garments", RECONSTRUCTS),
    ):
        values = collect_values(report, *key)
        rates = list(next(iter(values.values())))
        rows = []
        for scale, own in values.items():
            cells = [show(*mean_and_deviation([*own[rate].values()])) for rate in rates]
            marks = [f"**{c}**" if found["chosen"][scale] == r else c
                     for c, r in zip(cells, rates, strict=True)]  # fmt: skip
            rows.append([NAMES[scale], *marks])
        lines += [f"{title} (bold: the chosen rate of the row):", ""]
        lines += table_lines(["`--blr`", *rates], rows)
    rows = [
        [
            row["family"],
            " − ".join(NAMES[scale] for scale in row["pair"]),
            f"{row['mean']:+.2f}",
            "-" if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}",
            "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
            str(row["n"]),
        ]
        for row in (*found["own_rate"], *found["study_rate"])
    ]
    lines += ["Differences of kNN on test images, in points:", "", *said(found), ""]
    lines += table_lines(["rates", "difference", "mean", "95 % interval", "p (Holm)", "n"], rows)
    return lines
