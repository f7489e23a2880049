"""What the flags of every training main do alike, for the tables over each of them."""

import difflib
import importlib
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from every_flag import (
    Command,
    Row,
    Table,
    Trace,
    Watched,
    check_complete,
    digest,
    rows_of,
)

import eval_pretrain
import eval_segment
from util.data.randomness import Key
from util.train import session
from util.train.checkpoint import LAST, load_file
from util.train.dist import Processes


@dataclass
class Runner(Command):
    """Runs a training main, a tiny one.

    Attributes:
        metrics: name of the file of records.
    """

    metrics: str = "metrics.jsonl"

    def check(self, row: Row) -> tuple[Trace, Trace]:
        """As of any command; and what changes the weights is among what a resume looks at."""
        before, after = super().check(row)
        if "weights" in row.changes.split() and not row.free:
            assert before["agree"] != after["agree"], (
                f"{row.flags} changes the weights, and a resume would not find it changed"
            )
        return before, after

    def __call__(self, *words: str, folder: Path | None = None, without: str = "") -> Trace:
        before = tf32()
        try:
            return super().__call__(*words, folder=folder, without=without)
        finally:  # a run sets these for its process
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

    def read(self, root: Path, trace: Trace) -> None:
        """Records and the last checkpoint."""
        text = "".join(path.read_text() for path in root.rglob(self.metrics))
        records = [json.loads(line) for line in text.splitlines()]
        trace["log"] = [r["step"] for r in records if r["kind"] == "train"]
        measured = [r for r in records if r["kind"] == "eval"]
        trace["measured"] = digest([{k: v for k, v in r.items() if k != "time"} for r in measured])
        last = list(root.rglob(LAST))
        if "start" in trace and last:
            state = load_file(last[0])
            trace["weights"] = digest(state["model"])
            trace["averages"] = digest(state.get("ema"))
            trace["agree"] = state["arithmetic"]  # what a resume must find unchanged

    def watch(self, patch: pytest.MonkeyPatch, trace: Trace) -> None:
        """The loop's arguments, its batches, masks and rates, and what is saved."""
        module = importlib.import_module(self.name)
        loop = module.train_steps
        lists: dict[str, list[Any]] = {name: [] for name in ("images", "which", "masks", "rates")}

        def batch(given: dict[str, Any]) -> None:
            lists["which"].append(given["index"].tolist())
            lists["images"].append(digest([given["x"], given["y"], given.get("extent")]))

        def watched(model: Any, loader: Any, step: Any, loss: Any, *rest: Any, **more: Any) -> Any:
            if "start" not in trace:
                trace.update(at_start(model, loader, step, loss))
            if hasattr(loss, "masker"):
                masker = Watched(loss.masker, lambda mask: lists["masks"].append(digest(mask)))
                loss = replace(loss, masker=masker)
            after = more["after_step"]

            def after_step(report: Any) -> bool:
                lists["rates"].append(float(f"{report.lr:.9g}"))
                return after(report)

            more["after_step"] = after_step
            try:
                return loop(model, Watched(loader, batch), step, loss, *rest, **more)
            finally:
                trace.update({name: list(found) for name, found in lists.items()})

        def saved(folder: Path, state: Any, epoch: int | None = None, keep: int = 0) -> Any:
            trace.setdefault("saves", []).append((state["step"], state["stage"], epoch))
            return save(folder, state, epoch, keep)

        patch.setattr(module, "train_steps", watched)
        run = importlib.import_module("util.train.run")
        save = run.ckpt.save_checkpoint
        patch.setattr(run.ckpt, "save_checkpoint", saved)
        for name, word in (("distribute", "compiled"), ("Placed", "shard")):
            patch.setattr(session, name, switched_off(getattr(session, name), word, trace))
        held = trace["held"] = []  # what is measured or shown, in this order

        def noted(loader: Any) -> None:
            held.append(names_of(loader))

        measures = {"main_segment": eval_segment, "main_pretrain": eval_pretrain}.get(
            self.name, module
        )
        for name, note in (
            ("eval_loader", noted),
            ("held_out_set", lambda part: noted(part.loader)),
        ):
            if hasattr(measures, name):
                patch.setattr(measures, name, Watched(getattr(measures, name), note))


