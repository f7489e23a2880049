"""The papers' tables with a column for ours: which runs are finished, and what they measured."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from util.config.recipes import read_recipe
from util.errors import BadInput
from util.names import nearest
from util.train.logger import METRICS, SETTINGS
from util.yaml_files import read_settings, read_yaml

ROW_KEYS = ("name", "paper", "original", "pretrain", "run", "in")
# Which command runs a recipe of a row, by the metric of its table.
MEASURED_BY = {"top1": ("main_finetune", "finetune"), "miou": ("main_segment", "segment")}
DIGITS = {"top1": 1, "miou": 1}
# What may differ from a recipe without being another experiment: places, and how a batch is cut.
PLACES = {
    "output_dir", "finetune", "batch_size", "accum_iter", "keep", "precision", "data_path",
    "dist_eval",
}  # fmt: skip


@dataclass(frozen=True)
class PaperRow:
    """A row of a paper's table.

    Attributes:
        name: what the paper calls it.
        paper: its number; None: not known to us.
        original: where the number is from, if not from the paper itself.
        pretrain, run: recipes under recipes/; None: no pretraining; no system of ours.
        folder: of the measured run, under the root of all runs; None: no system of ours.
        pretrained_in: that of its pretraining; None: there is none.
    """

    name: str
    paper: float | None
    original: str | None
    pretrain: str | None
    run: str | None
    folder: str | None
    pretrained_in: str | None


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper."""

    paper: str
    title: str
    metric: str
    rows: tuple[PaperRow, ...]


@dataclass(frozen=True)
class FoundRun:
    """What became of a row's run.

    Attributes:
        state: not run | running | done | other method.
        value: of the metric, at the end of the run; None unless done.
        note: how far it is, or where it departs from its recipe.
        folder: where it is; None: nowhere.
    """

    state: str
    value: float | None = None
    note: str = ""
    folder: Path | None = None


def run_folder(recipe: str, recipes: Path) -> str:
    """Where a recipe's run lies under the root of all runs: its output_dir without `output_dir/`.

    Raises:
        BadInput: it has none.
    """
    found = read_recipe(recipes / recipe).get("output_dir")
    if not isinstance(found, str):
        raise BadInput(f"recipe {recipe} has no output_dir, so its run cannot be found")
    return found.removeprefix("output_dir/")


def read_paper(path: Path, recipes: Path) -> list[PaperTable]:
    """The tables of a paper, checked.

    Args:
        path: a YAML file; recipes/papers/mae.yaml says what is in one.
        recipes: folder of the recipes.

    Raises:
        BadInput: unreadable, or keys that are not known.
    """
    given = read_yaml(path, str(path))
    try:
        tables = [
            PaperTable(
                given["paper"],
                table["title"],
                table["metric"],
                tuple(_row(row, path, recipes) for row in table["rows"]),
            )
            for table in given["tables"]
        ]
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path} holds no tables like recipes/papers/mae.yaml: {error!r}") from None
    for table in tables:
        if table.metric not in MEASURED_BY:
            raise BadInput(f"metric {table.metric!r} in {path}{nearest(table.metric, MEASURED_BY)}")
    return tables


def _row(given: Mapping[str, Any], path: Path, recipes: Path) -> PaperRow:
    for key in given:
        if key not in ROW_KEYS:
            raise BadInput(
                f"key {key!r} of row {given.get('name')!r} in {path}{nearest(key, ROW_KEYS)}"
            )
    run, pretrain = given.get("run"), given.get("pretrain")
    folder = before = None
    if run is not None:
        folder = before = run_folder(pretrain or run, recipes)
        if given.get("in", ".") != ".":
            folder = f"{folder}/{given['in']}"
    before = before if pretrain else None
    return PaperRow(
        given["name"], given.get("paper"), given.get("original"), pretrain, run, folder, before
    )


# ---- Runs --------------------------------------------------------------------------------------


def find_runs(roots: Sequence[Path]) -> list[Path]:
    """All run folders at or under the given ones.

    Raises:
        BadInput: no such folder.
    """
    found: dict[Path, None] = {}
    for root in roots:
        if not root.is_dir():
            raise BadInput(f"no folder {root}; give folders of runs with --runs")
        for file in sorted(root.rglob("metrics*.jsonl")):
            found[file.parent] = None
    return list(found)


def look_up(row: PaperRow, metric: str, runs: Sequence[Path], recipes: Path) -> FoundRun:
    """The run of a row among those found, and what it measured.

    A run belongs to a row by the end of its path, for example mae/pretrain_vit_base_1600/finetune;
    where its saved flags depart from the recipe, the note says so.
    """
    if row.run is None:
        return FoundRun("other method")
    if row.folder is None:
        return FoundRun("not run", note="its recipe is not here")
    task = MEASURED_BY[metric][1]
    folders = _folders(row.folder, runs)
    states = [found for f in folders if (found := _measured(f, task, metric, row, recipes))]
    if not states:
        return _pretraining(row, runs)
    best = min(states, key=lambda found: found.state != "done")
    others = _pretrained_otherwise(row, runs, recipes) if best.state == "done" else []
    return replace(best, note="; ".join([*filter(None, [best.note]), *others]))


def _pretraining(row: PaperRow, runs: Sequence[Path]) -> FoundRun:
    """How far the pretraining of a row is that has not been measured."""
    for folder in _folders(row.pretrained_in, runs):
        if (folder / METRICS).exists():
            epochs = [r["epoch"] for r in _records(folder / METRICS) if r["kind"] == "epoch"]
            return FoundRun("not run", note=f"pretraining did {max(epochs, default=-1) + 1} epochs")
    return FoundRun("not run")


