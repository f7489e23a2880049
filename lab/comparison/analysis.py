"""What a plan's `comparison` asks for, its stages as plans of their own, and what came out of them.

comparison:
  pretrain: RUN         whose records hold images a second
  reference: ARM        the method that others are compared with, and whose time is equal time
  rates: {values: [...], factor: 2, chosen_by: [run, metric], seed: N}
  speed: {images: N, seeds: [...], most: N, alike: SHARE}
                        short runs; for equal time at most so many images; and where these differ by
                        less than a share from equal steps, those stand for both
  outcomes: [[label, run, metric], ...]         the more the better
  beside: [label, run, metric]                  shown, not compared
  untrained: {ARM: [METHOD, ...]}               encoders' first weights, and who starts from them
  not_untrained: [label, ...]                   outcomes that first weights have not
  pairs: [[METHOD, METHOD], ...]                compared, too
  names: {ARM: text}
  about: text           what a reader of the document needs to know first
  remarks: [text, ...]  and what came about after the plan was written
"""

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lab.study.analysis import Finished, Outcome, with_arms
from lab.study.effects import BySeed, corrected, detectable, differences, estimate
from util.errors import BadInput
from util.names import known
from util.runs.plan import Plan
from util.train.logger import METRICS
from util.yaml_values import mapping, read_seeds

KEYS = (
    "pretrain", "reference", "rates", "speed", "outcomes", "beside", "untrained", "not_untrained",
    "pairs", "names", "about",
)  # fmt: skip
MOST_RATES = 12  # tried for one method: a best one that runs away is no best one
STEPS, TIME = "steps", "time"
EQUAL = {STEPS: "equal steps", TIME: "equal time"}


@dataclass(frozen=True)
class Comparison:
    """What is asked; see the module.

    Attributes:
        methods: arms that train, to their flags. first: arms that do not.
    """

    pretrain: str
    reference: str
    methods: dict[str, dict[str, Any]]
    first: dict[str, dict[str, Any]]
    rates: tuple[float, ...]
    factor: float
    chosen_by: Outcome
    rate_seed: int
    speed_images: int
    speed_seeds: tuple[int, ...]
    most_images: int
    alike: float
    outcomes: tuple[Outcome, ...]
    beside: Outcome
    untrained: dict[str, tuple[str, ...]]
    not_untrained: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    names: dict[str, str]
    about: str
    remarks: tuple[str, ...]

    def first_of(self, method: str) -> str:
        """The untrained arm that a method starts from."""
        return next(arm for arm, own in self.untrained.items() if method in own)


def read_comparison(plan: Plan) -> Comparison:
    """The `comparison` of a plan.

    Raises:
        BadInput: there is none, or it names what is not there.
    """
    where = f"comparison in {plan.path}"
    given = mapping(plan.given.get("comparison") or {}, where, (*KEYS, "remarks"))
    if absent := [key for key in KEYS if key not in given]:
        raise BadInput(f"{where} has no {absent[0]!r}")
    arms = {arm: flags for own in plan.arms.values() for arm, flags in own.arms.items()}
    origins = {run.copy.origin for run in plan.runs.values() if run.copy.arm is not None}

    def outcome(words: Any) -> Outcome:
        if not isinstance(words, list) or len(words) != 3:
            raise BadInput(f"outcome {words!r} of {where}: expected [label, run, metric]")
        known(words[1], origins, f"run of outcome {words[0]!r} of {where}")
        label, run, metric = map(str, words)
        return Outcome(label, run, metric, family=label)

    untrained = {
        arm: tuple(own) for arm, own in mapping(given["untrained"], f"untrained of {where}").items()
    }
    pairs = tuple((one, other) for one, other in given["pairs"])
    started = [method for own in untrained.values() for method in own]
    for arm in (*untrained, *started, given["reference"], *given["names"], *sum(pairs, ())):
        known(arm, arms, f"arm of {where}")
    methods = {arm: flags for arm, flags in arms.items() if arm not in untrained}
    if sorted(started) != sorted(methods):
        raise BadInput(f"untrained of {where} must name each method once: {', '.join(methods)}")
    if nameless := arms.keys() - given["names"].keys():
        raise BadInput(f"names of {where} lack {', '.join(sorted(nameless))}")
    rates = mapping(given["rates"], f"rates of {where}", ("values", "factor", "chosen_by", "seed"))
    speed = mapping(given["speed"], f"speed of {where}", ("images", "seeds", "most", "alike"))
    values = tuple(map(float, rates["values"]))
    if list(values) != sorted(set(values)) or len(values) < 3 or rates["factor"] <= 1:
        raise BadInput(f"rates of {where} must be three or more that rise, and factor above 1")
    seeds = (rates["seed"], *read_seeds(speed["seeds"], where))
    if seen := set(seeds) & set(plan.seeds):
        raise BadInput(
            f"{where} needs fresh seeds for what is reported: {sorted(seen)} chose rates"
        )
    known(given["pretrain"], origins, f"pretrain of {where}")
    return Comparison(
        given["pretrain"],
        given["reference"],
        methods,
        {arm: arms[arm] for arm in untrained},
        values,
        float(rates["factor"]),
        outcome(["chosen", *rates["chosen_by"]]),
        seeds[0],
        speed["images"],
        seeds[1:],
        speed["most"],
        float(speed["alike"]),
        tuple(map(outcome, given["outcomes"])),
        outcome(given["beside"]),
        untrained,
        tuple(given["not_untrained"]),
        pairs,
        dict(given["names"]),
        str(given["about"]),
        tuple(map(str, given.get("remarks") or ())),
    )


