"""Flags of main_predict.py."""

from util.config.flags import (
    FlagParser,
    add_device_flag,
    add_pixels_flag,
    number,
    size_pair,
)
from util.config.weights_flags import add_encoder_flags, add_pos_resize_flag
from util.flag_types import MOST_CLASSES, MOST_IN_BATCH, expanded_path, processes_flag

RESULT = "predictions.csv"


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description="Say what is on images: classes by a fine-tuned classifier, label maps by a "
        "segmenter.",
        example="python main_predict.py --checkpoint RUN/checkpoint-best.pth --data_path FOLDER",
        first=(
            "checkpoint", "data_path", "output_dir", "top_k", "input_size", "ema", "batch_size",
            "num_workers", "device",
        ),
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint",
        type=expanded_path,
        metavar="FILE",
        help="a fine-tuned classifier or a segmenter, ours or another program's: path or https "
        "URL; no default",
    )
    parser.add_argument(
        "--data_path",
        type=expanded_path,
        help="folder of images, with its sub-folders; or an image; or a .txt file of names, "
        "relative to its own folder; no default",
    )
    parser.add_argument(
        "--output_dir",
        type=expanded_path,
        default="./predictions",
        help=f"folder for {RESULT} or maps/",
    )
    parser.add_argument(
        "--top_k",
        type=number(int, 1, MOST_CLASSES),
        default=5,
        help="number of classes to list for each image, the most likely first",
    )
    add_model_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size",
        type=number(int, 1, MOST_IN_BATCH),
        default=64,
        help="images per process; a segmenter takes one at a time",
    )
    group.add_argument(
        "--num_workers",
        type=processes_flag(0),
        help="loading processes per process; default: its share of the cores, at most 10",
    )
    add_pixels_flag(group)
    add_device_flag(group)
    return parser


def add_model_flags(parser: FlagParser) -> None:
    """How the checkpoint's model sees images."""
    group = parser.add_argument_group("model (unset: as the checkpoint says)")
    group.add_argument(
        "--ema",
        action="store_true",
        help="use the averaged weights (EMA) of a fine-tuned checkpoint",
    )
    group.add_argument(
        "--input_size",
        type=size_pair,
        help="pixels, of a classifier: 224 or 160x224 (H x W); default: the checkpoint's",
    )
    add_pos_resize_flag(group)
    for name, what in (("--mean", "mean"), ("--std", "deviation")):
        group.add_argument(
            name,
            type=number(float, 0),
            nargs="+",
            help=f"{what} of each channel, in 0..1 units; default: the checkpoint's or ImageNet's",
        )
    add_encoder_flags(group)
