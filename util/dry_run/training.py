"""`--dry_run`: what a run would do and cost, before anything is paid for."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from util.data.splits import NOTHING_HELD_OUT, HoldOut
from util.dry_run.cost import Cost, Memory, checkpoint_bytes, estimate_memory, numbered_checkpoints
from util.errors import BadInput
from util.train.advice import Published
from util.train.dist import read_environment
from util.train.memory import keep_freed_memory

# Training images, channels and classes of sets that are the same everywhere.
KNOWN = {
    "imagefolder": (1_281_167, 3, 1000),  # ImageNet-1K's, if there is no folder to count
    "places365": (1_803_460, 3, 365),
    "cifar10": (50_000, 3, 10),
    "cifar100": (50_000, 3, 100),
    "stl10": (5_000, 3, 10),
    "stl10_unlabeled": (100_000, 3, 0),
    "fashion_mnist": (60_000, 1, 10),
    "ade20k": (20_210, 3, 150),
}


class CountableSource(Protocol):
    """What is asked of a data set, of images or of pairs."""

    classes: Any

    @property
    def channels(self) -> int:
        """Of an image."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class PlannedData:
    """What a plan knows of the training set.

    Attributes:
        note: where the numbers come from.
        assumed: nobody has seen the set.
    """

    images: int
    channels: int
    classes: int
    note: str
    assumed: bool = False


def look_at_data(
    dataset: str,
    data_path: str | None,
    given: int | None,
    open_source: Callable[[], CountableSource],
    hold_out: HoldOut = NOTHING_HELD_OUT,
    limit: int | None = None,
) -> PlannedData:
    """Count the training set where it is there, else what is known of it.

    Args:
        limit: images of it that --train_images asks for; None: all.
        given: images that the user wants to assume; None: count.
        open_source: lists the set, without what is held out; is not called where that could
            download it.
        hold_out: what is held out of images that nobody has counted.

    Raises:
        BadInput: it is not there, and nothing is known of a set of this name.
    """
    data = _whole(dataset, data_path, given, open_source, hold_out)
    if limit is None:
        return data
    note = f"{limit:,} by --train_images, of {data.images:,}: {data.note}"
    return replace(data, images=min(limit, data.images), note=note)


def _whole(
    dataset: str,
    data_path: str | None,
    given: int | None,
    open_source: Callable[[], CountableSource],
    hold_out: HoldOut,
) -> PlannedData:
    there = data_path is not None and (":" in data_path or Path(data_path).expanduser().exists())
    known = KNOWN.get(dataset)
    given = None if given is None else hold_out.left(given)
    if there or known is None:
        try:
            source = open_source()
        except BadInput as error:
            if there or given is None:
                raise
            return PlannedData(
                given, 3, 1000, f"assumed, for the set cannot be read ({error})", True
            )
        found, channels, classes = len(source), source.channels, len(source.classes)
        if given is None:
            return PlannedData(found, channels, classes, "counted")
        return PlannedData(
            given, channels, classes, f"assumed, {found:,} are there", given != found
        )
    found, channels, classes = hold_out.left(known[0]), *known[1:]
    if given is not None:
        return PlannedData(given, channels, classes, "assumed, as --dry_run_images says", True)
    if dataset == "imagefolder":
        why = "there is no --data_path" if data_path is None else f"{data_path} is not there"
        return PlannedData(found, channels, classes, f"ImageNet-1K's: {why}", True)
    return PlannedData(found, channels, classes, "as published; not counted")


def start_of_plan(checkpoint: str | None, model: str | None) -> tuple[bool, str]:
    """Whether the encoder's file can be read, and where the run starts, for the reader.

    Without the file at hand the model is the one that --model names, or its recipe's.

    Raises:
        BadInput: it is not there, and no name says what it would be.
    """
    if checkpoint is None:
        return False, "from scratch"
    if checkpoint.startswith("https:") or Path(checkpoint).exists():
        return True, f"from {checkpoint}"
    if model is None:
        raise BadInput(
            f"--finetune {checkpoint} is not there, and it says which model this is; give --model "
            "NAME to plan without it"
        )
    return False, f"from {checkpoint} (not there yet: sizes as --model says, no LScale)"


