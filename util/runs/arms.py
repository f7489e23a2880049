"""Arms: one run of a plan made several times, with other flags each time.

A set of arms is one of

    factors: {mask: {off: {mask: random}, on: {mask: mixed}}, ...}    every combination of levels
    base: {method: mmae}, vary: {avg_share: [.25, .75], ...}          the base, and one change each
    list: {mae: {method: mae}, ...}                                   as they stand

with the seeds that it is for. `arms: SET` at a run makes one run NAME.ARM for each of them, with
the arm's flags over its own; `of: NAME` makes one for each of those, in whose flags {run:NAME}
stands for it. `for: {ARM: {flag: value}}` beside `of` gives the run of an arm flags of its own.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util.errors import BadInput
from util.names import known
from util.yaml_values import mapping, read_seeds

FORMS = ({"factors"}, {"base", "vary"}, {"list"})
MOST_ARMS = 1000  # each is a run at every seed
ARM_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class ArmSet:
    """A set of arms.

    Attributes:
        seeds: at which it is run; None: at the plan's.
        arms: name to flags.
        levels: of factors: arm to {factor: level}.
        varied: of `vary`: arm to (flag, value); the base is not among them.
    """

    seeds: tuple[int, ...] | None
    arms: dict[str, dict[str, Any]]
    levels: dict[str, dict[str, str]] = field(default_factory=dict)
    varied: dict[str, tuple[str, Any]] = field(default_factory=dict)


BASE = "base"


def read_arms(given: Any, path: Path) -> dict[str, ArmSet]:
    """The sets of a plan, by name.

    Raises:
        BadInput: unknown keys, or names that cannot be those of folders.
    """
    return {name: _set(entry, f"arms {name!r} in {path}") for name, entry in
            mapping(given, f"arms in {path}").items()}  # fmt: skip


def _set(given: Any, where: str) -> ArmSet:
    entry = mapping(given, where, ("seeds", "factors", "base", "vary", "list"))
    if entry.keys() - {"seeds"} not in FORMS:
        raise BadInput(f"{where}: give factors, or base and vary, or list")
    seeds = read_seeds(entry["seeds"], where) if "seeds" in entry else None
    if "factors" in entry:
        found = _factorial(mapping(entry["factors"], f"factors of {where}"), seeds, where)
    elif "list" in entry:
        arms = mapping(entry["list"], f"list of {where}")
        found = ArmSet(seeds, {a: dict(mapping(f or {}, f"arm {a}")) for a, f in arms.items()})
    else:
        found = _one_at_a_time(entry, seeds, where)
    for arm in found.arms:
        if not ARM_NAME.fullmatch(arm):
            raise BadInput(f"{where}: the arm {arm!r} must be letters, digits and ._- alone")
    if not found.arms:
        raise BadInput(f"{where} has no arms")
    return found


def _factorial(factors: dict[str, Any], seeds: tuple[int, ...] | None, where: str) -> ArmSet:
    arms, levels = {}, {}
    choices = [
        [
            (factor, level, mapping(flags, f"level {level} of {factor} of {where}"))
            for level, flags in _levels(named, f"factor {factor} of {where}").items()
        ]
        for factor, named in factors.items()
    ]
    count = math.prod(map(len, choices))
    if count > MOST_ARMS:
        raise BadInput(f"{where}: {count:,} combinations of levels; expected at most {MOST_ARMS}")
    for combination in itertools.product(*choices):
        arm = "-".join(f"{factor}_{level}" for factor, level, _ in combination)
        arms[arm] = {flag: value for *_, flags in combination for flag, value in flags.items()}
        levels[arm] = {factor: level for factor, level, _ in combination}
    return ArmSet(seeds, arms, levels)


def _levels(given: Any, where: str) -> dict[str, Any]:
    # YAML reads on and off without quotes as true and false.
    if isinstance(given, dict):
        given = {{True: "on", False: "off"}.get(k, k): v for k, v in given.items()}
    return mapping(given, where)


def _one_at_a_time(entry: dict[str, Any], seeds: tuple[int, ...] | None, where: str) -> ArmSet:
    base = dict(mapping(entry["base"] or {}, f"base of {where}"))
    arms, varied = {BASE: base}, {}
    for flag, values in mapping(entry["vary"], f"vary of {where}").items():
        if not isinstance(values, list):
            raise BadInput(f"{flag} of vary of {where} must be a list of values, not {values!r}")
        for value in values:
            arm = f"{flag}_{value}"
            arms[arm], varied[arm] = {**base, flag: value}, (flag, value)
    return ArmSet(seeds, arms, {}, varied)


@dataclass(frozen=True)
class Copy:
    """Where a run of the plan comes from.

    Attributes:
        origin: name in the plan file.
        arm: its arm; None: it has none.
        seeds: at which it is run; None: at the plan's.
    """

    origin: str
    arm: str | None = None
    seeds: tuple[int, ...] | None = None


def expand(
    runs: Mapping[str, Any], sets: Mapping[str, ArmSet], path: Path
) -> tuple[dict[str, Any], dict[str, Copy]]:
    """Runs as they stand in the file, those with arms made once for each.

    Returns:
        entries without `arms` and `of`, by name; where each comes from.

    Raises:
        BadInput: unknown sets, or the same arm twice at one run.
    """
    entries: dict[str, Any] = {}
    copies: dict[str, Copy] = {}
    armed = {
        name: _armed(name, entry, sets, f"run {name!r} in {path}")
        for name, entry in runs.items()
        if isinstance(entry, dict) and "arms" in entry
    }
    for name, entry in runs.items():
        where = f"run {name!r} in {path}"
        if not isinstance(entry, dict) or not entry.keys() & {"arms", "of"}:
            entries[name], copies[name] = entry, Copy(name)
            continue
        made = armed[name] if name in armed else _derived(name, entry, armed, where)
        for copy, one in made:
            full = f"{name}.{copy.arm}"
            if full in entries or full in runs:
                raise BadInput(f"{where}: the arm {copy.arm!r} is there twice; names are folders")
            entries[full], copies[full] = one, copy
    return entries, copies


Made = list[tuple[Copy, dict[str, Any]]]


def _armed(name: str, entry: dict[str, Any], sets: Mapping[str, ArmSet], where: str) -> Made:
    if "of" in entry:
        raise BadInput(f"{where}: give arms or of, not both")
    rest = {k: v for k, v in entry.items() if k != "arms"}
    named, made = entry["arms"], []
    for set_name in named if isinstance(named, list) else [named]:
        known(set_name, sets, f"arms of {where}")
        for arm, flags in sets[set_name].arms.items():
            one = rest | {"flags": {**(rest.get("flags") or {}), **flags}}
            made.append((Copy(name, arm, sets[set_name].seeds), one))
    return made


def _derived(name: str, entry: dict[str, Any], armed: Mapping[str, Made], where: str) -> Made:
    rest = {k: v for k, v in entry.items() if k not in ("of", "for")}
    parent = entry["of"]
    known(parent, armed, f"run with arms, of at {where}")
    own = mapping(entry.get("for") or {}, f"for of {where}", [str(c.arm) for c, _ in armed[parent]])
    made = []
    for copy, _ in armed[parent]:
        full = f"{parent}.{copy.arm}"
        given = (rest.get("flags") or {}) | mapping(own.get(str(copy.arm), {}), f"for of {where}")
        flags = {k: _renamed(v, parent, full) for k, v in given.items()}
        made.append((Copy(name, copy.arm, copy.seeds), rest | {"flags": flags}))
    return made


def _renamed(value: Any, parent: str, full: str) -> Any:
    """A flag's value with {run:PARENT} as that parent's arm."""
    if isinstance(value, list):
        return [_renamed(one, parent, full) for one in value]
    return (
        value.replace(f"{{run:{parent}}}", f"{{run:{full}}}") if isinstance(value, str) else value
    )
