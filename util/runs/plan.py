"""A plan: which runs make which tables, read from YAML and checked before anything starts.

A cell is a run of the plan at one seed. Its folder holds `starts.json` from its first start on and
`done.json` when it is done.
"""

import fnmatch
import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.errors import BadInput
from util.names import known, nearest
from util.runs.arms import ArmSet, Copy, expand, read_arms
from util.yaml_files import read_yaml
from util.yaml_values import mapping, read_seeds

PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
NAME = re.compile(r"\w[\w.-]*")
FLAG = re.compile(r"[A-Za-z]\w*")
OUTPUT_FLAG = "output_dir"
# What a plan may hold beside its runs, for the programs of the lab.
OF_THE_LAB = ("study", "comparison")
DONE, STARTS = "done.json", "starts.json"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan, at any seed.

    Attributes:
        name: its name and that of its folder.
        main: the command, a file of the project without `.py`.
        flags: by name, the defaults of the command among them; not filled in yet.
        reads: runs whose folders the flags name.
        needs: runs that must be done before, directly or through others; in plan order.
        copy: the run of the file that it is made from, its arm and its seeds.
    """

    name: str
    main: str
    flags: dict[str, Any]
    reads: tuple[str, ...]
    needs: tuple[str, ...]
    copy: Copy

    def words(self, seed: str, folder_of: Callable[[str], str]) -> list[str]:
        """The command line after the interpreter.

        Args:
            seed: stands for `{seed}`.
            folder_of: name of a run to its folder, for `{run:NAME}` and for its own.
        """

        def fill(value: Any) -> str:
            def stands_for(match: re.Match[str]) -> str:
                kind, _, name = match.group(1).partition(":")
                return seed if kind == "seed" else folder_of(name)

            return PLACEHOLDER.sub(stands_for, str(value))

        words = [f"{self.main}.py"]
        for flag, value in self.flags.items():
            if value is True:
                words.append(f"--{flag}")
            elif isinstance(value, list):
                words += [f"--{flag}", *map(fill, value)]
            elif value is not None and value is not False:
                # With "=", a value such as -1 is not taken for a flag.
                words.append(f"--{flag}={fill(value)}")
        return [*words, f"--{OUTPUT_FLAG}={folder_of(self.name)}"]


@dataclass(frozen=True)
class TableRow:
    """A row of a table: what to call it, and which metrics of which run it shows."""

    label: str
    run: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table of a plan."""

    title: str
    rows: tuple[TableRow, ...]

    @property
    def metrics(self) -> list[str]:
        """The columns: every metric that a row asks for, in order of appearance."""
        return list(dict.fromkeys(metric for row in self.rows for metric in row.metrics))


@dataclass(frozen=True)
class Plan:
    """What a plan file says; runs in its order.

    Attributes:
        seeds: the file's, and those of its arms.
        given: the file's contents, with what `OF_THE_LAB` names.
    """

    path: Path
    seeds: tuple[int, ...]
    runs: dict[str, PlannedRun]
    tables: tuple[Table, ...]
    arms: dict[str, ArmSet]
    given: dict[str, Any]


def read_plan(path: Path, mains: Collection[str]) -> Plan:
    """Read and check a plan.

    Args:
        path: a YAML file; recipes/tables/fashion_mnist.yaml is an example.
        mains: the commands that a run may name.

    Raises:
        BadInput: unreadable, unknown keys or names, runs that need each other in a circle, or
            anything else that would only be found once runs have been paid for.
    """
    given = read_yaml(path, f"the plan {path}")
    keys = ("seeds", "defaults", "arms", "runs", "tables", *OF_THE_LAB)
    top = mapping(given, str(path), keys)
    for key in ("seeds", "runs", "tables"):
        if not top.get(key):
            raise BadInput(f"{path} has no {key!r}, or an empty one")
    defaults = {
        main: _flags(flags, f"defaults of {main} in {path}")
        for main, flags in mapping(top.get("defaults") or {}, f"defaults in {path}", mains).items()
    }
    arms = read_arms(top.get("arms") or {}, path)
    entries, copies = expand(mapping(top["runs"], f"runs in {path}"), arms, path)
    seeds = read_seeds(top["seeds"], str(path))
    runs = _runs(entries, copies, seeds, defaults, mains, path)
    seeds = tuple(dict.fromkeys([*seeds, *(s for r in runs.values() for s in r.copy.seeds or ())]))
    return Plan(path, seeds, runs, _tables(top["tables"], runs, path), arms, top)