def names_of(loader: Any) -> list[str]:
    """The images that a loader is for, each as CLASS/NAME."""
    source = loader.dataset.samples.source
    chosen = getattr(loader.batch_sampler, "indices", range(len(source)))
    return ["/".join(Path(source.file_name(i)).parts[-2:]) for i in chosen]


def check_evenly(runner: Runner) -> None:
    """--train_images 8 of the 12, and those of every class alike."""
    whole, some = (runner.baseline(flags)["source"] for flags in ("", "--train_images=8"))
    assert len(whole) == 12 and some == [whole[i] for i in (0, 1, 3, 4, 6, 7, 9, 10)]


def check_samples_follow_the_seed(runner: Runner) -> None:
    """Augmentation and noise of one key; another order of the images is not enough."""
    one, other = runner.baseline(), runner.baseline("--seed=1")
    assert one["view"] != other["view"] and one["view"] == runner.baseline("--log_every=1")["view"]


COSTS: dict[str, Any] = {}


def counted_once(count_step: Callable[..., Any]) -> Callable[..., Any]:
    """The cost of a step, of the same model and settings counted once: most flags change neither.

    A difference that the key misses would leave a line of the plan as it was, which a table sees.
    """

    def counted(model: Any, loss: Any, **settings: Any) -> Any:
        shapes = [(n, tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()]
        plain = {k: v for k, v in vars(model).items() if isinstance(v, int | float | str | tuple)}
        told = (type(model), shapes, plain, repr(model), repr(loss), sorted(settings.items()))
        key = digest(repr(told))
        if key not in COSTS:
            COSTS[key] = count_step(model, loss, **settings)
        return COSTS[key]

    return counted


def check_plan(base: Runner, table: Table, planned: str, sizes: str) -> None:
    """The parts of a dry run's plan that each flag of the table changes are those, and no others.

    Args:
        planned: a line for each flag: its name, a colon, and the first words of the plan's lines
            that it changes; a flag that changes none has no line.
        sizes: words for a run that is large enough for its plan to tell.
    """
    given = {word.split("=")[0] for word in sizes.split()}
    words = [word for word in base.base if word.split("=")[0] not in given]
    plan = replace(base, base=[*words, *sizes.split()], root=base.root / "plan", kept={})
    plan.root.mkdir()
    found: dict[str, set[str]] = {}
    module = importlib.import_module(base.name.replace("main_", "plan_"))
    for name, row in rows_of(table):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "count_step", counted_once(module.count_step))
            before = plan.baseline(f"--dry_run {row.beside}", row.without)
            after = plan(f"--dry_run {row.beside}", row.flags, without=row.without)
        if after["ends"]:  # refused: no plan, and the run's own row has it
            continue
        # Columns are as wide as their widest word; the first lines are of the data's folders.
        one, two = ({" ".join(line.split()) for line in t["said"]} for t in (before, after))
        parts = {line.split()[0].rstrip(":,") for line in one ^ two if line and line[0] != "/"}
        if parts:
            found.setdefault(name.split()[0], set()).update(parts)
    lines = [f"{name}: {' '.join(sorted(parts))}" for name, parts in sorted(found.items())]
    # A long line goes on after a plus.
    joined = " ".join(planned.split()).replace(" + ", " ")
    expected = [f"--{line.strip()}" for line in joined.split("--")[1:]]
    assert lines == expected, "\n".join(difflib.ndiff(expected, lines))


def check_held_out_evenly(runner: Runner, measured: str, limit: str) -> None:
    """Three of the six that are held out, or four, evenly spaced."""
    whole = runner.baseline(measured)["held"][0]
    for count, places in ((3, (0, 2, 4)), (4, (0, 1, 3, 4))):
        some = runner.baseline(f"{measured} {limit.format(count)}")["held"][0]
        assert len(whole) == 6 and some == [whole[i] for i in places]


def switched_off(whole: Any, word: str, trace: Trace) -> Any:
    """A function that is called without a switch, which is noted: compiling takes a minute."""

    def called(*rest: Any, **more: Any) -> Any:
        trace[word] = bool(more.get(word))
        return whole(*rest, **more | {word: False})

    return called


