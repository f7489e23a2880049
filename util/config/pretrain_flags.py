"""Flags of main_pretrain.py: those of its own, and what --method presets."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from util.config.flags import (
    FlagParser,
    add_checkpoint_flags,
    add_data_flags,
    add_dry_run_flags,
    add_optimisation_flags,
    add_run_flags,
    add_shard_flag,
    add_split_flags,
    add_view_flags,
    number,
)
from util.config.method_flags import add_mask_flags, add_method_flag
from util.data.datasets import DATASETS
from util.flag_types import MOST_CHANNELS


def build_parser(
    name: str,
    methods: Mapping[str, Mapping[str, Any]],
    add_model_flags: Callable[[argparse.ArgumentParser], None],
) -> FlagParser:
    """The flags; MAE's keep their names and meaning.

    Args:
        name: of the model that is trained unless another is named.
        methods: what each --method presets.
        add_model_flags: adds those of the model's class.
    """
    parser = FlagParser(
        description="Pretrain a masked autoencoder: M-MAE by default, MAE with --method mae, or "
        "--method simmim | pixio.",
        first=(
            "config", "data_path", "dataset", "model", "method", "mask_ratio", "norm_pix_loss",
            "input_size", "epochs", "batch_size", "blr", "output_dir", "resume", "device",
        ),
    )  # fmt: skip
    add_method_flag(parser, list(methods))
    add_mask_flags(parser.add_argument_group("masks"))
    add_data_flags(parser, list(DATASETS))
    add_view_flags(parser)
    add_split_flags(parser)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=name,
        metavar="NAME",
        help="autoencoder; --list_models prints the names",
    )
    group.add_argument("--list_models", action="store_true", help="print the names and exit")
    group.add_argument(
        "--in_chans",
        type=number(int, 1, MOST_CHANNELS),
        help="channels of an image; default: the data set's",
    )
    add_model_flags(parser)
    usual = "--norm_pix_loss --epochs 400 " if "--norm_pix_loss" in parser.names else ""
    parser.example = (
        f"python main_pretrain.py --data_path DATA --model {name} \\\n"
        f"  {usual}--output_dir runs/pretrained"
    )
    add_optimisation_flags(parser, betas=(0.9, 0.95))
    parser.set_defaults(epochs=400, warmup_epochs=40.0, blr=1.5e-4)
    add_shard_flag(parser)
    add_run_flags(parser)
    group = add_checkpoint_flags(parser)
    group.add_argument(
        "--picture_every",
        type=number(int, 0),
        default=20,
        help="epochs between pictures of held-out images",
    )
    group.add_argument(
        "--eval_every",
        type=number(int, 0),
        default=0,
        help="epochs between measurements of PSNR and SSIM on held-out images",
    )
    group.add_argument(
        "--eval_images", type=number(int, 1), default=256, help="held-out images to measure on"
    )
    add_dry_run_flags(parser)
    parser.add_presets("method", methods)
    return parser