def _runs(
    given: dict[str, Any],
    copies: Mapping[str, Copy],
    seeds: Sequence[int],
    defaults: Mapping[str, Any],
    mains: Collection[str],
    path: Path,
) -> dict[str, PlannedRun]:
    flags, reads, direct = {}, {}, {}
    for name, entry in given.items():
        where = f"run {name!r} in {path}"
        if not NAME.fullmatch(name):
            raise BadInput(f"{where}: a name is letters, digits and ._- (it is a folder's name)")
        entry = mapping(entry, where, ("main", "flags", "after"))
        if "main" not in entry:
            raise BadInput(f"{where} names no main; one of {', '.join(mains)}")
        known(entry["main"], mains, f"main of {where}")
        own = _flags(entry.get("flags") or {}, where)
        flags[name] = {**defaults.get(entry["main"], {}), **own}
        used = list(_placeholders(flags[name], where))
        reads[name] = tuple(dict.fromkeys(run for run in used if run is not None))
        if not used:
            raise BadInput(
                f"{where} would be the same at every seed: put seed: '{{seed}}' into its flags, "
                "or let them read a run that does ('{run:NAME}/checkpoint-last.pth')"
            )
        after = entry.get("after") or []
        if not isinstance(after, list):
            raise BadInput(f"after of {where} must be a list of runs, not {after!r}")
        for other in (*reads[name], *after):
            known(other, given, f"run that {where} needs")
        direct[name] = (*reads[name], *after)
    needs = {name: _reached(name, direct, path) for name in given}
    for name in given:
        wanted = set(copies[name].seeds or seeds)
        for other in needs[name]:
            if lost := wanted - set(copies[other].seeds or seeds):
                raise BadInput(
                    f"run {name!r} in {path} needs {other!r}, which is not run at its seeds "
                    f"{', '.join(map(str, sorted(lost)))}"
                )
    return {
        name: PlannedRun(
            name,
            given[name]["main"],
            flags[name],
            reads[name],
            tuple(other for other in given if other in needs[name]),
            copies[name],
        )
        for name in given
    }


def _placeholders(flags: Mapping[str, Any], where: str) -> list[str | None]:
    """What the values stand for: None for the seed, else the name of a run."""
    found: list[str | None] = []
    for flag, value in flags.items():
        for text in value if isinstance(value, list) else [value]:
            for inside in PLACEHOLDER.findall(str(text)):
                kind, _, name = inside.partition(":")
                if inside != "seed" and not (kind == "run" and name):
                    raise BadInput(
                        f"{flag} of {where}: {{{inside}}} is not known; {{seed}} and {{run:NAME}} "
                        "(the folder of that run) are"
                    )
                found.append(None if inside == "seed" else name)
    return found


def _reached(start: str, direct: Mapping[str, tuple[str, ...]], path: Path) -> set[str]:
    """All runs that a run needs; a circle is an error that shows it."""
    reached: set[str] = set()
    trails = [(name, [start, name]) for name in direct[start]]
    while trails:
        name, trail = trails.pop()
        if name == start:
            raise BadInput(f"runs in {path} need each other in a circle: {' -> '.join(trail)}")
        if name not in reached:
            reached.add(name)
            trails += [(other, [*trail, other]) for other in direct[name]]
    return reached


def _flags(given: Any, where: str) -> dict[str, Any]:
    """Flags by name: text, numbers, switches, lists of these; null: the command's own default."""
    flags = mapping(given, f"flags, {where}")
    for flag, value in flags.items():
        if not FLAG.fullmatch(flag):
            raise BadInput(f"flag {flag!r} of {where}: write the name alone, without -- or =")
        if flag == OUTPUT_FLAG:
            raise BadInput(f"{where} sets {flag}; the plan's runs get their folders by themselves")
        for one in value if isinstance(value, list) else [value]:
            inside = isinstance(value, list) and (one is None or isinstance(one, bool))
            if inside or not (one is None or isinstance(one, str | int | float)):
                raise BadInput(
                    f"{flag} of {where} cannot be {value!r}; text with braces needs quotes: "
                    "'{seed}', '{run:NAME}/checkpoint-last.pth'"
                )
    return flags


def _tables(given: Any, runs: Mapping[str, PlannedRun], path: Path) -> tuple[Table, ...]:
    if not isinstance(given, list):
        raise BadInput(f"tables in {path} must be a list, not {given!r}")
    tables = []
    for i, entry in enumerate(given):
        where = f"table {i + 1} in {path}"
        entry = mapping(entry, where, ("title", "rows"))
        title, rows = entry.get("title"), entry.get("rows")
        if not isinstance(title, str) or not isinstance(rows, list) or not rows:
            raise BadInput(f"{where} needs a title and rows")
        made = []
        for row in rows:
            if not isinstance(row, list) or len(row) < 3:
                raise BadInput(f"row {row!r} of {where}: expected [label, run, metric, ...]")
            label, named, *metrics = row
            # The name of a run with arms stands for all of them.
            copies = [run.name for run in runs.values() if named == run.copy.origin]
            if not copies:
                known(named, runs, f"run of row {label!r} of {where}")
            if not all(isinstance(metric, str) for metric in metrics):
                raise BadInput(f"row {row!r} of {where}: metrics are names")
            for run in copies or [named]:
                text = str(label).replace("{arm}", str(runs[run].copy.arm))
                made.append(TableRow(text, run, tuple(metrics)))
        tables.append(Table(title, tuple(made)))
    return tuple(tables)


