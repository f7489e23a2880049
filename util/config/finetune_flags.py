"""Flags of main_finetune.py: those of its own, and what --tune presets."""

import argparse
from collections.abc import Sequence
from typing import Any

from util.config.flag_parser import load_plugins
from util.config.flags import (
    FlagParser,
    add_checkpoint_flags,
    add_data_flags,
    add_dry_run_flags,
    add_heads_flag,
    add_optimisation_flags,
    add_run_flags,
    add_shard_flag,
    add_split_flags,
    add_weights_key_flag,
    number,
    size_pair,
)
from util.config.weights_flags import add_pos_resize_flag
from util.data.datasets import DATASETS
from util.flag_types import (
    LEAST_CROP,
    MOST_BLOCKS,
    MOST_CHANNELS,
    MOST_CLASSES,
    MOST_LSCALE,
    expanded_path,
    optional,
)

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


def build_parser(argv: Sequence[str] | None = ()) -> FlagParser:
    """The flags; MAE's keep their names and meaning.

    Args:
        argv: a command line whose `--plugin` is loaded first; None: the program's own.
    """
    load_plugins(argv)
    parser = FlagParser(
        description="Train a classifier on a pretrained encoder: all of it, its last blocks, or a "
        "linear probe.",
        example="python main_finetune.py --finetune CHECKPOINT --data_path DATA \\\n"
        "  --epochs 100 --blr 5e-4 --output_dir runs/finetuned",
        first=(
            "data_path", "dataset", "finetune", "model", "tune", "input_size", "epochs",
            "batch_size", "blr", "output_dir", "resume", "eval", "device",
        ),
        presets=("tune", {"full": FULL, "linear": LINEAR}),
    )  # fmt: skip
    parser.add_argument(
        "--tune",
        default="full",
        help="what is trained: full, partial:K or linear; K: the last blocks, 0.5 the last MLP, 0 "
        "as linear",
    )
    add_data_flags(parser, list(DATASETS))
    add_split_flags(parser)
    for name, what in (("train_images", "learn from"), ("val_images", "measure on")):
        parser.add_argument(
            f"--{name}",
            type=number(int, 1),
            help=f"{what} only so many images, evenly spaced; default: all",
        )
    add_model_flags(parser)
    add_augmentation_flags(parser)
    add_optimisation_flags(
        parser, unset=("epochs", "warmup_epochs", "blr", "min_lr", "weight_decay")
    )
    group = parser.add_argument_group("optimisation, fine-tuning")
    group.add_argument(
        "--layer_decay",
        type=number(float, 0, 1, open_low=True),
        help="layer decay: factor on the learning rate from each block to the one before it",
        **UNSET,
    )
    add_shard_flag(parser)
    add_run_flags(parser)
    group = add_checkpoint_flags(parser)
    group.add_argument(
        "--eval_every", type=number(int, 0), default=1, help="epochs between measurements"
    )
    group.add_argument(
        "--eval", action="store_true", help="evaluate --resume or --finetune; no training"
    )
    group.add_argument(
        "--dist_eval",
        action="store_true",
        help="accepted for MAE's commands; evaluation is exact on any number of processes "
        "without it",
    )
    add_dry_run_flags(parser)
    return parser


def add_model_flags(parser: FlagParser) -> None:
    """What is trained, and where it starts."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="encoder; default: the checkpoint's")
    group.add_argument("--list_models", action="store_true", help="print the names and exit")
    group.add_argument(
        "--finetune",
        type=expanded_path,
        metavar="CHECKPOINT",
        help="weights to start from: a file, a run folder or an https URL; default: from scratch",
    )
    add_pos_resize_flag(group)
    group.add_argument(
        "--nb_classes",
        type=number(int, 1, MOST_CLASSES),
        help="outputs of the head; default: the data set's classes",
    )
    group.add_argument(
        "--in_chans",
        type=number(int, 1, MOST_CHANNELS),
        help="image channels of a model trained from scratch; default: the data's",
    )
    add_heads_flag(group)
    add_weights_key_flag(group)
    group.add_argument(
        "--patch_size",
        type=size_pair,
        help="patch size of a model trained from scratch, in pixels; default: that of --model",
    )
    group.add_argument(
        "--lscale_init",
        type=optional(number(float, 0, MOST_LSCALE, open_low=True)),
        help="initial value of LScale's gamma in a model trained from scratch; default: no LScale",
    )
    group.add_argument(
        "--global_pool",
        nargs="?",
        const="avg",
        choices=("avg", "cls"),
        help="what the head reads: the mean of the patch tokens, or the class token; without a "
        "value: avg",
        **UNSET,
    )
    group.add_argument(
        "--cls_token",
        action="store_const",
        const="cls",
        dest="global_pool",
        help="MAE's name of --global_pool cls",
        **UNSET,
    )
    group.add_argument(
        "--probe_block",
        type=number(int, 1, MOST_BLOCKS),
        metavar="N",
        help="a linear probe behind the N-th block of --finetune, not the last (SimMIM's ViT: 8); "
        "default: the last",
    )
    group.add_argument(
        "--drop_path",
        type=number(float, 0, 1, open_high=True),
        help="probability that the last block's branches are left out of a training step",
        **UNSET,
    )


def add_augmentation_flags(parser: FlagParser) -> None:
    """Of single images, of batches, and of the weights."""
    group = parser.add_argument_group("augmentation and regularisation")
    group.add_argument(
        "--aa",
        type=optional(str),
        help="timm's policy of automatic augmentation; none: crop and flip only",
        **UNSET,
    )
    group.add_argument(
        "--color_jitter",
        type=number(float, 0, 10),
        help="strength of colour changes where --aa is none; default: none",
    )
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
        help="label smoothing: share of a label spread over all classes",
        **UNSET,
    )
    group.add_argument(
        "--reprob",
        type=number(float, 0, 1),
        help="probability that a part of an image is erased",
        **UNSET,
    )
    group.add_argument(
        "--remode",
        choices=("pixel", "rand", "const"),
        default="pixel",
        help="erased parts become: noise by pixel, one random colour, or zero",
    )
    group.add_argument(
        "--recount", type=number(int, 1, 1000), default=1, help="erased parts of an image, at most"
    )
    group.add_argument(
        "--mixup", type=number(float, 0), default=0.0, help="alpha of mixup (.8 is usual); 0: off"
    )
    group.add_argument(
        "--cutmix", type=number(float, 0), default=0.0, help="alpha of CutMix (1 is usual); 0: off"
    )
    group.add_argument(
        "--cutmix_minmax",
        type=number(float, 0, 1),
        nargs=2,
        metavar=("MIN", "MAX"),
        help="CutMix with boxes of such shares of each side, in place of alpha; default: by alpha",
    )
    group.add_argument(
        "--mixup_prob",
        type=number(float, 0, 1),
        default=1.0,
        help="probability of mixup or CutMix, for each --mixup_mode",
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=number(float, 0, 1),
        default=0.5,
        help="probability of CutMix rather than mixup, where both are on",
    )
    group.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="mixup's parameters are drawn for a batch, a pair of images, or each image",
    )
    group.add_argument(
        "--ema_decay",
        type=number(float, 0, 1, open_high=True, why="the averages would never move"),
        help="also keep averaged weights with this decay, measured too; default: none",
    )
