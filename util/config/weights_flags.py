"""Flags of commands that read weights, and how they go on to the functions that read them."""

import argparse
from typing import Any

from util.config.flag_parser import FlagParser
from util.config.flags import add_heads_flag, add_weights_key_flag
from util.flag_types import MOST_WIDTH, number


def add_pos_resize_flag(group: argparse._ActionsContainer) -> None:
    """`--pos_resize`, wherever an encoder may run at another size than its own."""
    group.add_argument(
        "--pos_resize",
        choices=("rescale", "extend"),
        default="rescale",
        help="positions at another --input_size: rescale keeps the image's extent, extend the "
        "distance of patches",
    )


def add_encoder_flags(group: argparse._ArgumentGroup) -> None:
    """What to take for weights of an encoder that do not say what they are."""
    group.add_argument(
        "--model",
        metavar="NAME",
        help="encoder's name, for weights that do not say; default: by the file",
    )
    add_heads_flag(group)
    add_weights_key_flag(group)


def add_autoencoder_flags(parser: FlagParser) -> None:
    """What to take for weights of a masked autoencoder that do not say what they are."""
    group = parser.add_argument_group("for weights that do not say what they are")
    group.add_argument(
        "--model", metavar="NAME", help="name of the model in the file; default: by the file"
    )
    add_heads_flag(group)
    add_weights_key_flag(group)
    group.add_argument(
        "--decoder_num_heads",
        type=number(int, 1, MOST_WIDTH),
        help="the same of the decoder; default: as the encoder",
    )
    group.add_argument(
        "--norm_pix_loss", action="store_true", help="the decoder predicts normalised pixels"
    )


def encoder_options(settings: argparse.Namespace) -> dict[str, Any]:
    """What `load_classifier`, `load_encoder` and their kin in `models_load` take from the flags."""
    return {
        "name": settings.model,
        "img_size": settings.input_size,
        "pos_resize": settings.pos_resize,
        "num_heads": settings.num_heads,
    }


def autoencoder_options(settings: argparse.Namespace) -> dict[str, Any]:
    """What `load_pretrained` takes from `add_autoencoder_flags`."""
    return {
        "name": settings.model,
        "norm_pix_loss": settings.norm_pix_loss or None,
        "num_heads": settings.num_heads,
        "decoder_num_heads": settings.decoder_num_heads,
    }
