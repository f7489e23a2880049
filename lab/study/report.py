"""The study for people: its Markdown and its plots, from its JSON alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.study.rates import markdown as rates_markdown
from util.errors import needs
from util.runs.tables import show, table_lines

EFFECTS_PLOT, TRAINING_PLOT = "study-effects.png", "study-training.png"
COMMAND = "make study"


def markdown(
    report: Mapping[str, Any], pictures: str, rates: Mapping[str, Any] | None = None
) -> str:
    """docs/study.md.

    Args:
        report: what docs/study.json holds.
        pictures: folder of the plots, from the file.
        rates: the tables of recipes/tables/lscale_lr.yaml, if there are any.
    """
    return "\n".join(
        [
            "# The study",
            "",
            f"Written by `{COMMAND}` from `docs/study.json`; nothing here is typed by hand.",
            "",
            *([report["about"], ""] if report.get("about") else []),
            *_how(report),
            *remarks_of(report),
            *_in_short(report),
            *([] if rates is None else rates_markdown(rates)),
            *_rows("The factorial", "factorial", report),
            *_effects(report["effects"], pictures),
            *_training(report["training"], pictures),
            *_settings(report),
            *_confirmed(report),
        ]
    )


def say_where_from(report: Mapping[str, Any]) -> str:
    """How much is done, on what, and of which code: a sentence."""
    if not report["done"]:
        return f"0 of {report['cells']} runs done."
    return (
        f"{report['done']} of {report['cells']} runs done, {report['seconds'] / 3600:.2f} hours of "
        f"runs in all; {'; '.join(report['machine'])}; {'; '.join(report['versions'])}; commit "
        f"{'; '.join(report['commit'])}; finished {report['finished']}."
    )


def _how(report: Mapping[str, Any]) -> list[str]:
    if not report["done"]:
        return [say_where_from(report), ""]
    return [
        say_where_from(report),
        "",
        "Values are mean ± sample deviation over seeds. Intervals are 95 % by Student's t over "
        "seeds, each seed first compared with itself (the same data order and noise in all "
        "arms). p is corrected after Holm within its family: the outcomes of a group, main "
        "effects and interactions apart. Accuracies are on test images, the same for all arms. All "
        "arms have one learning rate, the plan's.",
        "",
    ]


def remarks_of(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know of how the plan came about, as a section."""
    remarks = report.get("remarks", [])
    if not remarks:
        return []
    return ["## Before you believe it", "", *(f"- {remark}" for remark in remarks), ""]


