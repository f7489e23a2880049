"""One run of each training main, whole and stopped, whose checkpoint holds no key at its default.

The same story for all: three epochs of 22 images. It starts with batches of 6 and is stopped after
4 steps. It goes on with batches of 4 (`--allow_changes`), so epoch 1 is steps 3 to 7 and epoch 2
steps 8 to 12 of a timeline that was moved. Log lines come every 4 steps. It is stopped again after
step 10: in the middle of the last epoch, and of a log interval.

- Step 9 overflows in fp16: its update is left out, and the loss scale falls.
- `BROKEN` are images that cannot be decoded. With seed 0, epoch 2 leaves out 9, which an earlier
  epoch has met; 11 comes in step 8, which a log line has; 2 for the first time in step 10, which
  none has when the run is stopped; 18 for the first time after it.
- The measurement after the second epoch is the best, those before and after it are worse.
"""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
import main_segment
import models_zoo
from util.data.images import BadImage
from util.errors import EXIT_STOPPED
from util.train.agreement import Wish
from util.train.checkpoint import BEST, LAST, load_file
from util.train.logger import MACHINE, StepReport
from util.train.run import Run, named

IMAGES, BROKEN, FOUND = 22, (2, 9, 11, 18), (2, 9, 11)
FIRST_STOP, EDGE, STOP, END = 4, 7, 10, 12
# Percent, by the step after which it is measured.
SCORES = {3: 40.0, 6: 45.0, 7: 70.0, 9: 70.0, 12: 30.0}
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A training main with flags that make it tiny.

    Attributes:
        edge: a step at which a log interval is not over, but an epoch, or what a segmenter has in
            its place: the way to the next measurement.
    """

    module: Any
    task: str
    flags: list[str]
    edge: int = EDGE


COMMON = ["--num_workers=0", "--device=cpu", "--log_every=4"]
JOBS = {
    "pretrain": Job(
        main_pretrain,
        "pretrain",
        ["--dataset=synthetic", "--in_chans=1", "--model=mae_vit_micro_patch8", "--input_size=16",
         f"--train_images={IMAGES}", "--epochs=3", "--warmup_epochs=1", "--blr=2e-2",
         "--precision=fp16", "--target=pca", "--pca_components=4", "--pca_patches=64",
         "--avg_temperature=0", "--picture_every=0", "--eval_every=1", "--eval_images=2",
         "--save_every=1", *COMMON],
    ),
    "finetune": Job(
        main_finetune,
        "finetune",
        ["--dataset=synthetic", "--in_chans=1", "--model=vit_micro_patch8", "--input_size=16",
         f"--train_images={IMAGES}", "--val_images=4", "--epochs=3", "--warmup_epochs=1",
         "--blr=2e-2", "--precision=fp16", "--ema_decay=0.9", "--drop_path=0.1", "--mixup=0.8",
         "--layer_decay=0.5", "--eval_every=1", "--save_every=1", *COMMON],
    ),
    "probe": Job(
        main_finetune,
        "finetune",
        ["--dataset=synthetic", "--in_chans=1", "--model=vit_micro_patch8", "--input_size=16",
         f"--train_images={IMAGES}", "--val_images=4", "--epochs=3", "--warmup_epochs=1",
         "--blr=2", "--tune=linear", "--eval_every=1", "--save_every=1", *COMMON],
    ),
    "segment": Job(
        main_segment,
        "segment",
        ["--dataset=folder", "--model=vit_micro_patch8", "--input_size=16", "--resize", "24", "16",
         "--window=16", "--stride=16", "--channels=4", "--aux_channels=4",
         f"--train_images={IMAGES}", "--val_images=2", "--iterations=12", "--blr=1e-2",
         "--warmup_iterations=2", "--precision=fp16", "--pictures=0", "--eval_every=3",
         "--save_every=3", *COMMON],
        edge=9,
    ),
}  # fmt: skip


# ---- What is made small, broken or certain ------------------------------------------------------


class Holes:
    """A data set of which some images cannot be decoded."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        if index in BROKEN:
            raise BadImage(self.source.file_name(index), "broken for this test")
        return self.source[index]


def smaller(registry: dict[str, Any], name: str, depth: int, patch: pytest.MonkeyPatch) -> None:
    """Give a model of the registry 16 channels, and few blocks."""
    build, arguments = registry[name]
    sizes = {"embed_dim": 16, "depth": depth, "num_heads": 2}
    if "decoder_depth" in arguments:
        sizes |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    patch.setitem(registry, name, (build, arguments | sizes))


