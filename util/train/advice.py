"""Settings that cannot work are refused; those that may be meant, and rarely are, are said.

The same rules hold for a run and for its `--dry_run`. What one flag alone cannot be is its type's
business (`util.flag_types`); here is what several are together.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.console import counted
from util.errors import BadInput
from util.progress import say

# More of an epoch than this left out, because it fills no step, is worth a word.
TAIL = 0.1
# So many times another learning rate, or a smaller batch, than the published recipe's.
FAR_RATE, FAR_BATCH = 10, 8
# Sets that come with a package or are drawn: they read no --data_path.
PATHLESS = ("digits", "photos", "synthetic")
# Pairs of which the first must not be larger.
RANGES = ("crop_scale", "ratio_range", "cutmix_minmax")
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Published:
    """What the published recipe has, that a run is held to.

    Attributes:
        blr: base learning rate.
        batch: global batch.
        of: what it is for.
        images: data sets of this size and larger are held to it.
    """

    blr: float
    batch: int
    model: str = "ViT-B and larger on ImageNet"
    images: int = 1_000_000


# ---- Refused -----------------------------------------------------------------------------------


def check_settings(values: Mapping[str, Any]) -> None:
    """Refuse flags of one command that cannot be meant together.

    Args:
        values: the resolved flags of any main; a rule holds where its flags are.

    Raises:
        BadInput: with the first that is wrong.
    """
    for name in RANGES:
        low, high = values.get(name) or (0, 0)
        if low > high:
            raise BadInput(f"--{name} {low:g} {high:g}: MIN is above MAX; give them in order")
    outputs = {name: values.get(name) for name in ("output_dir", "log_dir")}
    for name, folder in outputs.items():
        if folder:
            check_outside(f"--{name}", folder, find_roots(values))


def find_roots(values: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """The folders that a command reads images from, each with the flag that names it."""
    roots = [
        (f"--{name}", Path(one)) for name in ("images", "predict") for one in values.get(name) or ()
    ]
    place, dataset = values.get("data_path"), values.get("dataset")
    if place and place.startswith("hf:"):
        roots.append(("--data_path", Path(place.removeprefix("hf:").partition("?")[0])))
    elif place and not place.startswith("packed:") and dataset not in PATHLESS:
        inside = ("images", "annotations") if dataset == "ade20k" else SPLITS
        parts = [Path(place) / name for name in inside]
        # A folder of images without train/ and val/ is the training set itself.
        whole = dataset == "imagefolder" and not any(part.is_dir() for part in parts)
        roots += [("--data_path", part) for part in ([Path(place)] if whole else parts)]
    return [(flag, root) for flag, root in roots if root.is_dir()]


def check_outside(flag: str, folder: str, roots: Sequence[tuple[str, Path]]) -> None:
    """Refuse a folder to write into that lies among the images: its pictures would become some.

    Class folders are often links, so where these lead to counts as inside too.

    Raises:
        BadInput: it does.
    """
    place = Path(os.path.realpath(folder))
    for reader, root in roots:
        try:
            with os.scandir(root) as entries:
                links = [entry.path for entry in entries if entry.is_symlink()]
        except OSError:
            continue  # whoever lists the images says that they cannot be
        for inside in (str(root), *links):
            if os.path.isdir(inside) and place.is_relative_to(os.path.realpath(inside)):
                raise BadInput(
                    f"{flag} {folder} lies in {inside}, whose images {reader} reads: the pictures "
                    f"that are written would become data; give {flag} a folder outside of it"
                )


def need_two(images: int, where: str) -> None:
    """Refuse a batch of one image where BatchNorm has one value per channel.

    Args:
        images: of all processes at once, in one micro-step.
        where: the BatchNorm stands.

    Raises:
        BadInput: there are fewer than two.
    """
    if images < 2:
        raise BadInput(
            f"BatchNorm {where} needs two images at once: --batch_size 2, or more processes"
        )


# ---- Said --------------------------------------------------------------------------------------


def say_warnings(warnings: Sequence[str]) -> None:
    """For the reader, and for the run's log where one is open."""
    for text in warnings:
        say(f"warning: {text}")


