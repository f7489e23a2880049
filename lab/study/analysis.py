"""The study: what a plan's `study` asks for, and from finished cells to rows, effects and choices.

study:
  factorial: SET        arms with factors, each off and on
  settings: SET         arms of a base and one change at a time, screened
  pretrain: RUN         whose records hold loss and gradient norm by step
  outcomes:
    accuracy: [[label, run, metric], ...]         what settings are chosen by: the more the better
    ANOTHER: ...                                  each group is a family of tests of its own
  confirm: {seeds: [...], best: 2, against: {mae: {method: mae}}, never: [ARM, ...]}
                        never: screened, but not to be chosen
"""

import copy
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.study.effects import (
    BySeed,
    contrast,
    contrast_signs,
    corrected,
    differences,
    estimate,
    prediction,
)
from util.errors import BadInput
from util.names import known
from util.runs.arms import BASE, ArmSet
from util.runs.plan import DONE, OF_THE_LAB, Cell, Plan
from util.train.logger import METRICS
from util.yaml_values import mapping, read_seeds

CHOSEN_BY = "accuracy"
ALL_BEST = "all_best"
CURVE_POINTS = 60


@dataclass(frozen=True)
class Outcome:
    """A number of an arm: a metric of one of its runs, in a family of tests."""

    label: str
    run: str
    metric: str
    family: str


@dataclass(frozen=True)
class Study:
    """What is asked; see the module."""

    factorial: str
    settings: str
    pretrain: str
    outcomes: tuple[Outcome, ...]
    confirm_seeds: tuple[int, ...]
    best: int
    against: dict[str, dict[str, Any]]
    never: tuple[str, ...]
    about: str
    remarks: tuple[str, ...]


def read_study(plan: Plan) -> Study:
    """The `study` of a plan.

    Raises:
        BadInput: there is none, or it names what is not there.
    """
    where = f"study in {plan.path}"
    keys = ("factorial", "settings", "pretrain", "outcomes", "confirm")
    given = mapping(plan.given.get("study") or {}, where, (*keys, "about", "remarks"))
    for key in keys:
        if key not in given:
            raise BadInput(f"{where} has no {key!r}")
    for key in ("factorial", "settings"):
        known(given[key], plan.arms, f"{key} of {where}")
    levels = plan.arms[given["factorial"]].levels
    if not levels or any(set(own.values()) - {"on", "off"} for own in levels.values()):
        raise BadInput(f"factorial of {where} must be arms with factors, each off and on")
    if len(levels) != 2 ** len(next(iter(levels.values()))):
        raise BadInput(f"factorial of {where}: each factor needs both off and on")
    origins = {run.copy.origin for run in plan.runs.values() if run.copy.arm is not None}
    known(given["pretrain"], origins, f"pretrain of {where}")
    outcomes = []
    for family, rows in mapping(given["outcomes"], f"outcomes of {where}").items():
        for row in rows:
            if not isinstance(row, list) or len(row) != 3:
                raise BadInput(f"outcome {row!r} of {where}: expected [label, run, metric]")
            known(row[1], origins, f"run of outcome {row[0]!r} of {where}")
            outcomes.append(Outcome(str(row[0]), row[1], str(row[2]), family))
    if CHOSEN_BY not in given["outcomes"]:
        raise BadInput(f"outcomes of {where} need a group {CHOSEN_BY!r}: settings are chosen by it")
    if len({o.label for o in outcomes}) < len(outcomes):
        raise BadInput(f"outcomes of {where} must have different labels")
    words = ("seeds", "best", "against", "never")
    confirm = mapping(given["confirm"], f"confirm of {where}", words)
    never = tuple(confirm.get("never") or ())
    for arm in never:
        known(arm, plan.arms[given["settings"]].varied, f"never in confirm of {where}")
    seeds = read_seeds(confirm.get("seeds"), f"confirm of {where}")
    if seen := set(seeds) & set(plan.arms[given["settings"]].seeds or plan.seeds):
        raise BadInput(f"confirm of {where} needs new seeds; {sorted(seen)} chose the settings")
    return Study(
        given["factorial"],
        given["settings"],
        given["pretrain"],
        tuple(outcomes),
        seeds,
        confirm.get("best", 2),
        mapping(confirm.get("against") or {}, f"against of confirm of {where}"),
        never,
        str(given.get("about") or ""),
        tuple(map(str, given.get("remarks") or ())),
    )


# ---- Other arms for the same runs --------------------------------------------------------------