# ---- Cells -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A run of the plan at one seed; what is known of it lies in its folder."""

    run: PlannedRun
    seed: int
    output: Path

    @property
    def title(self) -> str:
        """How it is called, and where it lies in the output."""
        return f"seed-{self.seed}/{self.run.name}"

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.output / self.title

    def at_seed(self, names: Sequence[str]) -> list[str]:
        """The titles of other runs at this seed."""
        return [f"seed-{self.seed}/{name}" for name in names]

    def words(self, root: Path) -> list[str]:
        """The command line after the interpreter, to be run in the folder `root`."""
        output = self.output.relative_to(root) if self.output.is_relative_to(root) else self.output
        return self.run.words(str(self.seed), lambda name: str(output / f"seed-{self.seed}/{name}"))

    def spec(self) -> list[str]:
        """The same without the place of the output, so that a folder may be moved as a whole."""
        return self.run.words(str(self.seed), lambda name: f"{{run:{name}}}")

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of its folder; None: not there.

        Raises:
            BadInput: it is damaged.
        """
        path = self.folder / name
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise BadInput(f"cannot read {path} ({error}); move {self.folder} away") from None
        if not isinstance(found, dict) or "cell" not in found:
            raise BadInput(f"{path} holds no record of ours; move {self.folder} away")
        return found

    def stamp(self) -> str | None:
        """What tells this result from that of the same cell run again; None: not done."""
        done = self.read(DONE)
        return done["id"] if done else None


def list_cells(plan: Plan, seeds: Sequence[int], output: Path) -> dict[str, Cell]:
    """All cells by title: seed after seed, so that whole tables of fewer seeds come early.

    Runs whose arms have seeds of their own are made at those, and at seeds that the plan does not
    name.
    """
    own = {name: run.copy.seeds or plan.given["seeds"] for name, run in plan.runs.items()}
    cells = [
        Cell(run, seed, output)
        for seed in seeds
        for name, run in plan.runs.items()
        if seed in own[name] or seed not in plan.seeds
    ]
    return {cell.title: cell for cell in cells}


def choose(cells: Mapping[str, Cell], seeds: Sequence[int], patterns: Sequence[str]) -> list[str]:
    """Titles of the cells to run, in plan order: those that match, and what they need.

    Raises:
        BadInput: a pattern that matches nothing.
    """
    chosen: set[str] = set()
    candidates = [cell for cell in cells.values() if cell.seed in seeds]
    for pattern in patterns:
        hits = [
            cell
            for cell in candidates
            if fnmatch.fnmatchcase(cell.run.name, pattern)
            or fnmatch.fnmatchcase(cell.title, pattern)
        ]
        if not hits:
            names = list(dict.fromkeys(cell.run.name for cell in candidates))
            raise BadInput(f"--only {pattern} matches no run{nearest(pattern, names)}")
        for cell in hits:
            chosen |= {cell.title, *cell.at_seed(cell.run.needs)}
    return [title for title in cells if title in chosen]


def check_unchanged(cells: Mapping[str, Cell]) -> None:
    """What lies in the folders must be what the plan describes, or the tables would lie.

    Raises:
        BadInput: a cell was done with another command line, or from a run that was since repeated.
    """
    for cell in cells.values():
        done = cell.read(DONE)
        if done is not None and done["cell"] != cell.spec():
            old, new = set(done["cell"]), set(cell.spec())
            raise BadInput(
                f"{cell.title} is done with another command line than the plan now gives: was "
                f"{shlex.join(sorted(old - new)) or 'in another order'}, now "
                f"{shlex.join(sorted(new - old)) or 'in another order'}; move {cell.folder} away "
                "to run it again, or undo the change"
            )
        begun = done or cell.read(STARTS)
        for need in cell.at_seed(cell.run.reads) if begun else []:
            if begun is not None and begun["made_from"].get(need) != cells[need].stamp():
                raise BadInput(
                    f"{cell.title} was made from a {need} that is no longer there or was run "
                    f"again since; move {cell.folder} away to run it again, or bring the other back"
                )