@dataclass(frozen=True)
class DryRun:
    """A run before it starts.

    Attributes:
        task: pretrain | finetune | ...
        what: the model, its input, what learns: a line for the reader.
        data: the training set.
        dataset: its name.
        batch_size: images per process and micro-step.
        processes, accum_iter: what makes the global batch of it.
        epochs, warmup_epochs: of the run; 0 where it is counted in iterations.
        lr: peak learning rate.
        min_lr: at the end.
        published: the recipe that it is held to.
        parameters: numbers by part of the model, what learns and in all.
        count_cost: counts what an image costs, which takes seconds.
        counted: what the FLOPs hold, for the reader.
        precision, grad_checkpointing, optimizer, averages: as in `util.dry_run.cost`.
        image_values: numbers in an image.
        save_every, keep: checkpoints.
        output_dir: run folder.
        images_per_second: of all processes; None: not known.
        rate_note: where that comes from.
        iterations, warmup_iterations: of a run that is not counted in epochs.
        decay: of the learning rate after the warm-up.
        lr_batch: images per step that the base rate is given for; None: 256.
        warnings: what is known from the flags alone, see `util.train.advice`.
    """

    task: str
    what: str
    data: PlannedData
    dataset: str
    batch_size: int
    processes: int
    accum_iter: int
    epochs: int
    warmup_epochs: float
    lr: float
    min_lr: float
    published: Published
    parameters: Mapping[str, tuple[int, int]]
    count_cost: Callable[[], Cost]
    counted: str
    precision: str
    grad_checkpointing: bool
    optimizer: str
    averages: bool
    image_values: int
    save_every: int
    keep: int
    output_dir: str
    images_per_second: float | None = None
    rate_note: str = ""
    iterations: int | None = None
    warmup_iterations: float = 0
    decay: str = "cosine"
    lr_batch: int | None = None
    warnings: Sequence[str] = ()

    @property
    def global_batch(self) -> int:
        """Images per optimiser step."""
        return self.batch_size * self.processes * self.accum_iter

    @property
    def base_lr(self) -> float:
        """The peak learning rate for `lr_batch` images per step."""
        return self.lr * (self.lr_batch or 256) / self.global_batch

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; what fills no whole one is left out."""
        return self.data.images // self.global_batch

    @property
    def steps(self) -> int:
        """Optimiser steps of the run; none at all where the data fill no step."""
        if self.iterations is not None:
            return self.iterations if self.steps_per_epoch else 0
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> float:
        """Steps of them before the peak learning rate."""
        if self.iterations is not None:
            return self.warmup_iterations
        return self.warmup_epochs * self.steps_per_epoch

    @property
    def length(self) -> int:
        """Of the run, in what checkpoints are counted in: epochs, or iterations."""
        return self.epochs if self.iterations is None else self.iterations

    @property
    def warmup(self) -> float:
        """Of that, before the peak learning rate."""
        return self.warmup_epochs if self.iterations is None else self.warmup_iterations

    @property
    def images(self) -> int:
        """Images that the run learns from, each time counted."""
        return self.steps * self.global_batch

    @property
    def learning(self) -> int:
        """Parameters that learn."""
        return sum(learning for learning, _ in self.parameters.values())

    @property
    def weights(self) -> int:
        """All parameters."""
        return sum(total for _, total in self.parameters.values())

    @cached_property
    def cost(self) -> Cost:
        """Of an image; counted when it is first asked for."""
        return self.count_cost()

    @property
    def memory(self) -> Memory:
        """Of one device."""
        return estimate_memory(
            self.cost,
            batch_size=self.batch_size,
            image_values=self.image_values,
            parameters=self.weights,
            learning=self.learning,
            optimizer=self.optimizer,
            averages=self.averages,
        )

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint."""
        return checkpoint_bytes(self.weights, self.learning, self.optimizer, self.averages)

    @property
    def disk(self) -> int:
        """Bytes of all checkpoints; while one is written it lies beside the others."""
        count = numbered_checkpoints(self.length, self.save_every, self.keep)
        return self.checkpoint * (count + 1)

    @property
    def hours(self) -> float | None:
        """Of training; None: no rate is known."""
        if self.images_per_second is None:
            return None
        return self.images / self.images_per_second / 3600


# Parts of a model by the first part of a parameter's name.
PARTS = {
    "mask_token": "decoder", "head": "head", "fc_norm": "head", "blocks": "encoder blocks",
    "layers": "encoder blocks",
    "relative": "relative biases", "neck": "neck", "decode_head": "UPer head",
    "auxiliary_head": "auxiliary head",
}  # fmt: skip


def parameters_by_part(model: Any) -> dict[str, tuple[int, int]]:
    """(numbers that learn, all numbers) of each part of an encoder with a decoder or heads."""
    parts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        first = name.removeprefix("encoder.").split(".")[0]
        part = PARTS.get(first, "encoder, rest")
        if first == "decoder" or first.startswith("decoder_"):
            part = "decoder"
        learning, total = parts.get(part, (0, 0))
        size = parameter.numel()
        parts[part] = learning + size * parameter.requires_grad, total + size
    return parts


def plan_processes(given: int | None, folder: Path) -> tuple[int, bool]:
    """How many processes are planned for, and whether this is the one that speaks.

    Args:
        given: as the user says; None: those that were started.
        folder: run folder, see `read_environment`.
    """
    place = read_environment(os.environ, folder)
    return given or place.world_size, place.rank == 0


def estimate_rate(
    given: float | None, measured: Callable[[], float] | None, processes: int
) -> tuple[float | None, str]:
    """Images/s of all processes, and where the number comes from.

    Args:
        given: as the user says.
        measured: measures one process now; None: the user did not ask for it.
    """
    if given is not None:
        return given, "as given"
    if measured is None:
        return None, ""
    one = measured()
    alone = f"{one:.1f} images/s of one process, measured now on drawn images"
    return one * processes, alone + (f", x {processes}" if processes > 1 else "")


def measure_rate(step: Callable[[], Any], images: int, steps: int, device: torch.device) -> float:
    """Images per second of a step, after one that is not counted.

    Args:
        images: that a step takes.
    """
    keep_freed_memory(device)  # as in the run
    step()
    wait(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return images * steps / (time.perf_counter() - begin)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