def scaler(*rest: Any, **named: Any) -> torch.amp.GradScaler:
    """One that lets the ninth step overflow: after eight good ones it grows to 2 ** 40."""
    return _Scaler(
        *rest, init_scale=2.0**10, growth_factor=2.0**30, backoff_factor=2.0**-31,
        growth_interval=8, **named,
    )  # fmt: skip


_Scaler = torch.amp.GradScaler


@contextmanager
def small_world(job: Job) -> Iterator[None]:
    """Tiny models, broken images, scripted scores; inside, a run is what the module says."""
    with pytest.MonkeyPatch.context() as patch:
        # A segmenter takes four blocks.
        smaller(
            models_zoo.CLASSIFIERS, "vit_micro_patch8", 4 if job.task == "segment" else 1, patch
        )
        smaller(models_zoo.MODELS, "mae_vit_micro_patch8", 1, patch)
        patch.setattr(torch.amp, "GradScaler", scaler)
        patch.setattr(os, "fsync", lambda handle: None)  # a busy disk takes seconds for each
        open_set = job.module.open_set

        def opened(args: Any, split: str, *rest: Any) -> Any:
            source = open_set(args, split, *rest)
            return Holes(source) if split == "train" else source

        patch.setattr(job.module, "open_set", opened)
        script_scores(job, patch)
        yield


def script_scores(job: Job, patch: pytest.MonkeyPatch) -> None:
    """Measurements that go up and down again, whatever was learnt."""
    if job.task == "pretrain":
        return  # it has no best one
    done, save, enter, measurement = [0], Run.save, Run.__enter__, job.module.measurement

    def entered(self: Run) -> Run:
        done[0] = self.step
        return enter(self)

    def saved(self: Run, step: int, *rest: Any) -> None:
        done[0] = step
        save(self, step, *rest)

    def measured(*rest: Any) -> Callable:
        measure = measurement(*rest)

        def scored(model: Any) -> Any:
            result, score = measure(model), SCORES.get(done[0], 20.0)
            if job.task == "segment":
                return replace(result, miou=score)
            right = torch.diag(torch.tensor([int(score), 0, 0]))
            return replace(result, images=100, confusion=right)

        return scored

    patch.setattr(Run, "__enter__", entered)
    patch.setattr(Run, "save", saved)
    patch.setattr(job.module, "measurement", measured)


