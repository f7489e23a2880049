"""From flags, data and a model to a run that can take its next step: one order for every task.

1. `Start`: the seed, and the checkpoint to go on from: the run folder's own last one, else that of
   --resume, else none. The main then opens the data and builds the model, perhaps as the checkpoint
   says.
2. `Session`: the sampler, and the loader of what it yields.
3. The model on its device, whole or in shards; compiled; its gradients those of all processes.
4. The schedule, and the optimiser of the parameters as they were placed.
5. From the checkpoint: where in the run it stands, weights, moments, loss scale; without one, what
   the model fits to the data.
6. The `Run`: folder, log, checkpoints, signals.

The epoch loop is the main's, see `engine_train.train_steps` for the steps in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from util.console import counted
from util.data.randomness import EpochSampler, IterationSampler
from util.data.samples import build_loader, default_workers
from util.data.source import Source
from util.progress import say
from util.train import checkpoint as ckpt
from util.train.advice import Published, say_warnings, warn_of_course, warn_of_shards
from util.train.dist import Processes, distribute
from util.train.lease import Lease
from util.train.optim import load_moments
from util.train.resume import go_on
from util.train.run import Run
from util.train.schedule import Course, PolySchedule
from util.train.shard import Placed
from util.train.step import OptimizerStep
from util.train.timeline import Timeline


@dataclass(frozen=True)
class Settings:
    """What every training is told, whatever its task; made by `util.config.session_flags`.

    Attributes:
        folder: of the run.
        resume: auto, none, or the path of a checkpoint.
        allow_changes: go on from a checkpoint whose settings give other numbers.
        seed: of all random numbers of the run.
        tf32: allow TF32 products on a GPU.
        epochs, iterations: length of the run, in one of them; the other is None.
        warmup: in the same unit.
        min_lr: learning rate at the end.
        batch_size: images per process and micro-step.
        accum_iter: micro-steps per optimiser step.
        crops_per_image: see `EpochSampler`.
        num_workers: loading processes per training process; None: its share of the cores.
        prefetch_factor: batches that each of them keeps ready.
        pin_memory: page-locked batches, where the device is a GPU.
        precision, clip_grad: see `OptimizerStep`.
        grad_checkpointing: compute activations again instead of keeping them.
        shard, compiled: see `Placed` and `distribute`.
        flags: all resolved flags in plain types, for the run folder.
        arithmetic: those of them that change the numbers.
        run: what `Run` takes as it is.
        course: of the learning rate, where the run is counted in epochs.
    """

    folder: Path
    resume: str
    allow_changes: bool
    seed: int
    tf32: bool
    epochs: int | None
    iterations: int | None
    warmup: float
    min_lr: float
    batch_size: int
    accum_iter: int
    crops_per_image: int
    num_workers: int | None
    prefetch_factor: int
    pin_memory: bool
    precision: str
    clip_grad: float | None
    grad_checkpointing: bool
    shard: bool
    compiled: bool
    flags: dict[str, Any]
    arithmetic: dict[str, Any]
    run: dict[str, Any]
    course: Course = field(default_factory=Course)


class Start:
    """A run before its data and its model. A collective.

    Args:
        task: what the checkpoints call it.
        settings: of the run.
        procs: the processes.
        lease: on the run folder, in the main process.

    Attributes:
        saved: contents of the checkpoint to go on from, which lies at `path`; None: there is none.
        notes: what the reader should know of where the run starts; a main may add to them.
        global_batch: images per optimiser step.
        workers: loading processes of this process.

    Raises:
        BadInput: --resume names no checkpoint of this task; see `ckpt.agree_on_start`.
    """

    def __init__(
        self, task: str, settings: Settings, procs: Processes, lease: Lease | None
    ) -> None:
        self.task, self.settings, self.procs, self.lease = task, settings, procs, lease
        torch.manual_seed(settings.seed)
        torch.backends.cuda.matmul.allow_tf32 = settings.tf32
        torch.backends.cudnn.allow_tf32 = settings.tf32
        self.path, self.notes = ckpt.agree_on_start(
            settings.folder, task, settings.resume, procs.gather
        )
        self.saved = None if self.path is None else ckpt.load_task(self.path, task)
        self.global_batch = settings.batch_size * procs.world_size * settings.accum_iter
        wanted = settings.num_workers
        self.workers = default_workers(procs.local_size) if wanted is None else wanted


class Session:
    """A training that is ready for its next step, see the module. A collective.

    Args:
        start: of the run.
        source: training images; they name bad ones.
        samples: of `source`, by the sampler's keys.
        model: on the CPU, alike on all processes; what does not learn is frozen. Placed in place.
        model_name, model_args: of the model, for the checkpoint.
        averages: a copy of the model for averaged weights, placed as the model is. Their
            checkpoint's key is `ema`; from one without, they start at its weights.
        fullgraph: False lets torch.compile cut the model's graph.
        optimizer: makes it, of the placed model's parameters.
        lr: peak learning rate.
        published: what learning rate and batch are held to.
        warnings: what the reader is to be told beside what is found here.
        arithmetic: what changes the numbers beside flags, model, batch and data.
        fit: fits the model to the data, where no checkpoint holds the result.
        snapshot: what the task adds to a checkpoint.

    Attributes:
        model, trained: the model as it is saved, and as it is trained: compiled and distributed.
        placed, averaged: where all weights of the model and of `averages` are to be had.
        sampler, loader: of the training.
        optimizer, optimizer_step, timeline: of the run.
        run: between its checkpoints.

    Raises:
        BadInput: too few images for a step, a checkpoint of other settings, or one that does not
            fit.
    """

    def __init__(
        self,
        start: Start,
        *,
        source: Source,
        samples: Dataset,
        model: nn.Module,
        model_name: str | None,
        model_args: dict[str, Any],
        optimizer: Callable[[], torch.optim.Optimizer],
        lr: float,
        published: Published,
        warnings: Sequence[str],
        snapshot: Callable[[], dict[str, Any]],
        arithmetic: Mapping[str, Any] | None = None,
        averages: nn.Module | None = None,
        fullgraph: bool = True,
        fit: Callable[[], None] | None = None,
    ) -> None:
        settings, procs = start.settings, start.procs
        self.settings, self.procs, self.lr, self.model = settings, procs, lr, model
        self.model_head = {"model_name": model_name, "model_args": model_args}
        self.more_snapshot = snapshot

        # 2. Sampler and loader.
        self.sampler = build_sampler(len(source), settings, procs)
        assert self.sampler.global_batch == start.global_batch
        self.loader = build_loader(
            samples,
            self.sampler,
            num_workers=start.workers,
            pin_memory=settings.pin_memory and procs.device.type == "cuda",
            prefetch_factor=settings.prefetch_factor,
        )

        # 3. Placement. The copy first: a model in shards could not be copied.
        checkpointing: Any = model
        checkpointing.set_grad_checkpointing(settings.grad_checkpointing)
        self.averaged = None
        if averages is not None:
            self.averaged = Placed(averages, procs, shard=settings.shard)
        self.placed = Placed(model, procs, shard=settings.shard)
        self.trained = distribute(model, procs, compiled=settings.compiled, fullgraph=fullgraph)

        # 4. Schedule and optimiser.
        self.timeline = Timeline(
            self.sampler.steps_per_epoch, epochs=settings.epochs, iterations=settings.iterations
        )
        self.schedule = build_schedule(
            lr, settings, self.sampler.steps_per_epoch, self.sampler.global_batch
        )
        self.optimizer = optimizer()
        self.optimizer_step = OptimizerStep(
            self.trained,
            self.optimizer,
            device=procs.device,
            precision=settings.precision,
            accum_iter=settings.accum_iter,
            clip_grad=settings.clip_grad,
        )
        self.warnings = [
            *self._warn_of_course(published, len(source)),
            *warnings,
            *warn_of_shards(settings.shard, procs.world_size),
        ]

        # 5. The checkpoint's state, or what is fitted in its place.
        agree = settings.arithmetic | {
            "model_args": model_args,
            "global_batch": self.sampler.global_batch,
            "images": len(source),
            "stored": source.stored,
            **(arithmetic or {}),
        }
        if start.saved is not None and start.path is not None:
            self._go_on(start.saved, start.path, agree, start.notes)
        elif fit is not None:
            fit()

        # 6. The run folder.
        self.run = Run(
            settings.folder,
            procs,
            lease=start.lease,
            task=start.task,
            source=source,
            settings=settings.flags,
            arithmetic=agree,
            snapshot=self.snapshot,
            state=start.saved,
            notes=start.notes,
            timeline=self.timeline,
            global_batch=self.sampler.global_batch,
            **settings.run,
        )

    def _warn_of_course(self, published: Published, images: int) -> list[str]:
        settings = self.settings
        length, unit = settings.epochs, "epochs"
        if length is None:
            length, unit = self.timeline.total, "iterations"
        return warn_of_course(
            published,
            global_batch=self.sampler.global_batch,
            images=images,
            length=length,
            warmup=settings.warmup,
            unit=unit,
            lr=self.lr,
            min_lr=settings.min_lr * settings.course.scale(self.sampler.global_batch),
        )

    def _go_on(
        self, saved: Mapping[str, Any], path: Path, agree: dict[str, Any], notes: list[str]
    ) -> None:
        """Check that the run may go on from a checkpoint, and take its state."""
        allowed = self.settings.allow_changes
        self.timeline = go_on(
            self.timeline, saved, path, agree, self.schedule, notes, allow_changes=allowed
        )
        if isinstance(self.sampler, IterationSampler):
            self.sampler.place(self.timeline.first, self.timeline.start)
        ckpt.load_weights(self.model, self.placed.parts(saved["model"]), "the checkpoint")
        if self.averaged is not None:
            weights = self.averaged.parts(saved.get("ema", saved["model"]))
            ckpt.load_weights(self.averaged.model, weights, "the checkpoint")
        load_moments(self.optimizer, saved["optimizer"])
        self.optimizer_step.load_scale(saved["scaler"])

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint holds beside what `Run` adds: model, optimiser, and the task's own.

        A collective; complete on the main process.
        """
        state = {**self.model_head, "model": self.placed.full(self.model.state_dict())}
        if self.averaged is not None:
            state["ema"] = self.averaged.full(self.averaged.model.state_dict())
        return {
            **state,
            "optimizer": self.placed.full(self.optimizer.state_dict()),
            "scaler": self.optimizer_step.scaler.state_dict(),
            **self.more_snapshot(),
        }

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0 over the run; resumes may have moved it."""
        return self.schedule(self.timeline.scheduled(step))

    def start_epoch(self, epoch: int, step: int) -> None:
        """The loader next yields an epoch, behind what it has taken in `step` steps of the run."""
        self.sampler.start(epoch, step - self.timeline.begin(epoch))

    def start_steps(self, first: int, last: int) -> None:
        """The loader next yields steps `first` to `last` - 1 of a run of iterations, from 0."""
        assert isinstance(self.sampler, IterationSampler)
        self.sampler.between(first, last)

    def say(self, what: str) -> None:
        """Tell the reader what is trained, on how many images at once, how fast and where."""
        if self.procs.main:
            settings, procs = self.settings, self.procs
            say(
                f"{what}; global batch {self.sampler.global_batch} = {settings.batch_size} x "
                f"{counted(procs.world_size, 'process')} x {settings.accum_iter}; "
                f"lr {self.lr:.3g}; {settings.precision} on {procs.device}, {self.placed}"
            )

    @contextmanager
    def running(self) -> Iterator[Run]:
        """The run, with its log and signals, and its warnings said; see `Run`."""
        try:
            with self.run:
                if self.procs.main:
                    say_warnings(self.warnings)
                yield self.run
        finally:  # not when Python happens to collect the session
            self.loader.close()


def build_sampler(images: int, settings: Settings, procs: Processes) -> EpochSampler:
    """By epochs, or by iterations where the run counts them."""
    layout: dict[str, Any] = {
        "accum_iter": settings.accum_iter,
        "world_size": procs.world_size,
        "rank": procs.rank,
        "seed": settings.seed,
        "crops_per_image": settings.crops_per_image,
    }
    kind = EpochSampler if settings.iterations is None else IterationSampler
    return kind(images, settings.batch_size, **layout)


def build_schedule(
    lr: float, settings: Settings, steps_per_epoch: int, global_batch: int
) -> Callable[[int], float]:
    """By the run's course over epochs, a straight line over iterations (mmsegmentation)."""
    if settings.iterations is not None:
        return PolySchedule(lr, int(settings.warmup), settings.iterations, settings.min_lr)
    assert settings.epochs is not None
    return settings.course.build(
        lr,
        settings.min_lr,
        warmup_epochs=settings.warmup,
        epochs=settings.epochs,
        steps_per_epoch=steps_per_epoch,
        global_batch=global_batch,
    )