def at_start(model: Any, loader: Any, step: Any, loss: Any) -> Trace:
    """What there is before the first step."""
    groups = [
        (g["weight_decay"], g.get("lr_scale", 1.0), g.get("betas"))
        for g in step.optimizer.param_groups
    ]
    checkpointing = [
        m.grad_checkpointing for m in model.modules() if hasattr(m, "grad_checkpointing")
    ]
    return {
        "source": names_of(loader),
        "draws": getattr(loss, "seed", None),
        # Of one key whatever the order, so that it follows the seed of the samples alone.
        "view": digest(loader.dataset.samples[Key(0, 0, 0)]),
        "start": digest(model.state_dict()),
        "learns": sorted(n for n, p in model.named_parameters() if p.requires_grad),
        "optimizer": (type(step.optimizer).__name__, sorted(set(map(repr, groups)))),
        "precision": step.precision,
        "loader": (loader.num_workers, loader.prefetch_factor, loader.pin_memory),
        "recomputes": any(checkpointing),
        "tf32": tf32(),
        "statistics": (tuple(loss.mean), tuple(loss.std)),
    }


def tf32() -> tuple[bool, bool]:
    """Whether this process may use TF32, in matrix products and convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


class Enough(Exception):
    """A run has come to what a test asks of it."""


# The course of the learning rate, alike in the mains that count epochs.
FALLS = "--schedule=steps --decay_epochs 1"
SCHEDULE: dict[str, Row | list[Row]] = {
    "--schedule": [
        Row("--schedule=full_cosine", "rates weights"),
        Row(FALLS, "rates weights"),
    ],
    "--warmup_lr": Row("--warmup_lr=0.001", "rates weights"),
    "--decay_epochs": Row("--decay_epochs 1 1.2", "rates weights", FALLS),
    "--decay_rate": Row("--decay_rate=0.5", "rates weights", FALLS),
    "--lr_batch": Row("--lr_batch=64", "rates weights", "--min_lr=0.001"),
}
# A dry run and what it assumes, alike in all mains that plan.
DRY_RUN: dict[str, Row] = {
    "--dry_run_images": Row("--dry_run_images=4321", "said", "--dry_run", "4,321"),
    "--dry_run_processes": Row("--dry_run_processes=2", "said", "--dry_run", "2 processes"),
    "--images_per_second": Row("--images_per_second=0.5", "said", "--dry_run"),
}


def check_dry_run(runner: Command) -> None:
    """It writes nothing, and says what a run is."""
    trace = runner("--dry_run")
    assert trace["ends"] == 0 and not trace["files"] and "start" not in trace
    assert "dry run" in trace["text"]


def check_dry_run_measure(runner: Runner) -> None:
    """So many steps are measured: the plan then tells a rate and the hours."""
    before, after = runner("--dry_run"), runner("--dry_run", "--dry_run_measure=1")
    assert after["ends"] == 0 and "images/s" in after["text"] and after["text"] != before["text"]


def check_list_models(runner: Runner, name: str) -> None:
    """The names alone."""
    trace = runner("--list_models")
    assert trace["ends"] == 0 and not trace["files"] and "start" not in trace
    assert name in trace["text"].split()


def check_device(runner: Command) -> None:
    """The name is looked at: there are none but those of `DEVICES`."""
    trace = runner("--device=meta")
    assert trace["ends"] == 2 and "--device meta cannot be computed on" in trace["text"]


def check_nan_policy(runner: Runner, blows_up: str) -> None:
    """After numbers that are not finite, stop ends the run and skip goes on."""
    stop, skip = runner(blows_up), runner(blows_up, "--nan_policy=skip")
    assert stop["ends"] == 1 and "finite" in stop["text"]
    assert skip["ends"] == 0 and any("checkpoint-last" in name for name in skip["files"])


def check_bad_images(runner: Runner, beside: str = "") -> None:
    """One image is too large: one more than allowed ends the run."""
    words = f"--max_pixels=2200 {beside}"
    few, none = (runner(words, f"--max_bad_images={n}") for n in (1, 0))
    assert few["ends"] == 0 and none["ends"] == 1 and "--max_bad_images" in none["text"]


def check_resume(runner: Runner, longer: str, tmp_path: Path) -> None:
    """auto goes on in the folder, none starts anew elsewhere, a path is another run's."""
    whole = runner(folder=tmp_path)
    again = runner(folder=tmp_path)
    assert "start" not in again and "nothing is left to train" in again["text"]
    refused = runner("--resume=none", folder=tmp_path)
    assert refused["ends"] == 2 and "--resume" in refused["text"]
    last = tmp_path / "run" / "checkpoint-last.pth"
    other = runner(f"--resume={last} {longer} --allow_changes")
    assert other["ends"] == 0 and other["start"] == whole["weights"]


