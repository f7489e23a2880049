"""`--dry_run`: what a run would do and cost, and what looks wrong, before anything is paid for."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from util.cost import FULL, Cost, Memory, checkpoint_bytes, memory_of, numbered_checkpoints
from util.dist import read_environment
from util.errors import BadInput
from util.images import ImageSource

# Training images, channels and classes of sets that are the same everywhere.
KNOWN = {
    "imagefolder": (1_281_167, 3, 1000),  # ImageNet-1K's, if there is no folder to count
    "places365": (1_803_460, 3, 365),
    "cifar10": (50_000, 3, 10),
    "cifar100": (50_000, 3, 100),
    "stl10": (5_000, 3, 10),
    "stl10_unlabeled": (100_000, 3, 0),
    "fashion_mnist": (60_000, 1, 10),
}
GIGA = 1e9
OPTIMIZER_NAMES = {"adamw": "AdamW", "lars": "LARS"}
# More of an epoch than this left out, because it fills no step, is worth a word.
TAIL = 0.1


@dataclass(frozen=True)
class Data:
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
    open_source: Callable[[], ImageSource],
) -> Data:
    """Count the training set where it is there, else what is known of it.

    Args:
        given: images that the user wants to assume; None: count.
        open_source: lists the set; is not called where that could download it.

    Raises:
        BadInput: it is not there, and nothing is known of a set of this name.
    """
    there = data_path is not None and (":" in data_path or Path(data_path).expanduser().exists())
    known = KNOWN.get(dataset)
    if there or known is None:
        try:
            source = open_source()
        except BadInput as error:
            if there or given is None:
                raise
            return Data(given, 3, 1000, f"assumed, for the set cannot be read ({error})", True)
        found, channels, classes = len(source), source.channels, len(source.classes)
        if given is None:
            return Data(found, channels, classes, "counted")
        return Data(given, channels, classes, f"assumed, {found:,} are there", given != found)
    found, channels, classes = known
    if given is not None:
        return Data(given, channels, classes, "assumed, as --dry_run_images says", True)
    if dataset == "imagefolder":
        return Data(found, channels, classes, "ImageNet-1K's: there is no --data_path", True)
    return Data(found, channels, classes, "as published; not counted")


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
        task: pretrain | finetune | ...
        what: the model, its input, what learns: a line for the reader.
        data: the training set.
        dataset: its name.
        batch_size: images per process and micro-step.
        processes, accum_iter: what makes the global batch of it.
        epochs, warmup_epochs: of the run.
        lr: peak learning rate.
        min_lr: at the end.
        recipe_blr: base learning rate of the published recipe.
        recipe_batch: its global batch.
        parameters: numbers by part of the model, what learns and in all.
        cost: of an image.
        counted: what the FLOPs hold, for the reader.
        precision, grad_checkpointing, optimizer, averages: as in `util.cost`.
        image_values: numbers in an image.
        save_every, keep: checkpoints.
        output_dir: run folder.
        images_per_second: of all processes; None: not known.
        rate_note: where that comes from.
    """

    task: str
    what: str
    data: Data
    dataset: str
    batch_size: int
    processes: int
    accum_iter: int
    epochs: int
    warmup_epochs: float
    lr: float
    min_lr: float
    recipe_blr: float
    recipe_batch: int
    parameters: Mapping[str, tuple[int, int]]
    cost: Cost
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

    @property
    def global_batch(self) -> int:
        """Images per optimiser step."""
        return self.batch_size * self.processes * self.accum_iter

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; what fills no whole one is left out."""
        return self.data.images // self.global_batch

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> float:
        """Steps of them before the peak learning rate."""
        return self.warmup_epochs * self.steps_per_epoch

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

    @property
    def memory(self) -> Memory:
        """Of one device."""
        return memory_of(
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
        count = numbered_checkpoints(self.epochs, self.save_every, self.keep)
        return self.checkpoint * (count + 1)

    @property
    def hours(self) -> float | None:
        """Of training; None: no rate is known."""
        if self.images_per_second is None:
            return None
        return self.images / self.images_per_second / 3600


def parameters_by_part(model: Any) -> dict[str, tuple[int, int]]:
    """(numbers that learn, all numbers) of each part of an encoder with a decoder or a head."""
    parts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        if first.startswith("decoder") or first == "mask_token":
            part = "decoder"
        elif first in ("head", "fc_norm"):
            part = "head"
        elif first == "blocks":
            part = "encoder blocks"
        else:
            part = "encoder, rest"
        learning, total = parts.get(part, (0, 0))
        size = parameter.numel()
        parts[part] = learning + size * parameter.requires_grad, total + size
    return parts


def processes_of(given: int | None, folder: Path) -> tuple[int, bool]:
    """How many processes are planned for, and whether this is the one that speaks.

    Args:
        given: as the user says; None: those that were started.
        folder: run folder, see `read_environment`.
    """
    place = read_environment(os.environ, folder)
    return given or place.world_size, place.rank == 0


def rate_of(
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


# ---- What looks wrong --------------------------------------------------------------------------


def warnings_of(plan: Plan) -> list[str]:
    """What a user would want to be told before the run, most serious first."""
    found = []
    batch, images = plan.global_batch, plan.data.images
    if plan.steps_per_epoch == 0:
        found.append(
            f"the global batch {batch:,} is larger than the data, {images:,} images: there would "
            "be no step; lower --batch_size or --accum_iter"
        )
    elif images % batch > TAIL * images:
        left = images - plan.steps_per_epoch * batch
        found.append(
            f"{left:,} of {images:,} images ({left / images:.0%}) fill no step and are left out, "
            f"other ones in each epoch: the global batch {batch:,} is large for the data"
        )
    if plan.warmup_epochs >= plan.epochs:
        found.append(
            f"the warm-up of {plan.warmup_epochs:g} epochs is as long as training "
            f"({plan.epochs} epochs) or longer: the learning rate never falls"
        )
    blr = plan.lr * 256 / batch
    ratio = blr / plan.recipe_blr if plan.recipe_blr else 1.0
    if ratio >= 10 or ratio <= 0.1:
        size = f"{ratio:.3g} x" if ratio >= 10 or ratio == 0 else f"1/{1 / ratio:.3g} of"
        found.append(
            f"lr {plan.lr:.3g} is base lr {blr:.3g} at this batch, {size} the published recipe's "
            f"{plan.recipe_blr:.3g} (that of ViT-B and larger on ImageNet)"
        )
    if plan.min_lr > plan.lr:
        found.append(f"--min_lr {plan.min_lr:.3g} is above the peak lr {plan.lr:.3g}")
    if batch * 4 <= plan.recipe_batch and images >= 1_000_000:
        found.append(
            f"the global batch {batch:,} is far below the recipe's {plan.recipe_batch:,}: more "
            "processes, or a larger --accum_iter"
        )
    return found + machine_warnings(plan)


def machine_warnings(plan: Plan) -> list[str]:
    """What does not fit this machine; a run elsewhere may ignore it."""
    found = []
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory
        if plan.memory.total > there:
            found.append(
                f"{plan.memory.total / GIGA:.1f} GB are needed on a device, this one has "
                f"{there / GIGA:.1f}: lower --batch_size, raise --accum_iter, or "
                "--grad_checkpointing"
            )
    folder = Path(plan.output_dir).expanduser().absolute()
    existing = next((p for p in (folder, *folder.parents) if p.exists()), None)
    free = None if existing is None else shutil.disk_usage(existing).free
    if free is not None and plan.disk > free:
        found.append(
            f"checkpoints need {plan.disk / GIGA:.1f} GB, {existing} has {free / GIGA:.1f} GB "
            "free: --keep N keeps fewer, --save_every writes fewer"
        )
    return found


# ---- For the reader ----------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """The plan as text."""
    lines = ["dry run: nothing is trained, nothing is written"]
    data = plan.data
    rows = [
        (plan.task, plan.what),
        ("data", f"{data.images:,} images of {plan.dataset} ({data.note})"),
        (
            "batch",
            f"{plan.global_batch:,} = {plan.batch_size} x {plan.processes} processes x "
            f"{plan.accum_iter} micro-steps",
        ),
        (
            "steps",
            f"{plan.steps_per_epoch:,} an epoch, {plan.steps:,} in {plan.epochs} epochs, "
            f"{plan.images:,} images",
        ),
        (
            "lr",
            f"{plan.lr:.4g} at its peak (base lr {plan.lr * 256 / plan.global_batch:.4g}), warm-up "
            f"{plan.warmup_steps:,.0f} steps ({plan.warmup_epochs:g} epochs), cosine to "
            f"{plan.min_lr:.4g}",
        ),
        ("parameters", f"{plan.weights:,}, {plan.learning:,} of them learn"),
        *(
            (f"  {name}", f"{total:,}" + ("" if learning == total else f", {learning:,} learn"))
            for name, (learning, total) in plan.parameters.items()
        ),
        *cost_rows(plan),
        *time_rows(plan),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines += [f"{name:{width}}{text}" for name, text in rows]
    return "\n".join([*lines, *(f"warning: {text}" for text in warnings_of(plan))])


def cost_rows(plan: Plan) -> list[tuple[str, str]]:
    """Operations and memory, with what is counted."""
    cost, memory = plan.cost, plan.memory
    parts = {
        "weights": memory.weights,
        "half-precision copies": memory.copies,
        "gradients": memory.gradients,
        OPTIMIZER_NAMES[plan.optimizer] + " state": memory.optimizer,
        "averaged weights": memory.averages,
        f"activations of {plan.batch_size} images": memory.activations,
        "images": memory.images,
    }
    again = ", blocks computed again" if plan.grad_checkpointing else ""
    return [
        (
            "FLOPs",
            f"{cost.total / GIGA:.2f} G an image: forward {cost.forward / GIGA:.2f}, backward "
            f"{cost.backward / GIGA:.2f}; attention's own products are "
            f"{cost.attention / GIGA:.2f} of them",
        ),
        ("  in all", f"{cost.total * plan.images:.3g}"),
        ("  counted", plan.counted),
        ("memory", f"{memory.total / GIGA:.2f} GB a device, {plan.precision}{again}"),
        *((f"  {name}", f"{size / GIGA:.3f} GB") for name, size in parts.items() if size),
        ("  not counted", "temporary tensors, workspaces, what the allocator holds back"),
    ]


def time_rows(plan: Plan) -> list[tuple[str, str]]:
    """Disk and hours."""
    count = numbered_checkpoints(plan.epochs, plan.save_every, plan.keep)
    if plan.hours is None:
        hours = "unknown: give --images_per_second X, or measure with --dry_run_measure STEPS"
    else:
        hours = f"{plan.hours:.2f} h at {plan.images_per_second:,.1f} images/s ({plan.rate_note})"
    return [
        (
            "disk",
            f"{plan.disk / GIGA:.2f} GB: {count} checkpoints of {plan.checkpoint / GIGA:.3f} GB, "
            "and one while it is written",
        ),
        ("time", f"{hours}; measurement on held-out images not counted"),
    ]


@dataclass(frozen=True)
class Features:
    """A measurement on features before it starts: one forward pass of every image.

    Attributes:
        what: a line for the reader.
        data: the training set, of which `used` images become the bank.
        parameters: numbers in the encoder.
        forward: operations of one image.
        width: numbers in its features, float32.
        images_per_second: of all processes; None: not known.
    """

    what: str
    data: Data
    dataset: str
    used: int
    processes: int
    parameters: int
    forward: float
    width: int
    images_per_second: float | None


def describe_features(plan: Features) -> str:
    """The plan as text; held-out images come on top, their number is not known here."""
    bank = FULL * plan.width * plan.used / plan.processes
    hours = "unknown: give --images_per_second X"
    if plan.images_per_second is not None:
        hours = f"{plan.used / plan.images_per_second / 3600:.2f} h (as given)"
    rows = [
        ("knn", plan.what),
        ("data", f"{plan.used:,} of {plan.data.images:,} images of {plan.dataset} "
                 f"({plan.data.note}), and the held-out ones"),
        ("parameters", f"{plan.parameters:,}, none learns"),
        ("FLOPs", f"{plan.forward / GIGA:.2f} G an image, {plan.forward * plan.used:.3g} in all; "
                  "matrix products, 2 a multiply-add; the comparison is not counted"),
        ("memory", f"{(FULL * plan.parameters + bank) / GIGA:.2f} GB a device: "
                   f"{bank / GIGA:.3f} GB of features, the rest weights; activations live for "
                   "one layer"),
        ("time", hours),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows) + 2
    head = "dry run: nothing is computed, nothing is written"
    return "\n".join([head, *(f"{name:{width}}{text}" for name, text in rows)])
