"""`--dry_run` for the reader: a plan as text, and what looks wrong in it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from util.console import counted
from util.dry_run.cost import FULL, numbered_checkpoints
from util.dry_run.training import DryRun, PlannedData
from util.train.advice import warn_of_course

GIGA = 1e9
OPTIMIZER_NAMES = {"adamw": "AdamW", "lars": "LARS"}


# ---- What looks wrong --------------------------------------------------------------------------


def list_warnings(run: DryRun) -> list[str]:
    """What a user would want to be told before the run, most serious first."""
    course = warn_of_course(
        run.published,
        global_batch=run.global_batch,
        images=run.data.images,
        length=run.length,
        warmup=run.warmup,
        unit="epochs" if run.iterations is None else "iterations",
        lr=run.lr,
        min_lr=run.min_lr,
    )
    return [*course, *run.warnings, *machine_warnings(run)]


def machine_warnings(run: DryRun) -> list[str]:
    """What does not fit this machine; a run elsewhere may ignore it."""
    found = []
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory
        if run.memory.total > there:
            found.append(
                f"{run.memory.total / GIGA:.1f} GB are needed on a device, this one has "
                f"{there / GIGA:.1f}: lower --batch_size, raise --accum_iter, or "
                "--grad_checkpointing"
            )
    folder = Path(run.output_dir).expanduser().absolute()
    existing = next((p for p in (folder, *folder.parents) if p.exists()), None)
    free = None if existing is None else shutil.disk_usage(existing).free
    if free is not None and run.disk > free:
        found.append(
            f"checkpoints need {run.disk / GIGA:.1f} GB, {existing} has {free / GIGA:.1f} GB "
            "free: --keep N keeps fewer, --save_every writes fewer"
        )
    return found


# ---- For the reader ----------------------------------------------------------------------------


def describe(run: DryRun) -> str:
    """The plan as text."""
    lines = ["dry run: nothing is trained, nothing is written"]
    data = run.data
    rows = [
        (run.task, run.what),
        ("data", f"{counted(data.images, 'image')} of {run.dataset} ({data.note})"),
        (
            "batch",
            f"{run.global_batch:,} = {run.batch_size} x {counted(run.processes, 'process')} x "
            f"{counted(run.accum_iter, 'micro-step')}",
        ),
        ("steps", f"{describe_length(run)}, {counted(run.images, 'image')}"),
        (
            "lr",
            f"{run.lr:.4g} at its peak (base lr {run.base_lr:.4g}), warm-up "
            f"{describe_warmup(run)}, {run.decay} to {run.min_lr:.4g}",
        ),
        ("parameters", f"{run.weights:,}, {run.learning:,} of them learn"),
        *(
            (f"  {name}", f"{total:,}" + ("" if learning == total else f", {learning:,} learn"))
            for name, (learning, total) in run.parameters.items()
        ),
        *cost_rows(run),
        *time_rows(run),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines += [f"{name:{width}}{text}" for name, text in rows]
    return "\n".join([*lines, *(f"warning: {text}" for text in list_warnings(run))])


def describe_length(run: DryRun) -> str:
    """The number of steps, in all and of an epoch."""
    each = run.steps_per_epoch
    if run.iterations is None:
        return f"{each:,} an epoch, {run.steps:,} in {counted(run.epochs or 0, 'epoch')}"
    epochs = run.steps / each if each else 0
    return f"{run.steps:,}, {counted(epochs, 'epoch')} of {each:,}"


def describe_warmup(run: DryRun) -> str:
    """The length of the warm-up."""
    epochs = f" ({counted(run.warmup_epochs, 'epoch')})" if run.iterations is None else ""
    return f"{counted(round(run.warmup_steps), 'step')}{epochs}"


def cost_rows(run: DryRun) -> list[tuple[str, str]]:
    """Operations and memory, with what is counted."""
    cost, memory = run.cost, run.memory
    parts = {
        "weights": memory.weights,
        "half-precision copies": memory.copies,
        # Statistics of norms alone are not worth a line.
        "shared by all images": memory.shared if memory.shared > GIGA / 1000 else 0,
        "gradients": memory.gradients,
        OPTIMIZER_NAMES[run.optimizer] + " state": memory.optimizer,
        "averaged weights": memory.averages,
        f"activations of {counted(run.batch_size, 'image')}": memory.activations,
        "images": memory.images,
    }
    again = ", blocks computed again" if run.grad_checkpointing else ""
    return [
        (
            "FLOPs",
            f"{cost.total / GIGA:.2f} G an image: forward {cost.forward / GIGA:.2f}, backward "
            f"{cost.backward / GIGA:.2f}; attention's own products are "
            f"{cost.attention / GIGA:.2f} of them",
        ),
        ("  in all", f"{cost.total * run.images:.3g}"),
        ("  counted", run.counted),
        ("memory", f"{memory.total / GIGA:.2f} GB a device, {run.precision}{again}"),
        *((f"  {name}", f"{size / GIGA:.3f} GB") for name, size in parts.items() if size),
        ("  not counted", "temporary tensors, workspaces, what the allocator holds back"),
    ]


def time_rows(run: DryRun) -> list[tuple[str, str]]:
    """Disk and hours."""
    count = numbered_checkpoints(run.length, run.save_every, run.keep)
    if run.hours is None:
        hours = "unknown: give --images_per_second X, or measure with --dry_run_measure STEPS"
    else:
        hours = f"{run.hours:.2f} h at {run.images_per_second:,.1f} images/s ({run.rate_note})"
    return [
        (
            "disk",
            f"{run.disk / GIGA:.2f} GB: {counted(count, 'checkpoint')} of "
            f"{run.checkpoint / GIGA:.3f} GB, and one while it is written",
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
    data: PlannedData
    dataset: str
    used: int
    processes: int
    parameters: int
    forward: float
    width: int
    images_per_second: float | None


def describe_features(run: Features) -> str:
    """The plan as text; held-out images come on top, their number is not known here."""
    bank = FULL * run.width * run.used / run.processes
    hours = "unknown: give --images_per_second X"
    if run.images_per_second is not None:
        hours = f"{run.used / run.images_per_second / 3600:.2f} h (as given)"
    rows = [
        ("knn", run.what),
        ("data", f"{run.used:,} of {counted(run.data.images, 'image')} of {run.dataset} "
                 f"({run.data.note}), and the held-out ones"),
        ("parameters", f"{run.parameters:,}, none learns"),
        ("FLOPs", f"{run.forward / GIGA:.2f} G an image, {run.forward * run.used:.3g} in all; "
                  "matrix products, 2 a multiply-add; the comparison is not counted"),
        ("memory", f"{(FULL * run.parameters + bank) / GIGA:.2f} GB a device: "
                   f"{bank / GIGA:.3f} GB of features, the rest weights; activations live for "
                   "one layer"),
        ("time", hours),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows) + 2
    head = "dry run: nothing is computed, nothing is written"
    return "\n".join([head, *(f"{name:{width}}{text}" for name, text in rows)])
