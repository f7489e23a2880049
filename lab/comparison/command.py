"""Methods under one protocol: rates chosen on held-out images, then equal steps and equal time.

python -m lab.comparison --plan recipes/tables/comparison.yaml --jobs 2   # make comparison
python -m lab.comparison --cost        # measure speeds, say what the whole will cost, and end
python -m lab.comparison --report      # run nothing, write the document of what is done

Each stage is a plan that main_tables.py runs: short runs that give each method's speed, the rates,
equal steps, equal time. What is done stays done, and the same command goes on after a stop.
"""

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.comparison.analysis import (
    MOST_RATES,
    STEPS,
    TIME,
    Comparison,
    Tried,
    best_rate,
    compare,
    equal_images,
    list_detectable,
    make_stage,
    measure_speed,
    name_rate,
    next_rates,
    read_comparison,
    with_rates,
)
from lab.comparison.report import draw, markdown
from lab.study.analysis import Finished, summarise_arms
from lab.study.command import (
    COMMANDS,
    add_run_flags,
    cells_in,
    check_not_less,
    run_plan,
    where_from,
    write_plan,
)
from util.config.flags import FlagParser
from util.console import print_text
from util.errors import command, needs
from util.files import write_text
from util.flag_types import expanded_path
from util.progress import say
from util.runs.plan import Plan, read_plan
from util.train.logger import prepare_folder

RESULT, DOCUMENT, PICTURES = "comparison.json", "comparison.md", "pictures"


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python -m lab.comparison --plan recipes/tables/comparison.yaml --jobs 2",
        first=("plan", "output_dir", "docs", "jobs", "cost", "report"),
    )
    parser.add_argument(
        "--plan",
        type=expanded_path,
        default="recipes/tables/comparison.yaml",
        help="YAML file with a `comparison`",
    )
    add_run_flags(parser, "comparison", f"{RESULT}, {DOCUMENT} and the plot")
    parser.add_argument(
        "--cost",
        action="store_true",
        help="measure how fast each method is, say what the whole costs, and end",
    )
    return parser


@dataclass(frozen=True)
class Stages:
    """The stages of a comparison: their plans, and what of them is done.

    Attributes:
        jobs: runs at the same time; None: nothing is run, only read.
    """

    plan: Plan
    output: Path
    jobs: int | None

    def run(
        self, name: str, seeds: Sequence[int], arms: Mapping[str, Any], runs: Collection[str]
    ) -> Finished:
        """Run what a stage lacks, and read it."""
        why = f"Written by lab.comparison: the stage {name} of {self.plan.path.name}"
        given = make_stage(self.plan, name, seeds, arms, runs)
        path = self.output / f"{name}.yaml"
        if self.jobs is not None:
            write_plan(path, given, why)
            run_plan(path, self.output / name, self.jobs)
        return self.read(name)

    def read(self, name: str) -> Finished:
        """What of a stage is done; nothing of one that has not begun."""
        path = self.output / f"{name}.yaml"
        if not path.is_file():
            return Finished({}, {})
        return Finished.of(cells_in(read_plan(path, COMMANDS), self.output / name))

    def names(self) -> list[str]:
        """Of the stages that have begun, in their order."""
        rates = ["rates", *(f"rates_{number}" for number in range(2, MOST_RATES + 2))]
        known = ("speed", "price", *rates, STEPS, TIME)
        return [name for name in known if (self.output / f"{name}.yaml").is_file()]


# ---- Stages ------------------------------------------------------------------------------------


def run_speed(stages: Stages, comparison: Comparison) -> dict[str, dict[int, float]]:
    """Images a second of each method, by seed."""
    short = {"train_images": comparison.speed_images}
    arms = {arm: {**flags, **short} for arm, flags in comparison.methods.items()}
    found = stages.run("speed", comparison.speed_seeds, arms, [comparison.pretrain])
    return measure_speed(found, comparison.pretrain)