def _in_short(report: Mapping[str, Any]) -> list[str]:
    """What each term and each confirmed setting does, in a sentence; also when that is nothing."""
    mains = [e for e in report["effects"] if len(e["factors"]) == 1]
    if not mains:
        return []
    lines = []
    for term in dict.fromkeys(e["factors"][0] for e in mains):
        own = [e for e in mains if e["factors"] == [term]]
        dynamics = [e for e in report["training"]["effects"] if e["factors"] == [term]]
        lines.append(f"- **{term}** {sentence(own)}.")
        if dynamics:
            lines.append(f"  In training it {sentence(dynamics)}.")
    for arm in dict.fromkeys(row["arm"] for row in report["confirmed"]):
        own = [row for row in report["confirmed"] if row["arm"] == arm]
        lines.append(f"- `{arm}`, against the base on new seeds, {sentence(own)}.")
    return ["## In short", "", "All at the plan's one learning rate:", "", *lines, ""]


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What estimates allow to say together: what is raised, lowered, and not shown."""
    said = {word: [r for r in rows if verdict(r) == word] for word in ("raises", "lowers")}
    parts = [
        f"{word} " + ", ".join(f"{row['outcome']} ({_signed(row['mean'])})" for row in own)
        for word, own in said.items()
        if own
    ]
    if not parts:
        return "brings nothing that could be shown here"
    silent = [row["outcome"] for row in rows if verdict(row) == "not shown"]
    return "; ".join([*parts, *([f"nothing shown for {', '.join(silent)}"] if silent else [])])


def _rows(title: str, stage: str, report: Mapping[str, Any]) -> list[str]:
    labels = list(report["outcomes"])
    rows = []
    for row in report["rows"]:
        if row["row"].startswith(f"{stage}/"):
            own = [row["outcomes"].get(label) for label in labels]
            values = ["-" if o is None else show(o["mean"], o["deviation"]) for o in own]
            n = max((len(o["values"]) for o in own if o), default=0)
            rows.append([f"`{row['row']}`", *values, str(n)])
    return [f"## {title}", "", *table_lines(["row", *labels, "n"], rows)] if rows else []


def interval(row: Mapping[str, Any]) -> list[str]:
    """Mean, interval, corrected p and n of an estimate, as cells of a table."""
    low, high, p = row["low"], row["high"], row["p_holm"]
    between = "-" if low is None else f"{_signed(low)} to {_signed(high)}"
    return [_signed(row["mean"]), between, "-" if p is None else f"{p:.2g}", str(row["n"])]


def _signed(value: float) -> str:
    return f"{value:+.{2 if abs(value) >= 1 else 3}f}"


def verdict(row: Mapping[str, Any]) -> str:
    """What an estimate allows to say."""
    if row["p_holm"] is None or row["p_holm"] > 0.05:
        return "not shown"
    return "raises" if row["mean"] > 0 else "lowers"


def _effects(effects: Sequence[Mapping[str, Any]], pictures: str) -> list[str]:
    if not effects:
        return []
    header = ["effect", "outcome", "mean", "95 % interval", "p (Holm)", "n", "says"]
    parts = {1: "Main effects", 2: "Interactions"}
    text: list[str] = []
    for size, title in parts.items():
        rows = [
            [" x ".join(e["factors"]), e["outcome"], *interval(e), verdict(e)]
            for e in effects
            if min(len(e["factors"]), 2) == size
        ]
        text += [f"## {title}", ""]
        if size == 1:
            text += [
                "Mean of the arms with the term minus mean of those without, over all other terms.",
                "",
                f"![Main effects]({pictures}/{EFFECTS_PLOT})",
                "",
            ]
        else:
            text += ["Half the difference of one's effect with the other on and off.", ""]
        text += table_lines(header, rows)
    return text


def _training(training: Mapping[str, Any], pictures: str) -> list[str]:
    if not training["effects"]:
        return []
    header = ["term", "what", "mean", "95 % interval", "p (Holm)", "n", "says"]
    rows = [
        [" x ".join(e["factors"]), e["outcome"], *interval(e), verdict(e)]
        for e in training["effects"]
    ]
    return [
        "## Training dynamics",
        "",
        "Losses under different masks are not compared: the mask is in no row, and the others' "
        "effects are averages of comparisons under the same mask.",
        "",
        *[f"- {name}: {meaning}" for name, meaning in training["definitions"].items()],
        "",
        f"![Loss and gradient norm by step]({pictures}/{TRAINING_PLOT})",
        "",
        *table_lines(header, rows),
    ]


def _settings(report: Mapping[str, Any]) -> list[str]:
    choice = report["screening"]
    if not choice["scores"]:
        return []
    chosen = set(choice["best"].values())
    rows = [
        [
            f"`{arm}`",
            show(score),
            "" if arm not in choice["gains"] else _signed(choice["gains"][arm]),
            "best of its setting" if arm in chosen else "",
        ]
        for arm, score in choice["scores"].items()
    ]
    return [
        "## Settings, screened",
        "",
        f"Mean of the accuracies, seeds {', '.join(map(str, report['screening_seeds']))}: too few "
        "to conclude from, enough to choose what to confirm.",
        "",
        *table_lines(["arm", "score", "over the base", ""], rows),
        *_rows("Settings, each outcome", "settings", report),
    ]


def _confirmed(report: Mapping[str, Any]) -> list[str]:
    if not report["confirmed"]:
        return []
    header = ["arm", "outcome", "over the base", "95 % interval", "p (Holm)", "n", "says"]
    rows = [[f"`{r['arm']}`", r["outcome"], *interval(r), verdict(r)] for r in report["confirmed"]]
    return [
        *_rows("Settings, confirmed on new seeds", "confirm", report),
        *table_lines(header, rows),
    ]


# ---- Plots -------------------------------------------------------------------------------------


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """The plots, as PNG files.

    Raises:
        BadInput: matplotlib is not installed.
    """
    needs("matplotlib", "matplotlib").use("Agg")  # no screen
    folder.mkdir(parents=True, exist_ok=True)
    if report["effects"]:
        _draw_effects(report["effects"], folder / EFFECTS_PLOT)
    if report["training"]["curves"]:
        _draw_training(report["training"]["curves"], folder / TRAINING_PLOT)


def _draw_effects(effects: Sequence[Mapping[str, Any]], path: Path) -> None:
    plt = needs("matplotlib.pyplot", "matplotlib")
    mains = [e for e in effects if len(e["factors"]) == 1]
    labels = list(dict.fromkeys(e["outcome"] for e in mains))
    size = {"figsize": (3 * len(labels), 2.6), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(labels), squeeze=False, sharey=True, **size)
    for axis, label in zip(axes[0], labels, strict=True):
        own = [e for e in mains if e["outcome"] == label]
        axis.axvline(0, color="gray", linewidth=1)
        for place, e in enumerate(own):
            if e["low"] is not None:
                axis.plot([e["low"], e["high"]], [place, place], color="C0")
            axis.plot(e["mean"], place, "o", color="C0")
        axis.set_yticks(range(len(own)), [e["factors"][0] for e in own])
        axis.set_title(label, fontsize=9)
    figure.suptitle("Main effects, 95 % intervals", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_training(curves: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    plt = needs("matplotlib.pyplot", "matplotlib")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    masks = ("mask_off", "mask_on")
    for column, mask in enumerate(masks):
        for row, name in enumerate(("loss", "grad_norm")):
            axis = axes[row][column]
            for arm, curve in curves.items():
                if arm.startswith(mask) or not any(arm.startswith(m) for m in masks):
                    rest = arm.removeprefix(mask).strip("-") or arm
                    axis.plot(curve["step"], curve[name], linewidth=1, label=rest)
            axis.set_yscale("log")
            axis.set_ylabel(name)
            if row == 0:
                axis.set_title({"mask_off": "random mask", "mask_on": "mixed mask"}[mask])
                axis.legend(fontsize=7)
            else:
                axis.set_xlabel("step")
    figure.savefig(path, dpi=110)
    plt.close(figure)
