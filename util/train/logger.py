"""The run folder: resolved settings, metrics as JSON lines, TensorBoard, progress."""

import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from util.errors import BadInput, RunFailed
from util.files import AppendedFile, check_folder, sweep, write_text, writing
from util.float64 import widest
from util.progress import Progress, say
from util.train.bad_images import BadImages
from util.train.dist import Processes
from util.train.events import EventFile
from util.train.step import StepResult

METRICS = "metrics.jsonl"
# What a record says of the machine and not of the training.
MACHINE = ("images_per_s", "waiting", "memory_gb")
SETTINGS = "config.yaml"


def prepare_folder(folder: Path) -> None:
    """Make the folder of a command's output, and remove what killed writers left in it.

    Raises:
        BadInput: it cannot be made or written, or its name read again.
    """
    refuse_unreadable_name(folder)
    check_folder(folder)
    sweep(folder)


def refuse_unreadable_name(folder: Path) -> None:
    """Refuse a folder of results whose name torch and TensorBoard cannot encode.

    Raises:
        BadInput: bytes in it are no UTF-8.
    """
    if any("\ud800" <= char <= "\udfff" for char in str(folder)):  # see util.console
        raise BadInput(
            f"cannot write to folder {folder}: torch and TensorBoard open no name with bytes that "
            "are no UTF-8; rename it, or give another --output_dir or --log_dir"
        )