def run_rates(stages: Stages, comparison: Comparison) -> Tried:
    """Every method at the common rates, and beyond until its best lies inside."""
    wanted: dict[str, Sequence[float]] = dict.fromkeys(comparison.methods, comparison.rates)
    tried: Tried = {arm: {} for arm in comparison.methods}
    runs, seeds = [comparison.pretrain, comparison.chosen_by.run], [comparison.rate_seed]
    for number in range(1, MOST_RATES + 2):
        name = "rates" if number == 1 else f"rates_{number}"
        arms = with_rates(comparison, wanted)
        finished = stages.run(name, seeds, arms, runs)
        values = finished.values(comparison.chosen_by, list(arms), seeds)
        for arm, own in wanted.items():
            found = {rate: values.get(name_rate(arm, rate), {}) for rate in own}
            tried[arm] |= {rate: by_seed[seeds[0]] for rate, by_seed in found.items() if by_seed}
        complete = {arm: own for arm, own in tried.items() if own}
        wanted = dict(next_rates(complete, comparison.factor))
        if not wanted or (stages.jobs is None and f"rates_{number + 1}" not in stages.names()):
            break
    return tried


def equal_arms(
    comparison: Comparison, stage: str, tried: Tried, speeds: Mapping[str, Any], plan: Plan
) -> dict[str, Any]:
    """The arms of equal steps, or of equal time, each at its rate."""
    at_rate = {
        arm: {**flags, "lr": best_rate(tried[arm])} for arm, flags in comparison.methods.items()
    }
    if stage == STEPS:
        return {**at_rate, **comparison.first}
    counts = count_images(comparison, speeds, plan)
    return {
        arm: {**at_rate[arm], "train_images": counts[arm]}
        for arm in list_other_times(comparison, counts, plan)
    }