def warn_of_course(
    published: Published,
    *,
    global_batch: int,
    images: int,
    length: int,
    warmup: float,
    unit: str,
    lr: float,
    min_lr: float,
) -> list[str]:
    """What a user would want to be told of batch and learning rate, most serious first.

    Args:
        published: what they are held to.
        global_batch: images per optimiser step.
        images: of the training set.
        length, warmup: of the run, in `unit`: epochs or iterations.
        lr, min_lr: at the peak and at the end.
    """
    found = []
    if images < global_batch:
        found.append(
            f"the global batch {global_batch:,} is larger than the data, {images:,} images: there "
            "would be no step; lower --batch_size or --accum_iter"
        )
    elif images % global_batch > TAIL * images:
        left = images % global_batch
        found.append(
            f"{left:,} of {images:,} images ({left / images:.0%}) fill no step and are left out, "
            f"other ones in each epoch: the global batch {global_batch:,} is large for the data"
        )
    if warmup >= length:
        one = unit.removesuffix("s")
        found.append(
            f"the warm-up of {counted(warmup, one)} is as long as training "
            f"({counted(length, one)}) or longer: the learning rate never falls; shorten it by "
            f"--warmup_{unit}"
        )
    blr = lr * 256 / global_batch
    ratio = blr / published.blr
    held = images >= published.images  # small sets and models have other rates and batches
    if lr == 0:
        found.append("the peak lr is 0: nothing learns")
    elif held and not 1 / FAR_RATE < ratio < FAR_RATE:
        size = f"{ratio:.3g} x" if ratio >= FAR_RATE else f"1/{1 / ratio:.3g} of"
        found.append(
            f"lr {lr:.3g} is base lr {blr:.3g} at this batch, {size} the published recipe's "
            f"{published.blr:.3g} (that of {published.model})"
        )
    if min_lr > lr:
        found.append(f"--min_lr {min_lr:.3g} is above the peak lr {lr:.3g}: the rate rises")
    if held and global_batch * FAR_BATCH <= published.batch:
        found.append(
            f"the global batch {global_batch:,} is far below the published recipe's "
            f"{published.batch:,}: more processes, or a larger --accum_iter"
        )
    return found


def warn_of_start(finetune: str | None, tune: str, layer_decay: float) -> list[str]:
    """That fine-tuning starts from random weights, where the flags are those of a pretrained start.

    Training from scratch has neither frozen blocks nor smaller rates for the first ones.
    """
    if finetune is not None or (tune == "full" and layer_decay == 1):
        return []
    what, instead = f"--tune {tune}", "--tune full"
    if tune == "full":
        what, instead = f"--layer_decay {layer_decay:g}", "--layer_decay 1"
    return [
        f"there is no --finetune, so the encoder starts from random weights, and {what} is for a "
        f"pretrained one; name its checkpoint, or give {instead} and a rate for random weights"
    ]


def warn_of_shards(shard: bool, processes: int) -> list[str]:
    """That one process has nobody to share a model with."""
    alone = shard and processes == 1
    return ["--shard has no effect with one process: it keeps the whole model"] if alone else []


def warn_of_flags(values: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Flags that were given and do nothing beside the others.

    Args:
        values: the resolved flags of any main; a rule holds where its flags are.
        given: names of those that a recipe or the command line has.
    """
    found = []
    if values.get("data_path") and values.get("dataset") in PATHLESS:
        found.append(
            f"--data_path {values['data_path']} is not used: the data set {values['dataset']} has "
            "no files of its own"
        )
    for names, idle, why in (
        # No mask named: that of the checkpoint's run.
        (
            ("avg_order", "avg_temperature"),
            values.get("mask") not in (None, "average", "mixed"),
            "mask",
        ),
        (("avg_share",), values.get("mask") not in (None, "mixed"), "mask"),
        (("pca_components", "pca_patches"), values.get("target") != "pca", "target"),
        (("crop_scale",), values.get("augment") in ("none", "fixed_crop"), "augment"),
        (("color_jitter",), bool(values.get("aa")), "aa"),
        (("remode", "recount"), not values.get("reprob"), "reprob"),
        (
            ("mixup_prob", "mixup_switch_prob", "mixup_mode"),
            not any(values.get(name) for name in ("mixup", "cutmix", "cutmix_minmax")),
            "mixup",
        ),
        (("val_images",), values.get("eval_every") == 0, "eval_every"),
    ):
        for name in names:
            # A value of 0 or none says that it is not wanted, which is what happens.
            if idle and name in given and values.get(name) and why in values:
                setting = values[why] if values[why] is not None else "none"
                found.append(f"--{name} has no effect with --{why} {setting}")
    return found
