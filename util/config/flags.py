"""Flags and recipes: what the user asked for, resolved once and checked."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from util.config.flag_parser import FlagParser
from util.data.images import IMAGE_DECODERS
from util.data.pixel_limits import MOST_PIXELS
from util.data.transforms import AUGMENTS, INTERPOLATIONS
from util.errors import BadInput
from util.flag_types import (
    LEAST_CROP,
    MOST_IMAGE,
    MOST_IN_BATCH,
    MOST_PREFETCHED,
    MOST_RATE,
    MOST_TASKS,
    MOST_WIDTH,
    expanded_path,
    number,
    processes_flag,
    size_pair,
)
from util.plugins import loaded_plugins
from util.train.schedule import SCHEDULES, Course
from util.train.step import PRECISIONS

# Flags that may differ on resume: they change where and how often, and no number.
HOUSEKEEPING = {
    "output_dir", "log_dir", "device", "num_workers", "pin_mem", "log_every", "save_every",
    "eval_every", "resume", "list_models", "data_path", "batch_size", "accum_iter", "save_minutes",
    "keep", "allow_changes", "nan_policy", "grad_checkpointing", "max_bad_images", "shard",
    "prefetch_factor", "compile", "plugin",
    "dry_run", "dry_run_images", "dry_run_processes", "dry_run_measure", "images_per_second",
}  # fmt: skip

# What holds for one start alone: the recipe, and the permission to go on with other settings.
NOT_KEPT = {"config", "allow_changes"}


def collect_settings(settings: argparse.Namespace) -> dict[str, Any]:
    """The resolved flags in plain types; written as YAML they are a recipe that gives the same."""
    return {
        name: "x".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in sorted(vars(settings).items())
        if name not in NOT_KEPT
    }


def add_data_flags(
    parser: FlagParser, datasets: Sequence[str], *, size: str = "default: the model's"
) -> None:
    """Where images come from.

    Args:
        size: what is said of `--input_size`.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", choices=list(datasets), default="imagefolder", help="name of the data set"
    )
    group.add_argument(
        "--data_path",
        type=expanded_path,
        help="folder of the data set; or packed:DIR (of main_pack.py), hf:NAME_OR_DIR (Hugging "
        "Face); default: its own place",
    )
    group.add_argument(
        "--input_size",
        type=size_pair,
        help=f"pixels: 224 or 160x224 (H x W); {size}",
    )
    for name, what in (("--mean", "mean"), ("--std", "deviation")):
        group.add_argument(
            name,
            type=number(float, 0),
            nargs="+",
            help=f"{what} of each channel, in 0..1 units; default: the data set's",
        )
    add_pixels_flag(group)
    group.add_argument(
        "--num_workers",
        type=processes_flag(0),
        help="loading processes per training process; default: its share of the cores, at most 10",
    )
    group.add_argument(
        "--prefetch_factor",
        type=number(int, 1, MOST_PREFETCHED),
        default=2,
        help="batches that each loading process keeps ready",
    )
    group.add_argument(
        "--no_pin_mem",
        action="store_false",
        dest="pin_mem",
        help="no page-locked memory for batches on their way to a GPU",
    )


def add_split_flags(parser: FlagParser) -> None:
    """`--val_fraction`, for the mains that measure or show; see `util.data.splits`."""
    group = parser.add_argument_group("data, held-out images")
    group.add_argument(
        "--val_fraction",
        type=number(float, 0, 1, open_low=True, open_high=True),
        help="hold this share of the training images out, of each class alike, and take them for "
        "val: for sets without one, and for choosing settings without looking at val; default: the "
        "set's own val",
    )
    group.add_argument(
        "--val_seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        help="seed of the --val_fraction split: the same in every command, whatever --seed is",
    )


def add_pixels_flag(group: argparse._ActionsContainer) -> None:
    """`--max_pixels`, wherever images are read."""
    group.add_argument(
        "--max_pixels",
        type=number(int, 1, MOST_IMAGE),
        metavar="N",
        help=f"image files of more pixels are not decoded (4 bytes each); default: {MOST_PIXELS}",
    )