def _pretrained_otherwise(row: PaperRow, runs: Sequence[Path], recipes: Path) -> list[str]:
    """Where the pretraining of a row departs from its recipe."""
    if row.pretrain is None:
        return []
    for folder in _folders(row.pretrained_in, runs):
        if (folder / SETTINGS).exists():
            settings = read_settings(folder / SETTINGS)
            changed = differences(read_recipe(recipes / row.pretrain), settings)
            return [f"pretraining: {text}" for text in changed]
    return ["its pretraining was not found"]


def _folders(end: str | None, runs: Sequence[Path]) -> list[Path]:
    """Those of the runs whose path ends so."""
    parts = Path(end).parts if end else ("",)
    return [run for run in runs if run.resolve().parts[-len(parts) :] == parts]


def _records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines()
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {error}") from None


def _measured(
    folder: Path, task: str, metric: str, row: PaperRow, recipes: Path
) -> FoundRun | None:
    """A run's last measurement; None: the folder holds no run of that task."""
    metrics, config = folder / f"metrics-{task}.jsonl", folder / f"config-{task}.yaml"
    if not metrics.exists() or not config.exists():
        return None
    settings = read_settings(config)
    evals = [r for r in _records(metrics) if r["kind"] == "eval" and metric in r]
    if not evals:
        return FoundRun("running", note="nothing measured yet", folder=folder)
    last = evals[-1]
    if progress := _unfinished(last, settings):
        return FoundRun("running", note=progress, folder=folder)
    assert row.run is not None
    changed = differences(read_recipe(recipes / row.run), settings)
    value = last.get(f"ema_{metric}", last[metric])  # averaged weights, where they are kept
    return FoundRun("done", float(value), "; ".join(changed), folder)


def _unfinished(last: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """How far a run was at its last measurement; empty: at its end."""
    epochs, iterations = settings.get("epochs"), settings.get("iterations")
    if epochs is not None and last.get("epoch") != epochs - 1:
        return f"epoch {last.get('epoch', 0) + 1} of {epochs}"
    if iterations is not None and last["step"] != iterations:
        return f"iteration {last['step']:,} of {iterations:,}"
    return ""


def differences(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Flags of a run that are not its recipe's, as texts."""
    return [
        f"{name} {settings.get(name)}, the recipe has {value}"
        for name, value in recipe.items()
        if name not in PLACES
        and _plain(settings.get(name)) != _plain(value)
        # Fine-tuning takes the model from the file, and --model only checks it.
        and not (name == "model" and settings.get(name) is None)
    ]


def _plain(value: Any) -> Any:
    """A value as YAML and as argparse give it, made comparable.

    1.0e-6 may be text, and a run saves the size 64 as 64x64.
    """
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool) or value is None:
        return value or None
    try:
        return float(value)
    except (TypeError, ValueError):
        text = str(value).lower()
        high, _, wide = text.partition("x")
        if high == wide and high.isdecimal():
            return float(high)
        return None if text == "none" else text


# ---- For the reader ----------------------------------------------------------------------------

Filled = Sequence[tuple[PaperTable, Sequence[FoundRun]]]


def markdown(filled: Filled) -> str:
    """The tables: the paper's column, ours, and what is to be said of ours."""
    lines: list[str] = []
    paper = ""
    for table, founds in filled:
        if table.paper != paper:
            lines += [f"## {table.paper}", ""]
            paper = table.paper
        lines += [
            f"**{table.title}** ({table.metric})",
            "",
            "| | paper | ours | |",
            "|---|---|---|---|",
        ]
        for row, found in zip(table.rows, founds, strict=True):
            ours = "" if found.state == "other method" else found.state
            if found.value is not None:
                ours = f"**{found.value:.{DIGITS[table.metric]}f}**"
            notes = [note for note in (row.original, found.note) if note]
            printed = "unknown" if row.paper is None else f"{row.paper:g}"
            cells = [row.name, printed, ours, "; ".join(notes)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def to_csv(filled: Filled) -> str:
    """One line a row, for a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["paper", "table", "row", "metric", "published", "ours", "state", "folder", "note"]
    )
    for table, founds in filled:
        for row, found in zip(table.rows, founds, strict=True):
            notes = "; ".join(note for note in (row.original, found.note) if note)
            writer.writerow(
                [table.paper, table.title, row.name, table.metric, row.paper, found.value,
                 found.state, found.folder or "", notes]
            )  # fmt: skip
    return text.getvalue()


def commands(row: PaperRow, metric: str, recipes: Path) -> list[str]:
    """The commands that make a row, in order, on one node of 8 GPUs; none: no system of ours."""
    if row.run is None or row.folder is None:
        return []
    start = "torchrun --nproc_per_node 8"
    made = []
    folder = f"output_dir/{row.folder}"
    if row.pretrain is not None:
        made.append(f"{start} main_pretrain.py --config recipes/{row.pretrain} --data_path DATA")
        more = (
            f" --finetune output_dir/{row.pretrained_in}/checkpoint-last.pth --output_dir {folder}"
        )
    else:
        more = ""
    made.append(
        f"{start} {MEASURED_BY[metric][0]}.py --config recipes/{row.run} --data_path DATA{more}"
    )
    return made
