"""Loss by step of a run: read, kept as a reference, compared, drawn.

A log line holds the mean loss of the steps since the line before. So two runs that log differently
are compared over the stretches between steps at which both have a line.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.errors import BadInput, needs
from util.files import write_bytes, write_text
from util.train.logger import METRICS
from util.yaml_files import read_settings

# Relative difference of a stretch up to which two curves are called the same.
TOLERANCE = 0.02
# Steps of a stretch: single steps differ by their rounding once a run is long enough.
WINDOW = 16


@dataclass(frozen=True)
class Curve:
    """A loss by step.

    Attributes:
        name: where it is from.
        steps: optimiser steps done at each line, rising.
        losses: mean since the line before, or since the start.
        settings: resolved flags of the run; empty: not known.
        origin: seed, versions, machine: what a reference says of itself.
    """

    name: str
    steps: list[int]
    losses: list[float]
    settings: Mapping[str, Any]
    origin: Mapping[str, Any]

    def sums(self) -> dict[int, float]:
        """Summed loss of all steps up to each line."""
        total, before, sums = 0.0, 0, {0: 0.0}
        for step, loss in zip(self.steps, self.losses, strict=True):
            total += loss * (step - before)
            before = step
            sums[step] = total
        return sums


def read_curve(path: Path) -> Curve:
    """The curve of a run folder, of a JSONL file of records, or of a reference (JSON).

    Raises:
        BadInput: there is none.
    """
    file = path / METRICS if path.is_dir() else path
    if path.is_dir() and not file.exists():
        others = sorted(path.glob("metrics-*.jsonl"))
        if len(others) != 1:
            raise BadInput(f"{path} holds no {METRICS}; name a run folder or a file")
        file = others[0]
    try:
        text = file.read_text()
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror}; name a run or a curve") from None
    try:
        if file.suffix == ".json":
            return _reference(file, json.loads(text))
        records = [json.loads(line) for line in text.splitlines()]
        train = [r for r in records if r["kind"] == "train"]
        steps, losses = [r["step"] for r in train], [float(r["loss"]) for r in train]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{file} holds no curve: {error!r}") from None
    if not steps:
        raise BadInput(f"{file} holds no log line of training yet")
    config = file.with_name(file.name.replace("metrics", "config").replace(".jsonl", ".yaml"))
    settings = read_settings(config) if config.exists() else {}
    return Curve(str(path), steps, losses, settings, {})


def _reference(file: Path, found: dict[str, Any]) -> Curve:
    origin = {k: v for k, v in found.items() if k not in ("steps", "losses", "settings")}
    steps = [int(step) for step in found["steps"]]
    losses = [float(loss) for loss in found["losses"]]
    if len(steps) != len(losses) or not steps:
        raise ValueError(f"{len(steps)} steps and {len(losses)} losses")
    return Curve(str(file), steps, losses, found["settings"], origin)


def save_curve(curve: Curve, path: Path, origin: Mapping[str, Any]) -> None:
    """Keep a run's curve as a reference: a JSON file of two rows and what they depend on.

    Args:
        origin: versions, machine, commit.
    """
    content = {
        "seed": curve.settings.get("seed"),
        **origin,
        "settings": dict(curve.settings),
        "steps": curve.steps,
        "losses": [round(loss, 7) for loss in curve.losses],
    }
    rows = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    write_text(path, "{\n" + ",\n".join(rows) + "\n}\n")


@dataclass(frozen=True)
class Comparison:
    """How far two curves are from each other.

    Attributes:
        stretches: (first step after, last step, mean loss of the run, of the reference).
        largest, mean: relative difference of a stretch.
        parted: (first step after, last step) of the first stretch beyond the tolerance; None: none.
        tolerance: relative.
        changed: settings that differ, a text each.
    """

    stretches: list[tuple[int, int, float, float]]
    largest: float
    mean: float
    parted: tuple[int, int] | None
    tolerance: float
    changed: list[str]

    @property
    def same(self) -> bool:
        """Whether no stretch is beyond the tolerance."""
        return self.parted is None


# What may differ between a run and its reference without a word.
UNIMPORTANT = {
    "output_dir", "log_dir", "data_path", "device", "num_workers", "pin_mem", "log_every",
    "save_every", "save_minutes", "keep", "eval_every", "picture_every", "resume", "dry_run",
    "dry_run_images", "dry_run_processes", "dry_run_measure", "images_per_second", "list_models",
    "allow_changes", "max_bad_images", "nan_policy", "eval_images",
}  # fmt: skip


def compare(
    run: Curve, reference: Curve, tolerance: float = TOLERANCE, window: int = WINDOW
) -> Comparison:
    """Compare a run with a reference over the steps that both have.

    Args:
        tolerance: relative difference of a stretch's mean loss that is still the same.
        window: steps of a stretch, at least.

    Raises:
        BadInput: no step at which both have a log line.
    """
    ours, theirs = run.sums(), reference.sums()
    common = sorted(ours.keys() & theirs.keys())
    stretches: list[tuple[int, int, float, float]] = []
    before = 0
    for step in common[1:]:
        # What is left at the end is a stretch of its own only where it is all there is.
        if step - before >= window or (step == common[-1] and not stretches):
            length = step - before
            means = [(sums[step] - sums[before]) / length for sums in (ours, theirs)]
            stretches.append((before, step, means[0], means[1]))
            before = step
    if not stretches:
        raise BadInput(
            f"{run.name} logs steps {run.steps[0]} ... {run.steps[-1]} and {reference.name} "
            f"{reference.steps[0]} ... {reference.steps[-1]}: no line is at the same step; give "
            "the run the reference's --log_every, or a divisor of it"
        )
    gaps = [_gap(a, b) for *_, a, b in stretches]
    beyond = [s for s, gap in zip(stretches, gaps, strict=True) if not gap <= tolerance]
    changed = [
        f"{name}: {run.settings.get(name)} here, {reference.settings.get(name)} there"
        for name in sorted(run.settings.keys() & reference.settings.keys() - UNIMPORTANT)
        if run.settings.get(name) != reference.settings.get(name)
    ]
    return Comparison(
        stretches,
        max((g for g in gaps if not math.isnan(g)), default=math.nan),
        sum(gaps) / len(gaps),
        beyond[0][:2] if beyond else None,
        tolerance,
        changed,
    )


def _gap(value: float, reference: float) -> float:
    """Relative difference; NaN where either is no number."""
    if value == reference:
        return 0.0
    return abs(value - reference) / abs(reference) if reference else math.inf


def verdict(run: Curve, reference: Curve, found: Comparison) -> str:
    """A comparison for people."""
    steps = found.stretches[-1][1]
    origin = reference.origin
    lines = [f"{run.name} against {reference.name}"]
    if origin:
        versions = ", ".join(f"{k} {v}" for k, v in origin.get("versions", {}).items())
        lines.append(
            f"reference   seed {origin.get('seed')}, {origin.get('machine')}, {versions}, commit "
            f"{origin.get('commit')}; {origin.get('note', 'no note')}"
        )
    lines += [f"differs     {text}" for text in found.changed]
    length = min(last - first for first, last, *_ in found.stretches)
    lines += [
        f"compared    steps 1 to {steps:,} in {len(found.stretches)} stretches of {length} or more",
        f"difference  {found.largest:.3%} at most, {found.mean:.3%} on average (relative)",
    ]
    if found.parted is None:
        lines.append(f"verdict     the same within {found.tolerance:.1%} in every stretch")
    else:
        first, last = found.parted
        lines.append(
            f"verdict     they part: beyond {found.tolerance:.1%} for the first time in steps "
            f"{first + 1:,} to {last:,}"
        )
    return "\n".join(lines)


def draw_curves(curves: Sequence[tuple[str, Curve]], path: Path) -> None:
    """All curves as one picture; the format follows the name (png, svg, pdf).

    Raises:
        BadInput: matplotlib is not installed.
    """
    needs("matplotlib", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves:
        axes.plot(curve.steps, curve.losses, linewidth=1, label=name)
    axes.set(xlabel="optimiser steps", ylabel="training loss (mean since the line before)")
    axes.grid(alpha=0.3)
    if len(curves) <= 12:
        axes.legend(fontsize="small")
    else:
        axes.set_title(f"{len(curves)} runs")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=path.suffix[1:] or "png")
    write_bytes(path, picture.getvalue())