def with_arms(plan: Plan, name: str, seeds: Sequence[int], arms: Mapping[str, Any]) -> dict:
    """The plan's file with its arms replaced by these, under one name; of runs alone."""
    given = {k: copy.deepcopy(v) for k, v in plan.given.items() if k not in OF_THE_LAB}
    given["seeds"] = list(seeds)
    given["arms"] = {name: {"seeds": list(seeds), "list": dict(arms)}}
    for entry in given["runs"].values():
        if "arms" in entry:
            entry["arms"] = name
    return given


def candidates(study: Study, settings: ArmSet, values: Mapping[str, Mapping[str, BySeed]]) -> dict:
    """What the screening chooses: for each setting its best value, if that beats the base.

    Arms that are never to be chosen have scores, and that is all.

    Args:
        values: label of outcome to arm to seed to value.

    Returns:
        `scores`: arm to mean of the accuracies over its seeds; `gains` over the base, by arm;
        `best`: setting to the arm that is chosen; `arms` to confirm: the base, the chosen changes
        of largest gain, all chosen ones together, and what they are compared against.
    """
    labels = [o.label for o in study.outcomes if o.family == CHOSEN_BY]
    scores = {
        arm: statistics.fmean(v for label in labels for v in values[label][arm].values())
        for arm in settings.arms
        if all(values[label].get(arm) for label in labels)
    }
    if BASE not in scores:
        return {"scores": scores, "gains": {}, "best": {}, "arms": {}}
    gains = {arm: scores[arm] - scores[BASE] for arm in scores if arm != BASE}
    best: dict[str, str] = {}
    for arm, gain in gains.items():
        setting = settings.varied[arm][0]
        if arm not in study.never and gain > gains.get(best.get(setting, ""), 0.0):
            best[setting] = arm
    singles = sorted(best.values(), key=lambda arm: -gains[arm])
    arms = dict(study.against) | {BASE: settings.arms[BASE]}
    arms |= {arm: settings.arms[arm] for arm in singles[: study.best]}
    if len(singles) > 1:
        changed = dict(settings.varied[arm] for arm in singles)
        arms[ALL_BEST] = settings.arms[BASE] | changed
    return {"scores": scores, "gains": gains, "best": best, "arms": arms}


# ---- From cells to numbers ---------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """The cells of one plan file that are done.

    Attributes:
        records: (run of the file, arm, seed) to the record of the cell.
        folders: the same to its folder.
    """

    records: dict[tuple[str, str, int], dict[str, Any]]
    folders: dict[tuple[str, str, int], Path]

    @classmethod
    def of(cls, cells: Mapping[str, Cell]) -> "Finished":
        """Read what is done."""
        records, folders = {}, {}
        for cell in cells.values():
            if cell.run.copy.arm is not None and (done := cell.read(DONE)) is not None:
                key = (cell.run.copy.origin, cell.run.copy.arm, cell.seed)
                records[key], folders[key] = done, cell.folder
        return cls(records, folders)

    def values(self, outcome: Outcome, arms: Sequence[str], seeds: Sequence[int]) -> dict:
        """Arm to seed to the outcome."""
        found: dict[str, BySeed] = {}
        for (run, arm, seed), record in self.records.items():
            if run == outcome.run and arm in arms and seed in seeds:
                if outcome.metric not in record["metrics"]:
                    raise BadInput(
                        f"outcome {outcome.label!r}: {run} has no metric {outcome.metric!r}; it "
                        f"has {', '.join(sorted(record['metrics']))}"
                    )
                found.setdefault(arm, {})[seed] = record["metrics"][outcome.metric]
        return found


def summarise_arms(
    stage: str, arms: Mapping[str, Any], values: Mapping[str, Mapping[str, BySeed]]
) -> list[dict[str, Any]]:
    """Each arm with its outcomes: values by seed, mean, deviation, where one more run would lie."""
    rows = []
    for arm, flags in arms.items():
        outcomes = {}
        for label, by_arm in values.items():
            own = by_arm.get(arm, {})
            if own:
                numbers = list(own.values())
                outcomes[label] = {
                    "values": {str(seed): value for seed, value in sorted(own.items())},
                    "mean": statistics.fmean(numbers),
                    "deviation": statistics.stdev(numbers) if len(numbers) > 1 else None,
                    "one_more": prediction(numbers),
                }
        rows.append({"row": f"{stage}/{arm}", "flags": dict(flags), "outcomes": outcomes})
    return rows


def estimate_effects(
    factorial: ArmSet, values: Mapping[str, Mapping[str, BySeed]], families: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Main effects and interactions, each outcome, over all arms and the seeds that have all arms.

    A family of tests is an outcome's group, main effects and interactions apart.
    """
    names = list(next(iter(factorial.levels.values())))
    rows = []
    for size in range(1, len(names) + 1):
        for factors in itertools.combinations(names, size):
            signs = contrast_signs(factorial.levels, factors)
            for label, by_arm in values.items():
                by_seed = contrast(by_arm, signs)
                if not by_seed:
                    continue
                kind = "main effects" if size == 1 else "interactions"
                rows.append(
                    {
                        "factors": list(factors),
                        "outcome": label,
                        "family": f"{families[label]}, {kind}",
                        "by_seed": {str(seed): value for seed, value in by_seed.items()},
                        **asdict(estimate(list(by_seed.values()))),
                    }
                )
    return corrected(rows)


