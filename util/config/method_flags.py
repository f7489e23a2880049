"""Flags of the pretraining method: its terms, their presets, its target."""

import argparse
from collections.abc import Mapping
from typing import Any

from util.config.flag_parser import FlagParser, SetTarget
from util.config.flag_types import (
    MOST_LSCALE,
    MOST_PATCHES,
    MOST_WIDTH,
    number,
    optional,
)
from util.mask.pos_embed import COORDINATES
from util.mask.strategies import ORDERS, STRATEGIES

# What `--method` presets; each flag of its own overrides.
METHODS: dict[str, dict[str, Any]] = {
    "mae": {
        "mask": "random",
        "avg_share": 0.5,
        "avg_order": "far",
        "avg_temperature": 1.0,
        "lscale_init": None,
        "pos_offset": "none",
    },
    "mmae": {
        "mask": "mixed",
        "avg_share": 0.5,
        "avg_order": "far",
        "avg_temperature": 1.0,
        "lscale_init": 0.1,
        "pos_offset": "learned",
    },
}


TARGETS = ("pixels", "norm_pixels", "pca")


PCA_PER_IMAGE = 16  # patches of one image that a PCA is fitted on


def add_method_flags(parser: FlagParser) -> None:
    """`--method` and the three terms of M-MAE."""
    group = parser.add_argument_group("method (unset terms follow --method)")
    group.add_argument(
        "--method",
        choices=list(METHODS),
        default="mmae",
        help="mmae: M-MAE's three terms, mae: none of them",
    )
    group.add_argument(
        "--mask",
        choices=list(STRATEGIES),
        default=argparse.SUPPRESS,
        help="which patches are hidden",
    )
    group.add_argument(
        "--avg_share",
        type=number(float, 0, 1),
        default=argparse.SUPPRESS,
        help="share of the masked patches that --mask mixed picks by their average",
    )
    group.add_argument(
        "--avg_order",
        choices=ORDERS,
        default=argparse.SUPPRESS,
        help="which averages are masked first: far from or near the image's own mean, high or low",
    )
    group.add_argument(
        "--avg_temperature",
        type=number(float, 0),
        default=argparse.SUPPRESS,
        help="factor of the Gumbel noise on the averages' score; 0: strict order",
    )
    group.add_argument(
        "--lscale_init",
        type=optional(number(float, 0, MOST_LSCALE, open_low=True)),
        default=argparse.SUPPRESS,
        help="LScale's gamma at the start; none: no LScale",
    )
    group.add_argument(
        "--branch_init",
        type=number(float, 0, MOST_LSCALE),
        default=1.0,
        help="factor on the last weights of each branch at the start (the control of LScale)",
    )
    group.add_argument(
        "--pos_offset",
        choices=list(COORDINATES),
        default=argparse.SUPPRESS,
        help="of the sin-cos positions: none counts from 0 (MAE), center from the image's centre; "
        "learned: and trained phases; jitter: and a random shift of each training image",
    )


def resolve_method(settings: argparse.Namespace) -> None:
    """Fill the terms that no flag set from `--method`, in place."""
    fill_unset(settings, METHODS[settings.method])


def fill_unset(settings: argparse.Namespace, preset: Mapping[str, Any]) -> None:
    """Set what no flag has set, in place; such flags have the default `argparse.SUPPRESS`."""
    for name, value in preset.items():
        if not hasattr(settings, name):
            setattr(settings, name, value)


def add_target_flags(parser: FlagParser) -> None:
    """What the decoder predicts."""
    group = parser.add_argument_group("target")
    group.add_argument(
        "--target",
        choices=TARGETS,
        action=SetTarget,
        default="pixels",
        help="norm_pixels: patches normalised by themselves; pca: their PCA coefficients",
    )
    group.add_argument(
        "--norm_pix_loss",
        action=SetTarget,
        nargs=0,
        const=True,
        default=False,
        help="predict normalised pixels; MAE's name of --target norm_pixels",
    )
    group.add_argument(
        "--pca_components",
        type=number(int, 1, MOST_WIDTH),
        default=96,
        help="coefficients of --target pca",
    )
    group.add_argument(
        "--pca_patches",
        type=number(int, 2, MOST_PATCHES),
        default=65536,
        help=f"training patches to fit the PCA on, {PCA_PER_IMAGE} of an image where there are "
        "enough images; the checkpoint keeps the fit",
    )