def add_view_flags(parser: FlagParser) -> None:
    """Which images pretraining learns from, and the views that it takes of them."""
    group = parser.add_argument_group("data, pretraining")
    group.add_argument(
        "--train_images",
        type=number(int, 1),
        help="train on only so many images, evenly spaced; default: all",
    )
    group.add_argument(
        "--crop_scale",
        type=number(float, LEAST_CROP, 1),
        nargs=2,
        default=[0.2, 1.0],
        metavar=("MIN", "MAX"),
        help="share of the image's area that a random crop covers",
    )
    group.add_argument(
        "--interpolation",
        choices=list(INTERPOLATIONS),
        default="bicubic",
        help="how random crops are resampled; bicubic as MAE, bilinear as SimMIM",
    )
    group.add_argument("--no_flip", action="store_true", help="no horizontal flip")
    group.add_argument(
        "--decode",
        choices=IMAGE_DECODERS,
        default="torchvision",
        help="how training images are decoded and resampled; pil: as in MAE's code, and slower",
    )
    group.add_argument(
        "--crops_per_decode",
        type=number(int, 1, MOST_IN_BATCH),
        default=1,
        metavar="R",
        help="crops of each decoded image, in one batch; an epoch decodes every R-th image",
    )
    group.add_argument(
        "--augment",
        choices=AUGMENTS,
        default="random_crop",
        help="none: the centre, not flipped; fixed_crop: a random place at one scale; random_crop: "
        "random scale too (--crop_scale); crop_jitter: and brightness, contrast, saturation .4",
    )


def add_optimisation_flags(
    parser: FlagParser,
    unset: Sequence[str] = (),
    *,
    lengths: str = "epochs",
    peak: str = "",
    betas: Sequence[float] = (0.9, 0.999),
) -> None:
    """Batches, lengths, learning rates and precision; each main sets its own defaults.

    Args:
        unset: flags that are to be absent where nobody gave them, for `fill_unset`.
        lengths: what the run is measured in, epochs or iterations (optimiser steps).
        peak: the learning rate where neither `--lr` nor `--blr` is given; empty: `--blr` has a
            default.
        betas: default of `--betas`.
    """
    group = parser.add_argument_group("optimisation")
    images = number(int, 1, MOST_IN_BATCH)
    group.add_argument("--batch_size", type=images, default=64, help="images per process and step")
    group.add_argument(
        "--accum_iter", type=images, default=1, help="batches per step: multiplies --batch_size"
    )
    group.add_argument(f"--{lengths}", type=number(int, 1), help="length of the training")
    group.add_argument(
        f"--warmup_{lengths}",
        # Only epochs have fractions.
        type=number(float if lengths == "epochs" else int, 0),
        help=f"{lengths} over which the learning rate rises",
    )
    rate = number(float, 0, MOST_RATE)
    unset_blr = f"; default: --lr {peak}" if peak else ""
    per = "256 (or --lr_batch)" if lengths == "epochs" else "256"
    group.add_argument("--blr", type=rate, help=f"lr = blr x global batch / {per}{unset_blr}")
    group.add_argument(
        "--lr",
        type=rate,
        help=f"peak learning rate, overrides --blr; default: {peak or 'by --blr'}",
    )
    group.add_argument("--min_lr", type=rate, default=0.0, help="learning rate at the end")
    if lengths == "epochs":
        _add_schedule_flags(group, rate)
    group.add_argument(
        "--weight_decay", type=rate, default=0.05, help="weight decay of the optimiser"
    )
    group.add_argument(
        "--betas",
        type=number(float, 0, 1, open_high=True),
        nargs=2,
        default=list(betas),
        metavar=("BETA1", "BETA2"),
        help="betas of AdamW; the LARS of a linear probe has none",
    )
    group.add_argument(
        "--clip_grad",
        type=number(float, 0, open_low=True),
        help="largest norm of a step's gradient; default: no clipping",
    )
    group.add_argument(
        "--precision",
        choices=list(PRECISIONS),
        default="fp32",
        help="precision of matrix products; bf16 and fp16 are torch's autocast, weights stay "
        "float32",
    )
    group.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="compute activations again instead of keeping them: less memory, more time",
    )
    group.add_argument(
        "--nan_policy",
        choices=("stop", "skip"),
        default="stop",
        help="what to do after a loss or gradient that is not finite; its update is left out",
    )
    group.add_argument("--tf32", action="store_true", help="allow TF32 products on a GPU")
    for flag, wanted, what in (
        ("--compile", True, "train through torch.compile; the default on a GPU"),
        ("--no-compile", False, "train without torch.compile; the default on a CPU"),
    ):
        group.add_argument(flag, action="store_const", const=wanted, dest="compile", help=what)
    # Not set_defaults, which would put the marker itself into the settings.
    for action in parser._actions:
        if action.dest in unset:
            action.default = argparse.SUPPRESS