def confirmed(
    values: Mapping[str, Mapping[str, BySeed]], arms: Sequence[str], families: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Each arm against the base, paired by seed."""
    rows = []
    for arm in arms:
        for label, by_arm in values.items():
            paired = differences(by_arm.get(arm, {}), by_arm.get(BASE, {}))
            if arm != BASE and paired:
                found = asdict(estimate(list(paired.values())))
                rows.append({"arm": arm, "outcome": label, "family": families[label], **found})
    return corrected(rows)


# ---- Training dynamics -------------------------------------------------------------------------

# What one run's records say of how it trained.
DYNAMICS = {
    "loss, mean of all steps": "the area under the loss curve: lower is faster",
    "loss, last tenth": "mean over the last tenth of the steps",
    "log10 gradient norm": "mean over the second half of the steps",
    "spread of the gradient norm": "deviation of its natural logarithm over the second half",
    "peak of the gradient norm": "largest of all steps over the median of the second half",
}


def read_training_curve(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every log line with finite numbers."""
    found = []
    for line in (folder / METRICS).read_text().splitlines():
        record = json.loads(line)
        if record["kind"] != "train":
            continue
        step, loss, norm = record["step"], record["loss"], record["grad_norm"]
        if isinstance(loss, float) and isinstance(norm, float) and norm > 0:
            found.append((step, loss, norm))
    return found


def measure_dynamics(curve: Sequence[tuple[int, float, float]]) -> dict[str, float]:
    """The numbers of `DYNAMICS`, in their order; empty for fewer than four log lines."""
    if len(curve) < 4:
        return {}
    losses, norms = [loss for _, loss, _ in curve], [norm for *_, norm in curve]
    late = norms[len(norms) // 2 :]
    logs = [math.log(norm) for norm in late]
    values = (
        statistics.fmean(losses),
        statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        statistics.fmean(logs) / math.log(10),
        statistics.pstdev(logs),
        max(norms) / statistics.median(late),
    )
    return dict(zip(DYNAMICS, values, strict=True))


def compare_training(
    study: Study, factorial: ArmSet, finished: Finished, seeds: Sequence[int]
) -> dict[str, Any]:
    """Effects of the factors that leave the loss comparable on the dynamics, and mean curves.

    Losses under different masks are not compared: the factor named `mask` has no effects here, and
    those of the others are averages of comparisons under the same mask.
    """
    curves = {
        (arm, seed): read_training_curve(folder)
        for (run, arm, seed), folder in finished.folders.items()
        if run == study.pretrain and arm in factorial.arms and seed in seeds
    }
    values: dict[str, dict[str, BySeed]] = {label: {} for label in DYNAMICS}
    for (arm, seed), curve in curves.items():
        for label, value in measure_dynamics(curve).items():
            values[label].setdefault(arm, {})[seed] = value
    effects = estimate_effects(factorial, values, dict.fromkeys(DYNAMICS, "dynamics"))
    kept = [e for e in effects if len(e["factors"]) == 1 and e["factors"] != ["mask"]]
    means = {}
    for arm in factorial.arms:
        own = [curve for (name, _), curve in curves.items() if name == arm and curve]
        if own:
            length = min(len(curve) for curve in own)
            places = range(0, length, max(1, length // CURVE_POINTS))
            means[arm] = {
                "step": [own[0][i][0] for i in places],
                **{
                    name: [round(statistics.fmean(c[i][k] for c in own), 5) for i in places]
                    for k, name in ((1, "loss"), (2, "grad_norm"))
                },
            }
    return {"definitions": DYNAMICS, "effects": corrected(kept), "curves": means}
