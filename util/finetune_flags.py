"""Flags of main_finetune.py alone: the model, augmentation, and what --tune presets."""

import argparse
from typing import Any

from util.config import FlagParser, add_heads_flag, number, optional, size_pair
from util.flag_types import LEAST_CROP, MOST_CHANNELS, MOST_CLASSES, MOST_LSCALE, expanded_path
from util.weights_flags import add_weights_key_flag

# Not in the namespace unless given: --tune says what they are.
UNSET: dict[str, Any] = {"default": argparse.SUPPRESS}
# What --tune presets; each flag of its own overrides. Sources: MAE, appendix A.1 (end-to-end, with
# the defaults of its main_finetune.py) and its main_linprobe.py. Partial tuning is as full.
FULL: dict[str, Any] = {
    "epochs": 50,
    "warmup_epochs": 5.0,
    "blr": 1e-3,
    "min_lr": 1e-6,
    "weight_decay": 0.05,
    "layer_decay": 0.75,
    "drop_path": 0.1,
    "global_pool": "avg",
    "aa": "rand-m9-mstd0.5-inc1",
    "smoothing": 0.1,
    "reprob": 0.25,
}
LINEAR: dict[str, Any] = {
    "epochs": 90,
    "warmup_epochs": 10.0,
    "blr": 0.1,
    "min_lr": 0.0,
    "weight_decay": 0.0,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "global_pool": "cls",
    "aa": None,
    "smoothing": 0.0,
    "reprob": 0.0,
}


def add_model_flags(parser: FlagParser) -> None:
    """What is trained, and where it starts."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="default: the checkpoint's")
    group.add_argument("--list_models", action="store_true", help="print the names and leave")
    group.add_argument(
        "--finetune",
        type=expanded_path,
        metavar="CHECKPOINT",
        help="path or https URL to start from",
    )
    group.add_argument(
        "--pos_resize",
        choices=("rescale", "extend"),
        default="rescale",
        help="positions at another size: rescale keeps the image's extent, extend the distance of "
        "patches",
    )
    group.add_argument(
        "--nb_classes", type=number(int, 1, MOST_CLASSES), help="default: the data set's"
    )
    group.add_argument(
        "--in_chans", type=number(int, 1, MOST_CHANNELS), help="from scratch; default: the data's"
    )
    add_heads_flag(group)
    add_weights_key_flag(group)
    group.add_argument("--patch_size", type=size_pair, help="from scratch; overrides the name's")
    group.add_argument(
        "--lscale_init",
        type=optional(number(float, 0, MOST_LSCALE, open_low=True)),
        help="from scratch: LScale's gamma at the start",
    )
    group.add_argument(
        "--global_pool", nargs="?", const="avg", choices=("avg", "cls"), help="by --tune", **UNSET
    )
    group.add_argument(
        "--cls_token", action="store_const", const="cls", dest="global_pool", **UNSET
    )
    group.add_argument(
        "--drop_path", type=number(float, 0, 1, open_high=True), help="by --tune", **UNSET
    )


def add_augmentation_flags(parser: FlagParser) -> None:
    """Of single images, of batches, and of the weights."""
    group = parser.add_argument_group("augmentation and regularisation")
    group.add_argument(
        "--aa", type=optional(str), help="timm's policy, by --tune; none: crop and flip", **UNSET
    )
    group.add_argument("--color_jitter", type=number(float, 0, 10), help="without --aa")
    group.add_argument(
        "--crop_scale",
        type=number(float, LEAST_CROP, 1),
        nargs=2,
        default=[0.08, 1.0],
        metavar=("MIN", "MAX"),
        help="share of the image's area that a random crop covers",
    )
    group.add_argument("--no_flip", action="store_true", help="no horizontal flip")
    group.add_argument(
        "--smoothing",
        type=number(float, 0, 1, open_high=True, why="no label would be left"),
        help="of labels, by --tune",
        **UNSET,
    )
    group.add_argument("--reprob", type=number(float, 0, 1), help="erasing, by --tune", **UNSET)
    group.add_argument("--remode", choices=("pixel", "rand", "const"), default="pixel")
    group.add_argument("--recount", type=number(int, 1, 1000), default=1)
    group.add_argument("--mixup", type=number(float, 0), default=0.0, help="alpha; 0: off")
    group.add_argument("--cutmix", type=number(float, 0), default=0.0, help="alpha; 0: off")
    group.add_argument("--cutmix_minmax", type=number(float, 0, 1), nargs=2)
    group.add_argument("--mixup_prob", type=number(float, 0, 1), default=1.0)
    group.add_argument("--mixup_switch_prob", type=number(float, 0, 1), default=0.5)
    group.add_argument("--mixup_mode", choices=("batch", "pair", "elem"), default="batch")
    group.add_argument(
        "--ema_decay",
        type=number(float, 0, 1, open_high=True, why="the averages would never move"),
        help="also keep averaged weights, measured too",
    )