def mean_speeds(speeds: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Images a second of each method, over its seeds."""
    return {arm: statistics.fmean(own.values()) for arm, own in speeds.items()}


def list_other_times(comparison: Comparison, counts: Mapping[str, int], plan: Plan) -> list[str]:
    """The methods whose equal time is not their equal steps, as far as `alike` goes."""
    images = plan.given["defaults"]["main_pretrain"]["train_images"]
    return [arm for arm, count in counts.items() if abs(count / images - 1) > comparison.alike]


def count_images(
    comparison: Comparison, speeds: Mapping[str, Mapping[int, float]], plan: Plan
) -> dict[str, int]:
    """Images of each method in the time of the reference."""
    defaults = plan.given["defaults"]["main_pretrain"]
    images, batch = defaults["train_images"], defaults["batch_size"]
    mean = mean_speeds(speeds)
    return {
        arm: equal_images(images, batch, speed, mean[comparison.reference], comparison.most_images)
        for arm, speed in mean.items()
    }


# ---- What it costs -----------------------------------------------------------------------------


def list_cost(
    stages: Stages, comparison: Comparison, speeds: Mapping[str, Mapping[int, float]]
) -> list[str]:
    """What each stage will take, by the short runs and by one measurement of each encoder."""
    plan, jobs = stages.plan, stages.jobs or 1
    kinds = {own[0]: arm for arm, own in comparison.untrained.items()}
    short = {"train_images": comparison.speed_images}
    arms = {arm: {**comparison.methods[arm], **short} for arm in kinds}
    seed = comparison.speed_seeds[0]
    finished = stages.run("price", [seed], arms, list(plan.given["runs"]))
    seconds = {key: record["seconds"] for key, record in finished.records.items()}

    mean = mean_speeds(speeds)

    def measured_for(arm: str) -> str:
        return comparison.untrained[comparison.first_of(arm)][0]

    def of(run: str, arm: str) -> float:
        return seconds[run, measured_for(arm), seed]

    def pretrain(arm: str, images: int) -> float:
        steps = comparison.speed_images / mean[measured_for(arm)]
        return max(0.0, of(comparison.pretrain, arm) - steps) + images / mean[arm]

    images = plan.given["defaults"]["main_pretrain"]["train_images"]
    counts = count_images(comparison, speeds, plan)
    measured = [
        r for r in plan.given["runs"] if r not in (comparison.pretrain, comparison.chosen_by.run)
    ]
    after = {arm: sum(of(run, arm) for run in measured) for arm in comparison.methods}
    n = len(plan.seeds)
    rates = sum(
        pretrain(arm, images) + of(comparison.chosen_by.run, arm) for arm in comparison.methods
    ) * len(comparison.rates)
    steps = n * sum(pretrain(arm, images) + after[arm] for arm in comparison.methods)
    steps += n * sum(pretrain(own[0], 0) + after[own[0]] for own in comparison.untrained.values())
    others = list_other_times(comparison, counts, plan)
    equal = n * sum(pretrain(arm, counts[arm]) + after[arm] for arm in others)
    costs = {"rates (without what may be added)": rates, "equal steps": steps, "equal time": equal}
    return [
        *(f"{name:36s}{cost / 60 / jobs:7.1f} min" for name, cost in costs.items()),
        f"{'in all':36s}{sum(costs.values()) / 60 / jobs:7.1f} min with {jobs} at once",
    ]


# ---- What came out -----------------------------------------------------------------------------


def build_report(stages: Stages, comparison: Comparison) -> dict[str, Any]:
    """Everything that docs/comparison.json holds, from what is done so far."""
    plan = stages.plan
    report: dict[str, Any] = {"plan": plan.path.name, "names": comparison.names}
    report |= {"about": comparison.about, "remarks": list(comparison.remarks)}
    parts = [read_plan(stages.output / f"{name}.yaml", COMMANDS) for name in stages.names()]
    told = [where_from(part, cells_in(part, stages.output / part.path.stem)) for part in parts]
    for name in ("cells", "done", "seconds"):
        report[name] = sum(part[name] for part in told)
    for name in ("machine", "versions", "commit"):
        report[name] = list(dict.fromkeys(text for part in told for text in part[name]))
    report["finished"] = max((part["finished"] or "" for part in told), default="")
    only_read = Stages(plan, stages.output, None)
    speeds = run_speed(only_read, comparison)
    tried = run_rates(only_read, comparison)
    report["reference"], report["seeds"] = comparison.reference, list(plan.seeds)
    report["images_per_s"] = {
        arm: {str(s): v for s, v in own.items()} for arm, own in speeds.items()
    }
    report["images"] = count_images(comparison, speeds, plan) if speeds else {}
    report["equal_steps_images"] = plan.given["defaults"]["main_pretrain"]["train_images"]
    report["rates"] = {a: {f"{r:g}": v for r, v in sorted(own.items())} for a, own in tried.items()}
    report["chosen"] = {arm: f"{best_rate(own):g}" for arm, own in tried.items() if own}
    report["outcomes"] = {o.label: f"{o.metric} of {o.run}" for o in comparison.outcomes}
    report["beside"] = comparison.beside.label
    report["rows"], report["compared"] = [], []
    for stage in (STEPS, TIME):
        finished = only_read.read(stage)
        values = {
            o.label: finished.values(o, [*comparison.names], plan.seeds)
            for o in (*comparison.outcomes, comparison.beside)
        }
        if stage == TIME and finished.records:  # what is as fast as the reference was run once
            same = only_read.read(STEPS)
            own = {arm for by_arm in values.values() for arm in by_arm}
            others = [arm for arm in comparison.methods if arm not in own]
            for o in (*comparison.outcomes, comparison.beside):
                values[o.label] |= same.values(o, others, plan.seeds)
        arms = {
            arm: flags
            for arm, flags in {**comparison.methods, **comparison.first}.items()
            if any(arm in by_arm for by_arm in values.values())
        }
        report["rows"] += summarise_arms(stage, arms, values)
        compared = {
            label: by_arm for label, by_arm in values.items() if label in report["outcomes"]
        }
        report["compared"] += compare(comparison, stage, compared)
    report["detectable"] = list_detectable(report["compared"])
    return report


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done yet and write the document; see the module."""
    args = build_parser().parse(argv)
    for module, install in (("scipy.stats", "scipy"), ("matplotlib", "matplotlib")):
        needs(module, install)  # now, not after hours of runs
    plan = read_plan(Path(args.plan), COMMANDS)
    comparison = read_comparison(plan)
    output, docs = Path(args.output_dir).resolve(), Path(args.docs)
    if not args.report:
        prepare_folder(output)
        stages = Stages(plan, output, args.jobs)
        speeds = run_speed(stages, comparison)
        print_text("\n".join(list_cost(stages, comparison, speeds)))
        if args.cost:
            return
        tried = run_rates(stages, comparison)
        measured = [run for run in plan.given["runs"] if run != comparison.chosen_by.run]
        for stage in (STEPS, TIME):
            arms = equal_arms(comparison, stage, tried, speeds, plan)
            stages.run(stage, plan.seeds, arms, measured)
    report = build_report(Stages(plan, output, None), comparison)
    check_not_less(report, output, docs / RESULT)
    prepare_folder(docs)
    write_text(docs / RESULT, json.dumps(report, indent=1) + "\n")
    draw(report, docs / PICTURES)
    write_text(docs / DOCUMENT, markdown(report, PICTURES))
    say(f"document  {docs / DOCUMENT}\ndata      {docs / RESULT}")