def _add_schedule_flags(group: Any, rate: Callable[[str], float]) -> None:
    """The course of the learning rate, of a run that is counted in epochs."""
    group.add_argument(
        "--schedule",
        choices=list(SCHEDULES),
        default="cosine",
        help="course of the rate after the warm-up; cosine: half a cosine to --min_lr; "
        "full_cosine: one that spans the warm-up too; steps: times --decay_rate at each of "
        "--decay_epochs (the last two as SimMIM)",
    )
    group.add_argument(
        "--warmup_lr", type=rate, default=0.0, help="learning rate at the start of the warm-up"
    )
    group.add_argument(
        "--decay_epochs",
        type=number(float, 0, open_low=True),
        nargs="+",
        help="epochs from which on --schedule steps multiplies the rate; default: none",
    )
    group.add_argument(
        "--decay_rate",
        type=number(float, 0, 1, open_low=True),
        default=0.1,
        help="factor on the rate at each of --decay_epochs",
    )
    group.add_argument(
        "--lr_batch",
        type=number(int, 1, MOST_IN_BATCH),
        help="images per step that --blr, --min_lr and --warmup_lr are given for: each is "
        "multiplied by global batch / N (SimMIM: 512); default: --blr alone, by 256",
    )


def read_course(settings: argparse.Namespace) -> Course:
    """How the learning rate goes, of resolved flags.

    Raises:
        BadInput: `--decay_epochs` and `--schedule steps` are not given together, or one of these
            epochs lies behind the end of the run.
    """
    if (settings.schedule == "steps") != bool(settings.decay_epochs):
        raise BadInput(
            "--schedule steps and --decay_epochs go together: at these epochs the rate falls"
        )
    if max(settings.decay_epochs or [0]) >= settings.epochs:
        raise BadInput(
            f"--decay_epochs {max(settings.decay_epochs):g} is not before the end of the run, "
            f"--epochs {settings.epochs}"
        )
    return Course(
        schedule=settings.schedule,
        warmup_lr=settings.warmup_lr,
        decay_epochs=tuple(settings.decay_epochs or ()),
        decay_rate=settings.decay_rate,
        lr_batch=settings.lr_batch,
    )


def add_shard_flag(parser: FlagParser) -> None:
    """`--shard`, for the mains that place their model by `util.train.shard`."""
    parser.add_argument(
        "--shard",
        action="store_true",
        help="each process keeps its share of parameters, gradients and optimiser state instead of "
        "all: for models that outgrow a GPU",
    )


def compiles(args: argparse.Namespace, device: torch.device, *, unasked: bool = True) -> bool:
    """Whether to train through torch.compile: as the flags say, else on a GPU; not in shards.

    Args:
        unasked: also where no flag says it.

    Raises:
        BadInput: `--compile` and `--shard`, which gathers weights in the middle of the graph.
    """
    if args.shard and args.compile:
        raise BadInput("--shard does not go with --compile; leave one of them out")
    by_itself = unasked and device.type == "cuda" and not args.shard
    return by_itself if args.compile is None else args.compile