def write_pairs(root: Path) -> None:
    """A segmentation set in the layout `folder`."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 2)):
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (16, 20, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"images/{i:02d}.png")
            label = rng.integers(0, 3, (16, 20), np.uint8)
            Image.fromarray(label).save(root / split / f"masks/{i:02d}.png")


# ---- Runs ---------------------------------------------------------------------------------------


@contextmanager
def stopping(step: int) -> Iterator[None]:
    """Runs inside are asked to stop after a step."""
    after_step = Run.after_step

    def asked(self: Run, report: StepReport) -> bool:
        if report.step == step:
            self.agreement.after_step = lambda: Wish(stop=signal.SIGTERM)
        return after_step(self, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "after_step", asked)
        yield


@contextmanager
def keeping(step: int, target: Path) -> Iterator[None]:
    """Copy the folder of a run when a step's checkpoint says that its measurement is due."""
    save = Run.save

    def saved(self: Run, done: int, stage: str, *rest: Any) -> None:
        save(self, done, stage, *rest)
        if (done, stage) == (step, "measuring"):
            copy(self.folder, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", saved)
        yield


@contextmanager
def noting_start(found: list[dict[str, Any]]) -> Iterator[None]:
    """The state that a run begins with, as it would save it."""
    enter = Run.__enter__

    def entered(self: Run) -> Run:
        result = enter(self)
        state = {
            "epoch": 0, "stage": "training", "step": 0, "log_bytes": 0,
            "sums": self.step_log.state(), "bad_images": [], "timeline": {
                "steps_per_epoch": IMAGES // 4, "first": 0, "start": 0,
            },
        }  # fmt: skip
        found.append(deepcopy(state | self.snapshot()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "__enter__", entered)
        yield


def copy(folder: Path, target: Path) -> Path:
    """A run folder without its lease."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns(".*")))


@dataclass
class Ended:
    """How a start of a command ended.

    Attributes:
        code: its exit code; None: with an exception of ours to mend, which `said` ends with.
        said: what it printed.
    """

    code: int | None
    said: str


@dataclass
class Story:
    """The run of a job, from beginning to end.

    Attributes:
        whole: folder of the run that was stopped once, at `FIRST_STOP`.
        stopped: of the one that was stopped at `STOP` as well.
        at_edge: of the one that was stopped at the job's edge instead.
        measuring: of the whole one, when its last measurement was due.
        fresh: the state that a run begins with.
    """

    job: Job
    root: Path
    fresh: dict[str, Any] = field(default_factory=dict)
    references: dict[Any, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole, self.stopped, self.at_edge, self.measuring = (
            self.root / name for name in ("whole", "stopped", "at_edge", "measuring")
        )
        self.more = []
        if self.job.task == "segment":
            write_pairs(self.root / "pairs")
            self.more = [f"--data_path={self.root / 'pairs'}"]
        before, starts = self.root / "before", list[dict[str, Any]]()
        with noting_start(starts), stopping(FIRST_STOP):
            ended = self.start(before, "--batch_size=6")
        assert ended.code == EXIT_STOPPED, ended.said
        self.fresh = starts[0]
        for folder, stop in (
            (self.whole, END + 1), (self.stopped, STOP), (self.at_edge, self.job.edge),
        ):  # fmt: skip
            copy(before, folder)
            with stopping(stop), keeping(END, self.measuring if stop > END else folder / "unused"):
                ended = self.start(folder, "--batch_size=4", "--allow_changes")
            assert ended.code == (0 if stop > END else EXIT_STOPPED), ended.said

    def start(self, folder: Path, *flags: str) -> Ended:
        """Start the command in a folder, as a user would."""
        out = StringIO()
        argv = [*self.job.flags, *self.more, "--batch_size=4", f"--output_dir={folder}", *flags]
        with small_world(self.job), redirect_stdout(out), redirect_stderr(out):
            try:
                self.job.module.main(argv)
                code: int | None = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
            except Exception as error:
                return Ended(None, f"{out.getvalue()}{type(error).__name__}: {error}")
        return Ended(code, out.getvalue())

    def state(self, folder: Path) -> dict[str, Any]:
        """The last checkpoint of a folder, each key its own: a file keeps equal objects once."""
        state = load_file(folder / LAST)
        return {key: deepcopy(value) for key, value in state.items()}

    def outcome(self, folder: Path) -> Outcome:
        """All that a run leaves, by name."""
        found: Outcome = dict(flat(self.state(folder)))
        log = folder / named("metrics.jsonl", self.job.task)
        records = [json.loads(line) for line in log.read_text().splitlines()]
        # The numbers of the machine have any number of digits.
        assert found.pop("log_bytes") == log.stat().st_size
        for record in records:
            kind = f"records.{record['kind']}"
            kept = {k: v for k, v in record.items() if k not in (*MACHINE, "checkpoint")}
            found.setdefault(kind, []).append(kept)
        for path in folder.rglob("*"):
            if path.suffix in (".json", ".yaml", ".txt", ".csv") and "log-rank" not in path.name:
                text = path.read_text()
                found[path.name] = text.replace(str(folder), "FOLDER")
        if (folder / BEST).exists():
            found["checkpoint-best"] = load_file(folder / BEST)["step"]
        return found

    def reference(self, place: str, flags: tuple[str, ...]) -> Outcome:
        """What a run comes to that goes on from `place` with nothing left out."""
        if (place, flags) not in self.references:
            folder = copy(getattr(self, place), self.root / f"reference-{len(self.references)}")
            only_last(folder)
            ended = self.start(folder, *flags)
            assert ended.code == 0, ended.said
            self.references[place, flags] = self.outcome(folder)
        return self.references[place, flags]


def only_last(folder: Path) -> None:
    """Remove the numbered checkpoints: with them a run may find another way."""
    for path in folder.glob("checkpoint-[0-9]*.pth"):
        path.unlink()


# ---- States, key by key -------------------------------------------------------------------------


SUMS = ("sums.epoch", "sums.recent")


def flat(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a state and their paths, joined by dots.

    Sums are lists of several meters, and so are groups of an optimiser. Other lists are leaves.
    """
    if isinstance(state, dict) and state:
        for key, value in state.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(state, list) and state and (path in SUMS or type(state[0]) is dict):
        for number, value in enumerate(state):
            yield from flat(value, f"{path}.{number}")
    else:
        yield path, state


def same(a: Any, b: Any) -> bool:
    """Whether two leaves are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return (
            isinstance(a, torch.Tensor)
            and isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and torch.equal(a, b)
        )
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b


def differing(a: Outcome, b: Outcome) -> set[str]:
    """Names whose values are not the same, or that one of them lacks."""
    return {k for k in a.keys() | b.keys() if not (k in a and k in b and same(a[k], b[k]))}


def put(state: Any, path: str, value: Any) -> None:
    """Set a leaf of a state by its path; keys may hold dots themselves."""
    if isinstance(state, list):
        first, _, rest = path.partition(".")
        key: Any = int(first)
    else:
        key = next(k for k in state if path == str(k) or path.startswith(f"{k}."))
        rest = path[len(str(key)) + 1 :]
    if rest:
        put(state[key], rest, value)
    else:
        state[key] = value
