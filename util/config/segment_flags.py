"""Flags of main_segment.py, and what a segmenter's are where nobody gives them."""

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
from util.data.label_values import label_pair
from util.data.segmentation_sets import SEGMENTATION_SETS
from util.flag_types import (
    MOST_CLASSES,
    MOST_LSCALE,
    MOST_SIDE,
    MOST_WIDTH,
    expanded_path,
    optional,
)

LR = 1e-4
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
LOSS_MEANS = ("all", "valid")
# How a segmenter sees an image, where neither flags nor its checkpoint say: as in MAE's ADE20K run.
LOOKS_BY_DEFAULT: dict[str, Any] = {
    "resize": [2048, 512], "inference": "slide", "window": (512, 512), "stride": (341, 341),
}  # fmt: skip
# How large a segmenter sees an image, in what parts, and what the values in masks stand for: in
# --eval and --predict as in training.
LOOKS = ("resize", "inference", "window", "stride", "scene_size", "label_map")


def build_parser(argv: Sequence[str] | None = ()) -> FlagParser:
    """The flags.

    Args:
        argv: a command line whose `--plugin` is loaded first; None: the program's own.
    """
    load_plugins(argv)
    parser = FlagParser(
        description="Train a segmenter (UPerNet) on a pretrained encoder, measure one, or segment "
        "images with it.",
        example="python main_segment.py --finetune CHECKPOINT --data_path DATA \\\n"
        "  --iterations 160000 --output_dir runs/segmented",
        first=(
            "data_path", "dataset", "finetune", "model", "channels", "input_size", "iterations",
            "batch_size", "lr", "output_dir", "eval", "predict", "device",
        ),
    )  # fmt: skip
    add_data_flags(parser, list(SEGMENTATION_SETS), size="of training crops and of the encoder")
    add_split_flags(parser)
    parser.set_defaults(dataset="ade20k", input_size=(512, 512))
    parser.add_argument(
        "--nb_classes",
        type=number(int, 1, MOST_CLASSES),
        help="classes of --dataset folder or hf:; default: those of its classes.txt, or counted",
    )
    parser.add_argument(
        "--label_map",
        type=label_pair,
        nargs="+",
        metavar="VALUE:CLASS",
        help="of --dataset folder or hf:, what the values in its masks stand for, such as 0:0 "
        "255:1, or 7:ignore; default: values are classes, 255 is ignored",
    )
    parser.add_argument(
        "--scene_size",
        type=number(int, 16, MOST_SIDE),
        default=96,
        help="side of the images of --dataset garments, in pixels",
    )
    for name, what in (("train_images", "learn from"), ("val_images", "measure on")):
        parser.add_argument(
            f"--{name}",
            type=number(int, 1),
            help=f"{what} only so many images, evenly spaced; default: all",
        )
    parser.add_argument(
        "--check_data", action="store_true", help="read every image and mask before training"
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="encoder; default: the checkpoint's")
    group.add_argument("--list_models", action="store_true", help="print the names and exit")
    group.add_argument(
        "--finetune",
        type=expanded_path,
        metavar="CHECKPOINT",
        help="encoder to start from: a file, a run folder or an https URL; default: from scratch",
    )
    add_pos_resize_flag(group)
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
        help="start of trainable branch scales, for an encoder that has none (the public run: 1); "
        "default: none",
    )
    width, below_one = number(int, 1, MOST_WIDTH), number(float, 0, 1, open_high=True)
    group.add_argument(
        "--relative_bias",
        action="store_true",
        help="relative position bias in each block, from 0, as in the public run",
    )
    group.add_argument(
        "--channels",
        type=width,
        default=768,
        help="width of the UPer head; beside a small encoder it holds most weights",
    )
    group.add_argument(
        "--aux_channels",
        type=width,
        default=256,
        help="width of the auxiliary head, which only training uses",
    )
    group.add_argument("--dropout", type=below_one, default=0.1, help="dropout in the heads")
    group.add_argument(
        "--drop_path",
        type=below_one,
        default=0.1,
        help="probability that the last block's branches are left out of a training step",
    )
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--resize",
        type=number(int, 1, MOST_SIDE),
        nargs=2,
        default=LOOKS_BY_DEFAULT["resize"],
        metavar=("LONG", "SHORT"),
        help="resize images to fit these two sides, keeping the aspect ratio; also for evaluation",
    )
    group.add_argument(
        "--ratio_range",
        type=number(float, 0.01, 100),
        nargs=2,
        default=[0.5, 2.0],
        metavar=("MIN", "MAX"),
        help="range of the random factor on --resize",
    )
    group.add_argument(
        "--cat_max_ratio",
        type=number(float, 0, 1, open_low=True),
        default=0.75,
        help="most of a crop that one class may cover",
    )
    group.add_argument("--no_flip", action="store_true", help="no horizontal flip")
    group.add_argument("--no_distortion", action="store_true", help="no photometric distortion")
    add_optimisation_flags(parser, lengths="iterations", peak=f"{LR:g}")
    parser.set_defaults(batch_size=2, iterations=160_000, warmup_iterations=1500)
    group = parser.add_argument_group("optimisation, segmentation")
    group.add_argument(
        "--layer_decay",
        type=number(float, 0, 1, open_low=True),
        default=0.65,
        help="layer decay: factor on the learning rate from each block to the one before it",
    )
    group.add_argument(
        "--aux_weight",
        type=number(float, 0, 1000),
        default=0.4,
        help="weight of the auxiliary head's loss",
    )
    group.add_argument(
        "--loss_mean",
        choices=LOSS_MEANS,
        default="all",
        help="divide the loss by all pixels, as mmsegmentation does, or by those not ignored",
    )
    add_shard_flag(parser)
    add_run_flags(parser)
    group = add_checkpoint_flags(parser, "iterations")
    parser.set_defaults(save_every=16_000)
    group.add_argument(
        "--eval_every",
        type=number(int, 0),
        default=16_000,
        help="iterations between measurements of the mIoU",
    )
    group.add_argument(
        "--pictures",
        type=number(int, 0, 1000),
        default=6,
        help="held-out images to draw as pictures each time",
    )
    group = parser.add_argument_group("inference")
    group.add_argument("--eval", action="store_true", help="evaluate --resume; no training")
    group.add_argument(
        "--predict",
        type=expanded_path,
        nargs="+",
        metavar="PATH",
        help="images, and folders of them, to segment with --resume; default: none",
    )
    group.add_argument(
        "--inference",
        choices=("slide", "whole"),
        default="slide",
        help="inference; slide: mean over overlapping windows; whole: the image at once",
    )
    group.add_argument(
        "--window",
        type=size_pair,
        default=LOOKS_BY_DEFAULT["window"],
        help="window of sliding inference, in pixels",
    )
    group.add_argument(
        "--stride",
        type=size_pair,
        default=LOOKS_BY_DEFAULT["stride"],
        help="stride of sliding inference, in pixels",
    )
    group.add_argument(
        "--multi_scale",
        action="store_true",
        help=f"mean over scales {' '.join(map(str, SCALES))}; short side at least --resize's",
    )
    group.add_argument(
        "--flip", action="store_true", help="flip testing: mean over the image and its mirror image"
    )
    add_dry_run_flags(parser)
    return parser