# ---- Stages ------------------------------------------------------------------------------------


def make_stage(
    plan: Plan, name: str, seeds: Sequence[int], arms: Mapping[str, Any], runs: Collection[str]
) -> dict[str, Any]:
    """A plan file of other arms and of some of the runs."""
    given = with_arms(plan, name, seeds, arms)
    given["runs"] = {run: entry for run, entry in given["runs"].items() if run in runs}
    for entry in given["runs"].values():
        if "for" in entry:
            entry["for"] = {arm: flags for arm, flags in entry["for"].items() if arm in arms}
    tables = [
        {**table, "rows": [row for row in table["rows"] if row[1] in runs]}
        for table in given["tables"]
    ]
    given["tables"] = [table for table in tables if table["rows"]]
    return given


def name_rate(arm: str, rate: float) -> str:
    """The arm of a method at a rate."""
    return f"{arm}-{rate:g}"


def with_rates(comparison: Comparison, rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Each method at its rates, as arms."""
    return {
        name_rate(arm, rate): {**comparison.methods[arm], "lr": rate}
        for arm, own in rates.items()
        for rate in own
    }


Tried = dict[str, dict[float, float]]  # method, rate, what chooses


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate of the highest value, the lower of equals."""
    return max(sorted(tried), key=lambda rate: tried[rate])


def next_rates(tried: Tried, factor: float) -> dict[str, list[float]]:
    """For each method whose best rate is an end of those that it tried, the one beyond.

    Raises:
        BadInput: a method has tried `MOST_RATES`.
    """
    found = {}
    for arm, own in tried.items():
        best = best_rate(own)
        if best in (min(own), max(own)):
            if len(own) >= MOST_RATES:
                raise BadInput(f"the best rate of {arm} lies beyond {best:g}, after {len(own)}")
            found[arm] = [best * factor if best == max(own) else best / factor]
    return found


def measure_speed(finished: Finished, pretrain: str) -> dict[str, dict[int, float]]:
    """Images a second of each arm and seed: the median of a run's log lines but the first."""
    found: dict[str, dict[int, float]] = {}
    for (run, arm, seed), folder in finished.folders.items():
        if run == pretrain:
            lines = map(json.loads, (folder / METRICS).read_text().splitlines())
            speeds = [line["images_per_s"] for line in lines if line["kind"] == "train"]
            if len(speeds) < 2:
                raise BadInput(f"{folder} has too few log lines to measure its speed")
            found.setdefault(arm, {})[seed] = statistics.median(speeds[1:])
    return found


def equal_images(images: int, batch: int, speed: float, reference: float, most: int) -> int:
    """So many images in whole batches as a method sees while the reference sees `images`."""
    return min(most, max(1, round(images * speed / reference / batch)) * batch)


# ---- What came out -----------------------------------------------------------------------------

Values = Mapping[str, Mapping[str, BySeed]]  # outcome, arm, seed


def compare(comparison: Comparison, stage: str, values: Values) -> list[dict[str, Any]]:
    """What is compared in a stage, paired by seed; p after Holm in each family."""
    wanted = [
        (f"with {comparison.names[comparison.reference]}", arm, comparison.reference)
        for arm in comparison.methods
        if arm != comparison.reference
    ]
    wanted += [("in pairs", one, other) for one, other in comparison.pairs]
    if stage == STEPS:
        first = "with the untrained encoder"
        wanted += [(first, arm, comparison.first_of(arm)) for arm in comparison.methods]
    rows = []
    for label, by_arm in values.items():
        for family, one, other in wanted:
            if other in comparison.first and label in comparison.not_untrained:
                continue
            by_seed = differences(by_arm.get(one, {}), by_arm.get(other, {}))
            if by_seed:
                rows.append(
                    {
                        "stage": stage,
                        "outcome": label,
                        "pair": [one, other],
                        "kind": family,
                        "family": f"{stage}, {label}, {family}",
                        "by_seed": {str(seed): value for seed, value in by_seed.items()},
                        **asdict(estimate([*by_seed.values()])),
                    }
                )
    return corrected(rows)


def list_detectable(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By outcome, the difference that would have been seen four times in five, see `detectable`."""
    found = {}
    for label in dict.fromkeys(row["outcome"] for row in rows):
        own = [[*row["by_seed"].values()] for row in rows if row["outcome"] == label]
        if size := detectable([values for values in own if len(values) > 1]):
            found[label] = size
    return found
