"""`--dry_run` for the reader: a plan as text, and what looks wrong in it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from util.console import counted
from util.dry_run.cost import FULL, numbered_checkpoints
from util.dry_run.training import Data, Plan
from util.train.advice import warn_of_course

GIGA = 1e9
OPTIMIZER_NAMES = {"adamw": "AdamW", "lars": "LARS"}


# ---- What looks wrong --------------------------------------------------------------------------


def warnings_of(plan: Plan) -> list[str]:
    """What a user would want to be told before the run, most serious first."""
    course = warn_of_course(
        plan.published,
        global_batch=plan.global_batch,
        images=plan.data.images,
        length=plan.length,
        warmup=plan.warmup,
        unit="epochs" if plan.iterations is None else "iterations",
        lr=plan.lr,
        min_lr=plan.min_lr,
    )
    return [*course, *plan.warnings, *machine_warnings(plan)]


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
        ("data", f"{counted(data.images, 'image')} of {plan.dataset} ({data.note})"),
        (
            "batch",
            f"{plan.global_batch:,} = {plan.batch_size} x {counted(plan.processes, 'process')} x "
            f"{counted(plan.accum_iter, 'micro-step')}",
        ),
        ("steps", f"{length_of(plan)}, {counted(plan.images, 'image')}"),
        (
            "lr",
            f"{plan.lr:.4g} at its peak (base lr {plan.lr * 256 / plan.global_batch:.4g}), warm-up "
            f"{warmup_of(plan)}, {plan.decay} to {plan.min_lr:.4g}",
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


def length_of(plan: Plan) -> str:
    """The number of steps, in all and of an epoch."""
    each = plan.steps_per_epoch
    if plan.iterations is None:
        return f"{each:,} an epoch, {plan.steps:,} in {counted(plan.epochs or 0, 'epoch')}"
    epochs = plan.steps / each if each else 0
    return f"{plan.steps:,}, {counted(epochs, 'epoch')} of {each:,}"


def warmup_of(plan: Plan) -> str:
    """The length of the warm-up."""
    epochs = f" ({counted(plan.warmup_epochs, 'epoch')})" if plan.iterations is None else ""
    return f"{counted(round(plan.warmup_steps), 'step')}{epochs}"


def cost_rows(plan: Plan) -> list[tuple[str, str]]:
    """Operations and memory, with what is counted."""
    cost, memory = plan.cost, plan.memory
    parts = {
        "weights": memory.weights,
        "half-precision copies": memory.copies,
        "biases of attention": memory.biases,
        "gradients": memory.gradients,
        OPTIMIZER_NAMES[plan.optimizer] + " state": memory.optimizer,
        "averaged weights": memory.averages,
        f"activations of {counted(plan.batch_size, 'image')}": memory.activations,
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
    count = numbered_checkpoints(plan.length, plan.save_every, plan.keep)
    if plan.hours is None:
        hours = "unknown: give --images_per_second X, or measure with --dry_run_measure STEPS"
    else:
        hours = f"{plan.hours:.2f} h at {plan.images_per_second:,.1f} images/s ({plan.rate_note})"
    return [
        (
            "disk",
            f"{plan.disk / GIGA:.2f} GB: {counted(count, 'checkpoint')} of "
            f"{plan.checkpoint / GIGA:.3f} GB, and one while it is written",
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
        ("data", f"{plan.used:,} of {counted(plan.data.images, 'image')} of {plan.dataset} "
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
