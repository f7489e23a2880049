"""Flags of main_knn.py."""

from util.config.flags import (
    FlagParser,
    add_data_flags,
    add_device_flag,
    add_dry_run_flags,
    add_split_flags,
    number,
)
from util.config.weights_flags import add_encoder_flags, add_pos_resize_flag
from util.data.datasets import DATASETS
from util.flag_types import MOST_IN_BATCH, expanded_path

RESULT = "knn.json"
FEATURES = ("cls", "avg", "both")


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description="Weighted k-nearest-neighbour accuracy of an encoder's features, without any "
        "training.",
        example="python main_knn.py --checkpoint RUN/checkpoint-last.pth --data_path DATA \\\n"
        "  --output_dir runs/knn",
        first=(
            "checkpoint", "model", "data_path", "dataset", "input_size", "features", "k",
            "train_images", "val_images", "batch_size", "output_dir", "save_features", "device",
        ),
    )  # fmt: skip
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        type=expanded_path,
        metavar="FILE",
        help="weights of ours, official MAE or timm: a file, a run folder or an https URL; no "
        "default",
    )
    add_encoder_flags(group)
    add_pos_resize_flag(group)
    add_data_flags(parser, list(DATASETS))
    add_split_flags(parser)
    add_neighbour_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", type=expanded_path, default="./output_dir", help=f"folder for {RESULT}"
    )
    add_device_flag(group)
    group.add_argument(
        "--save_features",
        action="store_true",
        help="also write the features; features-{train,val}.npy, float32 [N, D], not normalised, "
        "in the order of files-{train,val}.txt, and labels-{train,val}.npy, -1 without labels and "
        "(beside a row of zeros) for undecodable images; without labels or with one split these "
        "alone",
    )
    add_dry_run_flags(parser)
    return parser


def add_neighbour_flags(parser: FlagParser) -> None:
    """What is compared, and how neighbours vote."""
    group = parser.add_argument_group("features and neighbours")
    group.add_argument(
        "--features",
        choices=FEATURES,
        default="avg",
        help="class token, mean of the patch tokens, or both concatenated",
    )
    group.add_argument(
        "--k",
        type=number(int, 1),
        nargs="+",
        default=[20],
        help="numbers of neighbours; several are measured in one pass",
    )
    group.add_argument(
        "--temperature",
        type=number(float, 0, open_low=True),
        default=0.07,
        help="temperature of a neighbour's vote, exp(similarity / temperature)",
    )
    for name, what in (("train_images", "compare with"), ("val_images", "classify")):
        group.add_argument(
            f"--{name}",
            type=number(int, 1),
            help=f"{what} only so many images, evenly spaced; default: all",
        )
    group.add_argument(
        "--batch_size", type=number(int, 1, MOST_IN_BATCH), default=128, help="images per process"
    )
    group.add_argument(
        "--query_chunk",
        type=number(int, 1),
        default=2048,
        help="queries at a time, over all processes; changes memory and time, never the result",
    )
    group.add_argument(
        "--bank_chunk",
        type=number(int, 1),
        default=8192,
        help="training images compared at a time, per process",
    )
