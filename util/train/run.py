"""What every training run does beside training: log, list bad images, save, answer to signals."""

import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from util.data.conversions import get_tally
from util.data.replace import find_fault
from util.data.source import Source
from util.errors import Stopped
from util.files import at_start
from util.plugins import loaded_plugins
from util.progress import Progress, say
from util.train import checkpoint as ckpt
from util.train.agreement import Agreement
from util.train.bad_images import BAD_IMAGES, BadImages
from util.train.dist import Processes, peers_lost
from util.train.lease import Lease
from util.train.logger import (
    METRICS,
    SETTINGS,
    RunLogger,
    StepLog,
    StepReport,
    prepare_folder,
    save_settings,
)
from util.train.rank_log import rank_log
from util.train.resume import VERSION
from util.train.timeline import Timeline

FIRST_TASK = "pretrain"


def named(name: str, task: str) -> str:
    """A file's name for a task: pretraining's plain, the others' with the task in it.

    Tasks share a folder in the published commands, and none may cut or overwrite another's log.
    """
    path = Path(name)
    return name if task == FIRST_TASK else f"{path.stem}-{task}{path.suffix}"


class Run:
    """One training run of a task, between its checkpoints.

    Entered as a context it takes the stop signals and keeps the process's log; the epoch loop is
    the caller's.

    Args:
        folder: run folder.
        procs: the processes.
        lease: on the folder, in the main process; it is checked before anything is written.
        task: what the checkpoints call it.
        source: training images, for the names of bad ones.
        settings: resolved flags, for the run folder.
        arithmetic: those of them that change the numbers.
        snapshot: what the task adds to a checkpoint; a collective.
        state: the checkpoint to go on from, None: from the start.
        notes: what the reader should know of the resume.
        timeline: epochs and steps of the run.
        global_batch: images per step.
        log_dir: TensorBoard's folder; None: the run folder, or one of the task's own inside it.
        log_every: steps between log lines.
        nan_policy: stop | skip.
        max_bad_images: more end the run.
        save_minutes: minutes between checkpoints, 0: never.
        keep: numbered checkpoints to keep, 0: all.

    Attributes:
        step: optimiser steps done when this start began.
        first_epoch: the epoch to begin with, or to finish.
        stage: how far that epoch is: training, measuring (trained and recorded) or done.
    """

    @at_start()
    def __init__(
        self,
        folder: Path,
        procs: Processes,
        *,
        lease: Lease | None,
        task: str,
        source: Source,
        settings: dict[str, Any],
        arithmetic: Mapping[str, Any],
        snapshot: Callable[[], dict[str, Any]],
        state: Mapping[str, Any] | None,
        notes: list[str],
        timeline: Timeline,
        global_batch: int,
        log_dir: str | None,
        log_every: int,
        nan_policy: str,
        max_bad_images: int,
        save_minutes: float,
        keep: int,
    ) -> None:
        self.folder, self.procs, self.task, self.keep = folder, procs, task, keep
        self.log_every = log_every
        self.check_lease = lease.check if lease is not None else lambda: None
        self.arithmetic, self.snapshot = dict(arithmetic), snapshot
        self.timeline, self.notes = timeline, notes
        self.step, self.first_epoch, self.stage = 0, 0, "training"
        if state is not None:
            self.step, self.stage = state["step"], state["stage"]
            # Stopped at the last step of an epoch, what is due after it is still to be done.
            self.first_epoch = state["epoch"] + (self.stage == "done")
        procs.barrier()  # every process has read its checkpoint before anything is written
        self.check_lease()
        prepare_folder(folder)
        # Begun from another folder's checkpoint, the records of this one are all its own.
        own = state is not None and procs.main and ckpt.renew_last(folder, task)
        self.log_dir = Path(log_dir or (folder if task == FIRST_TASK else folder / task))
        self.logger = RunLogger(
            folder / named(METRICS, task),
            self.log_dir,
            self.step,
            keep_bytes=state["log_bytes"] if state and own else 0,
            write=procs.main,
            before_write=self.check_lease,
        )
        self.bad_images = BadImages(
            folder / named(BAD_IMAGES, task),
            lambda i: f"{source.file_name(i)}: {find_fault(source, i)}",
            max_bad_images,
            procs.gather,
            tally=get_tally(source),
            write=procs.main,
        )
        self.step_log = StepLog(
            self.logger,
            folder,
            procs,
            every=log_every,
            global_batch=global_batch,
            nan_policy=nan_policy,
            bad_images=self.bad_images,
            last_good=lambda: self.own(ckpt.LAST),
            bar=Progress(
                timeline.total,
                self.step,
                show=procs.main,
                # Each tenth of an epoch, and no more than a hundred lines.
                every=max(-(-timeline.steps_per_epoch // 10), -(-timeline.total // 100)),
                where=timeline.words,
            ),
        )
        if state is not None:
            self.step_log.load_state(state["sums"])
            self.bad_images.load(state["bad_images"])
        if procs.main:
            save_settings(folder / named(SETTINGS, task), settings)
        self.agreement = Agreement(procs, save_minutes)
        self.stopped_by = 0
        self.contexts = ExitStack()

    def __enter__(self) -> "Run":
        self.contexts.callback(self.logger.close)
        for context in (
            rank_log(self.folder, self.procs.rank),
            peers_lost(self.procs.rank),
            self.agreement,
        ):
            self.contexts.enter_context(context)
        if self.procs.main:  # now, for `log-rank0.txt` is open
            for note in self.notes:
                say(note)
        if self.timeline.changes:
            self.logger.record("resume", self.step, **self.timeline.changes)
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        if exception[0] is None:
            self.step_log.bar.close()
        return self.contexts.__exit__(*exception)

    def after_step(self, report: StepReport) -> bool:
        """Log the step; save, and say whether to stop, where all processes agreed to."""
        if report.step % self.log_every == 0:
            self.check_lease()
        self.step_log(report)
        wish = self.agreement.after_step()
        if wish.save or wish.stop:
            self.save(report.step, "training")
        self.stopped_by = wish.stop
        return bool(wish.stop)

    def end_epoch(self, epoch: int, step: int) -> None:
        """Record the epoch's mean loss; or leave, if its training was stopped. A collective.

        Raises:
            Stopped: `after_step` was told to stop, and the checkpoint is written.
        """
        if self.stopped_by:
            raise Stopped(
                f"{signal.Signals(self.stopped_by).name} after step {step}, in epoch {epoch + 1}; "
                "the checkpoint is written, the same command goes on from there",
                self.stopped_by,
            )
        self.logger.record("epoch", step, epoch=epoch, loss=self.step_log.end_epoch())

    def save(self, step: int, stage: str, epoch: int | None = None) -> None:
        """Write what a resume needs; every process takes part, the main one writes.

        Args:
            stage: of the epoch, see the class.
            epoch: also write the numbered checkpoint of this epoch.

        Raises:
            RunFailed: a step was not finite, and the policy is to stop: nothing is written.
        """
        self.check_lease()
        self.bad_images.agree()
        self.step_log.report_pending()
        state = {
            "task": self.task,
            "epoch": self.timeline.find_epoch(step),
            "stage": stage,
            "step": step,
            "log_bytes": self.logger.size(),
            "sums": self.step_log.state(),
            "bad_images": sorted(self.bad_images.indices),
            "timeline": self.timeline.state(),
            "arithmetic": self.arithmetic,
            "resume_version": VERSION,
            **({"plugins": plugins} if (plugins := loaded_plugins()) else {}),
            **self.snapshot(),
        }
        if self.procs.main:
            ckpt.save_checkpoint(self.folder, state, epoch, self.keep)
        self.step_log.restart_clock()

    def own(self, name: str) -> Path | None:
        """A checkpoint of the run folder, if it is there and of this task; tasks share folders."""
        head = ckpt.peek(self.folder / name)
        return self.folder / name if head is not None and head["task"] == self.task else None

    def say_results(self) -> None:
        """Name what the run wrote, for the reader; a start with nothing to do writes little."""
        if last := self.own(ckpt.LAST):
            say(f"checkpoint  {last}")
        say(f"metrics     {self.logger.path}")
        if self.logger.events is not None:
            say(f"events      {self.logger.events.path}  (tensorboard --logdir {self.log_dir})")


def due(every: int, epoch: int, epochs: int) -> bool:
    """Whether something done every so many epochs, and after the last, is due after this one."""
    return bool(every) and ((epoch + 1) % every == 0 or epoch == epochs - 1)
