"""Flags of main_visualize.py."""

from util.config.flags import (
    FlagParser,
    add_device_flag,
    add_pixels_flag,
    add_split_flags,
    number,
)
from util.config.method_flags import add_mask_flags
from util.config.weights_flags import add_autoencoder_flags
from util.data.datasets import DATASETS
from util.flag_types import expanded_path

RESULT = "reconstruction.json"


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description="Show what a pretrained model reconstructs: a picture grid, and each panel as "
        "a file of its own.",
        example="python main_visualize.py --checkpoint RUN/checkpoint-last.pth \\\n"
        "  --images PHOTOS/ --output_dir pictures",
        first=(
            "checkpoint", "images", "dataset", "data_path", "num_images", "mask", "mask_ratio",
            "seed", "measure", "output_dir", "device",
        ),
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint",
        type=expanded_path,
        metavar="FILE",
        help="pretraining checkpoint of ours (a file or its run folder), or official MAE "
        "weights with their decoder; no default",
    )
    parser.add_argument(
        "--images",
        type=expanded_path,
        nargs="+",
        help="image files and folders of them; default: those of --dataset",
    )
    parser.add_argument(
        "--dataset",
        choices=list(DATASETS),
        help="held-out images of a data set; default: none, --images are shown",
    )
    parser.add_argument(
        "--data_path",
        type=expanded_path,
        help="folder of --dataset; or packed:DIR, hf:NAME_OR_DIR; default: its own place",
    )
    add_split_flags(parser)
    add_pixels_flag(parser)
    parser.add_argument(
        "--num_images", type=number(int, 1), default=8, help="number of images, at most"
    )
    group = parser.add_argument_group(
        "masks (default: those of the checkpoint's run; --measure: 75 % random, and the run's)"
    )
    add_mask_flags(group, unset="default: the run's")
    parser.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the random masks"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help=f"no pictures: PSNR and SSIM over --num_images of --dataset, into {RESULT}",
    )
    parser.add_argument(
        "--output_dir",
        type=expanded_path,
        default="./pictures",
        help="folder for grid.png and panels",
    )
    add_device_flag(parser)
    add_autoencoder_flags(parser)
    return parser