def check_allow_changes(runner: Runner, longer: str, tmp_path: Path) -> None:
    """Other numbers are refused by name unless they are allowed, and then they count."""
    whole = runner(folder=tmp_path)
    refused = runner(f"{longer} --weight_decay=0.3", folder=tmp_path)
    assert refused["ends"] == 2 and "weight_decay: was" in refused["text"]
    assert "start" not in refused
    changed = runner(f"{longer} --weight_decay=0.3 --allow_changes", folder=tmp_path)
    assert changed["ends"] == 0 and changed["start"] == whole["weights"]
    assert "weight_decay: was" in changed["text"]


def check_no_pin_mem(runner: Command, module: Any, beside: str = "--no-compile") -> None:
    """On a GPU batches are page-locked unless the flag is there: what the loader is asked for."""
    asked = []

    @contextmanager
    def gpu(*rest: Any) -> Any:
        yield Processes(0, 1, 0, 1, torch.device("cuda"))

    def build_loader(*rest: Any, pin_memory: bool, **more: Any) -> Any:
        asked.append(pin_memory)
        raise Enough

    for flags in ("", "--no_pin_mem"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "processes", gpu)
            patch.setattr(importlib.import_module("util.data.samples"), "Loader", build_loader)
            patch.setattr(torch.nn.Module, "to", lambda self, *rest, **more: self)
            with pytest.raises(Enough):
                runner(beside, flags)
    assert asked == [True, False]


class TrainingFlags:
    """Tests that every training main has; its file derives from them and brings a `runner`.

    Attributes:
        main: the module. model: a name that --list_models prints.
        table: of all its flags. planned, sizes: see `check_plan`.
        measured, limit: flags that measure while training, and that take fewer held-out images.
        longer: flags of a run that goes on after the first. blows_up: of one that ends in NaN.
        spared: flags beside --max_bad_images.
    """

    main: Any
    model: str
    table: Table
    planned: str
    sizes: str
    measured: str
    limit = "--val_images={}"
    longer = "--epochs=3"
    blows_up = "--lr=1e6 --warmup_epochs=0"
    spared = ""

    def test_every_flag_has_an_entry(self) -> None:
        own = type(self)
        check_complete(self.table, self.main.build_parser(), own.__module__, own)

    def test_fewer_images_are_evenly_spaced(self, runner: Runner) -> None:
        check_evenly(runner)
        check_held_out_evenly(runner, self.measured, self.limit)

    def test_samples_follow_the_seed(self, runner: Runner) -> None:
        check_samples_follow_the_seed(runner)

    def test_the_plan(self, runner: Runner) -> None:
        check_plan(runner, self.table, self.planned, self.sizes)

    def test_list_models(self, runner: Runner) -> None:
        check_list_models(runner, self.model)

    def test_no_pin_mem(self, runner: Runner) -> None:
        check_no_pin_mem(runner, self.main)

    def test_nan_policy(self, runner: Runner) -> None:
        check_nan_policy(runner, self.blows_up)

    def test_device(self, runner: Runner) -> None:
        check_device(runner)

    def test_bad_images(self, runner: Runner) -> None:
        check_bad_images(runner, self.spared)

    def test_resume(self, runner: Runner, tmp_path: Path) -> None:
        check_resume(runner, self.longer, tmp_path)

    def test_allow_changes(self, runner: Runner, tmp_path: Path) -> None:
        check_allow_changes(runner, self.longer, tmp_path)

    def test_dry_run(self, runner: Runner) -> None:
        check_dry_run(runner)

    def test_dry_run_measure(self, runner: Runner) -> None:
        check_dry_run_measure(runner)