class RunLogger:
    """Writes the records of one run.

    Args:
        path: JSONL file.
        log_dir: where TensorBoard's events go; None: no events.
        first_step: optimiser steps done before this start; TensorBoard's later events are hidden.
        keep_bytes: of records written when the checkpoint was. Later ones are from a run that got
            further than its last checkpoint: they are dropped, so each step stands once.
        write: False in all processes but the main one, whose logger then does nothing.
        before_write: called before each record.
    """

    def __init__(
        self,
        path: Path,
        log_dir: Path | None,
        first_step: int = 0,
        *,
        keep_bytes: int = 0,
        write: bool = True,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.before_write = before_write
        self.path = path
        self.file: AppendedFile | None = None
        self.events: EventFile | None = None
        if write:
            with writing(path):
                self._drop_after(keep_bytes, first_step)
                self.file = AppendedFile(path)
        if write and log_dir is not None:
            refuse_unreadable_name(log_dir)
            with writing(log_dir):
                # TensorBoard hides events from purge_step on, so the first step not to hide is +1.
                self.events = EventFile(log_dir, purge_step=first_step + 1)

    def _drop_after(self, keep_bytes: int, first_step: int) -> None:
        """Cut off what was recorded after the checkpoint that the run goes on from.

        Says so if records of before are missing; the file then ends with its last whole line.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        content = b""
        if size:
            with self.path.open("rb") as file:
                content = file.read(keep_bytes)
        whole = content.rfind(b"\n") + 1
        if whole < size:
            os.truncate(self.path, whole)
        if whole < keep_bytes:
            say(
                f"{self.path} is shorter than when the checkpoint was written ({whole:,} of "
                f"{keep_bytes:,} bytes): records up to step {first_step} are missing at its end"
            )

    def size(self) -> int:
        """Bytes of records so far; a checkpoint remembers it. 0 in processes that do not write."""
        if self.file is None:
            return 0
        with writing(self.path):
            return self.file.size()

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One record: a JSON line, and a TensorBoard scalar for each number.

        Args:
            kind: train | epoch | eval | resume.
            step: optimiser steps done.

        Raises:
            CannotWrite: the JSON line cannot be written. Without TensorBoard's file a run goes on.
        """
        if self.file is None:
            return
        self.before_write()
        # JSON has no NaN; a reader of the log must see that the value was not a number.
        safe = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        with writing(self.path):
            self.file.write((json.dumps({"kind": kind, "step": step, **safe}) + "\n").encode())
        with self._events() as events:
            for name, value in values.items():
                if events is not None and isinstance(value, int | float):
                    events.scalar(f"{kind}/{name}", value, step)

    def picture(self, name: str, step: int, image: np.ndarray) -> None:
        """A picture for TensorBoard: uint8 [H, W, 3]."""
        with self._events() as events:
            if events is not None:
                events.picture(name, image, step)

    @contextmanager
    def _events(self) -> Iterator[EventFile | None]:
        """TensorBoard's file, until it fails: that is said once."""
        try:
            yield self.events
        except OSError as error:
            assert self.events is not None
            path, self.events = self.events.path, None
            say(
                f"cannot write {path}: {error.strerror}; going on without TensorBoard, all "
                f"records are in {self.path}"
            )

    def close(self) -> None:
        """Close the files; also when the run has failed."""
        if self.file is not None:
            with writing(self.path):
                self.file.close()
        with self._events() as events:
            if events is not None:
                events.close()


def save_settings(path: Path, settings: dict[str, Any]) -> None:
    """The resolved settings of a run, readable as a recipe."""
    write_text(path, yaml.safe_dump(settings))


@dataclass(frozen=True)
class StepReport:
    """One step, as the log takes it in; nothing in it makes the device wait.

    Attributes:
        step: optimiser steps done, this one included.
        result: on the device.
        lr: of this step.
        waited: seconds spent waiting for data.
        indices: of this process's images, by micro-step; on the CPU.
        bad: indices of images that could not be decoded, of this process.
    """

    step: int
    result: StepResult
    lr: float
    waited: float
    indices: list[Tensor]
    bad: list[int]


FAULTS = 5  # the place of the steps that were not finite among the sums of a StepLog


class StepLog:
    """Collects what steps compute and reads it only at log lines, so that the device never waits.

    Args:
        logger: takes the log lines.
        folder: run folder, for what is dumped of steps that were not finite.
        last_good: the checkpoint that the same command would go on from, None: there is none.
        procs: the processes.
        every: steps between log lines.
        global_batch: images per step, for images/s.
        nan_policy: stop | skip after a step that was not finite; its update is left out anyway.
        bad_images: takes in which images could not be decoded.
        bar: progress of the run.
    """

    def __init__(
        self,
        logger: RunLogger,
        folder: Path,
        procs: Processes,
        *,
        every: int,
        global_batch: int,
        nan_policy: str,
        bad_images: BadImages,
        last_good: Callable[[], Path | None],
        bar: Progress,
    ) -> None:
        self.logger, self.folder, self.procs, self.bar = logger, folder, procs, bar
        self.bad_images, self.last_good = bad_images, last_good
        self.every, self.global_batch, self.nan_policy = every, global_batch, nan_policy
        # Sums of loss, steps with a finite loss, gradient norm, steps with a finite one, updates
        # left out, faults (`FAULTS`): since the last log line, and over the epoch.
        self.recent = torch.zeros(6, dtype=widest(procs.device), device=procs.device)
        self.epoch = torch.zeros_like(self.recent)
        # Since the last log line: seconds waited for data, and of training until `since`.
        self.waited, self.trained, self.since = 0.0, 0.0, time.perf_counter()
        self.history: list[StepReport] = []
        self.reported = 0  # steps of the history whose faults are told already
        self.latest: tuple[int, float] | None = None  # step and lr of what no log line has yet

    def __call__(self, report: StepReport) -> None:
        """Take in one step; every so many, write a log line, which is a collective."""
        r = report.result
        fine, usable = r.loss.isfinite(), r.grad_norm.isfinite()
        zero = torch.zeros_like(r.loss)
        loss, norm = r.loss.where(fine, zero), r.grad_norm.where(usable, zero)
        values = torch.stack([loss, fine, norm, usable, r.skipped, r.broken])
        self.recent += values
        self.epoch += values
        self.waited += report.waited
        self.bad_images.note(report.bad)
        self.history.append(report)
        self.latest = report.step, report.lr
        self._count_time()
        self.bar.update()
        if report.step % self.every == 0:
            self.flush()

    def flush(self) -> None:
        """Write a log line of the steps since the last one. A collective.

        Raises:
            RunFailed: a loss or gradient among them was not finite, and the policy is to stop; on
                all processes, with what is known of it in the run folder.
        """
        if self.latest is None:
            return
        (step, lr), self.latest = self.latest, None
        bad_images = self.bad_images.agree()
        totals = self.procs.sum(self.recent).tolist()
        loss, loss_steps, norm, norm_steps, skipped, broken = totals
        self._count_time()  # now that the device is done
        seconds = self.trained
        values = {
            "loss": loss / loss_steps if loss_steps else math.nan,
            "lr": lr,
            "grad_norm": norm / norm_steps if norm_steps else math.nan,
            "images_per_s": len(self.history) * self.global_batch / seconds,
            "waiting": self.waited / seconds,
            "memory_gb": peak_memory(self.procs.device) / 2**30,
        }
        if bad_images:
            values["bad_images"] = bad_images
        if skipped:
            values["skipped"] = round(skipped / self.procs.world_size)
        self.logger.record("train", step, **values)
        self.bar.report(values["loss"], lr, values["images_per_s"])
        untold = self.history[self.reported :]
        self.history, self.reported = [], 0
        self.recent.zero_()
        self.waited, self.trained = 0.0, 0.0
        self.restart_clock()
        if broken:
            self._report_broken(untold)

    def report_pending(self) -> None:
        """Report steps that were not finite and have no log line yet. A collective.

        Before each checkpoint: this start alone knows their images. And where the policy is to
        stop, each start from a checkpoint of after such a step would end for it again.

        Raises:
            RunFailed: see `flush`.
        """
        if self.latest is None:
            return
        faults = self.procs.sum(self.recent)[FAULTS].item()
        self._count_time()  # the device is done with the steps
        if faults:
            self._report_broken(self.history[self.reported :])
            self.reported = len(self.history)
            self.recent[FAULTS] = 0

    def _report_broken(self, history: list[StepReport]) -> None:
        """Dump the steps that were not finite, and stop if that is the policy."""
        mine = [h for h in history if h.result.broken.item()]
        steps = sorted({s for theirs in self.procs.gather([h.step for h in mine]) for s in theirs})
        last_good = self.last_good()
        for h in mine:
            path = self.folder / f"nonfinite-step{h.step}-rank{self.procs.rank}.json"
            dump = {
                "step": h.step,
                "rank": self.procs.rank,
                "lr": h.lr,
                "loss": str(h.result.loss.item()),
                "grad_norm": str(h.result.grad_norm.item()),
                "indices": [indices.tolist() for indices in h.indices],
                "last_good_checkpoint": str(last_good) if last_good else None,
            }
            write_text(path, json.dumps(dump, indent=1))
        text = (
            f"loss or gradient was not finite in step {', '.join(map(str, steps))}; the update was "
            f"left out on every process; images and rates are in {self.folder}/nonfinite-*.json"
        )
        if self.nan_policy == "stop":
            again = "goes on from the last checkpoint"
            if last_good is None:
                again = "starts anew, for there is no checkpoint yet"
            raise RunFailed(
                f"{text}. The same command {again}; lower --blr or set --clip_grad, or choose "
                "--nan_policy skip"
            )
        if self.procs.main:
            say(text)

    def end_epoch(self) -> float:
        """The mean loss over the epoch and all processes; starts the next epoch. A collective."""
        self.flush()
        loss, steps = self.procs.sum(self.epoch).tolist()[:2]
        self.epoch.zero_()
        self.restart_clock()
        return loss / steps if steps else math.nan

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.trained, self.since = self.trained + now - self.since, now

    def restart_clock(self) -> None:
        """What was done since the last step (saving, measuring) is not training time."""
        self.since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """The sums of the partial epoch and log interval, for a checkpoint. A collective."""
        sums = {"epoch": self.epoch, "recent": self.recent}
        totals = {name: self.procs.sum(x).tolist() for name, x in sums.items()}
        return totals | {"latest": self.latest}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with the sums of `state`."""
        # Summed over processes when they were saved: each now carries an equal part.
        for name, x in (("epoch", self.epoch), ("recent", self.recent)):
            x.copy_(torch.tensor(state[name], dtype=x.dtype) / self.procs.world_size)
        self.latest = state["latest"]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process has held, on the GPU if it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
