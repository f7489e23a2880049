"""The flag that says which weights of a file are meant."""

import argparse


def add_weights_key_flag(group: argparse._ArgumentGroup) -> None:
    """`--weights_key`, wherever weights of other programs are read."""
    group.add_argument(
        "--weights_key",
        metavar="NAME",
        help="which weights of a file that holds several: the key that they are under, or what "
        "their names begin with, such as model_ema, student, target_encoder; default: "
        "found, or asked for",
    )