def add_checkpoint_flags(parser: FlagParser, lengths: str = "epochs") -> Any:
    """When to save and how to go on; returns the group, for what else is done every so often.

    Args:
        lengths: what the run is measured in, epochs or iterations.
    """
    group = parser.add_argument_group(f"checkpoints and measurement ({lengths}; 0: never)")
    group.add_argument(
        "--save_every",
        type=number(int, 0),
        default=20,
        help=f"{lengths} between numbered checkpoints; checkpoint-last is always written",
    )
    group.add_argument(
        "--save_minutes",
        type=number(float, 0),
        default=30.0,
        help="minutes between saves of checkpoint-last, whatever the epoch; 0: none",
    )
    group.add_argument(
        "--keep",
        type=number(int, 0),
        default=0,
        help="numbered checkpoints to keep, the newest; 0: all",
    )
    group.add_argument(
        "--max_bad_images",
        type=number(int, 0),
        default=100,
        help="stop if more images than this cannot be decoded; until then other images replace "
        "them",
    )
    group.add_argument(
        "--resume",
        type=expanded_path,
        default="auto",
        help="auto: go on from the newest checkpoint of the run folder, if any; or a checkpoint to "
        "go on from where it has none; none: start anew, in a folder without one",
    )
    group.add_argument(
        "--allow_changes",
        action="store_true",
        help="resume although flags that change the result differ from the checkpoint's",
    )
    return group


def run_options(settings: argparse.Namespace) -> dict[str, Any]:
    """What `util.train.run.Run` takes from the flags as it is."""
    names = (
        "log_dir", "log_every", "nan_policy", "max_bad_images", "save_minutes", "keep",
    )  # fmt: skip
    return {name: getattr(settings, name) for name in names}


def select_arithmetic(
    settings: Mapping[str, Any], more_housekeeping: Iterable[str]
) -> dict[str, Any]:
    """The settings that change the numbers, for the checkpoint to refuse others.

    Args:
        more_housekeeping: flags of one main that do not change its numbers.
    """
    kept = {k: v for k, v in settings.items() if k not in HOUSEKEEPING | set(more_housekeeping)}
    plugins = {one["name"]: one["sha256"] for one in loaded_plugins()}
    return kept | ({"plugins": plugins} if plugins else {})


def add_heads_flag(group: argparse._ArgumentGroup) -> None:
    """`--num_heads`, wherever weights of other programs are read."""
    group.add_argument(
        "--num_heads",
        type=number(int, 1, MOST_WIDTH),
        help="attention heads, for weights that do not say; default: --model's, or those of our "
        "model of that width and depth",
    )


def add_run_flags(parser: FlagParser) -> None:
    """Where a run computes and writes."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir",
        type=expanded_path,
        default="./output_dir",
        help="folder of the run",
    )
    group.add_argument(
        "--log_dir", type=expanded_path, help="TensorBoard's folder; default: the run folder"
    )
    add_device_flag(group)
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        help="seed of all random numbers of the run",
    )
    group.add_argument(
        "--log_every", type=number(int, 1), default=20, help="steps between records in the metrics"
    )


def add_device_flag(group: argparse._ActionsContainer) -> None:
    """`--device`, which means the same in every command."""
    group.add_argument(
        "--device",
        default="auto",
        help="where to compute; auto: NVIDIA's GPU, else Apple's, else the CPU; or cuda, "
        "cuda:INDEX, mps (we have not run it on a Mac), cpu",
    )


def add_dry_run_flags(parser: FlagParser) -> None:
    """`--dry_run` and what it is to assume."""
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="print what the run would do and cost, check it, and exit; nothing is written",
    )
    group.add_argument(
        "--dry_run_images",
        type=number(int, 1),
        help="assume so many training images; default: those there are",
    )
    group.add_argument(
        "--dry_run_processes",
        type=number(int, 1, MOST_TASKS),
        help="assume so many processes; default: those started",
    )
    group.add_argument(
        "--images_per_second",
        type=number(float, 0, open_low=True),
        help="images/s of all processes together, to estimate the hours; default: no estimate",
    )
    group.add_argument(
        "--dry_run_measure",
        type=number(int, 1),
        metavar="STEPS",
        help="measure images/s of one process on drawn images now, over so many steps; default: "
        "not measured",
    )


def add_weights_key_flag(group: argparse._ArgumentGroup) -> None:
    """`--weights_key`, wherever weights of other programs are read."""
    group.add_argument(
        "--weights_key",
        metavar="NAME",
        help="which weights of a file that holds several: the key that they are under, or what "
        "their names begin with, such as model_ema, student, target_encoder; default: "
        "found, or asked for",
    )
