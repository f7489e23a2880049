"""Flags of the pretraining method: which one, and its masks."""

import argparse
from collections.abc import Sequence

from util.flag_types import MOST_SIDE, number
from util.mask.strategies import STRATEGIES


def add_method_flag(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    """`--method`, the first of these if none is given."""
    parser.add_argument_group("method").add_argument(
        "--method",
        choices=list(methods),
        default=methods[0],
        help="mmae: M-MAE's three terms, mae: none of them"
        if "mmae" in methods
        else "of the model's class; presets flags",
    )


def add_mask_flags(group: argparse._ArgumentGroup, unset: str = "") -> None:
    """Which places are hidden, how many at once, and the settings of every strategy.

    Args:
        unset: what counts where nobody gives them, for their help; they are then None. Empty: they
            have defaults of their own.
    """
    before = len(group._group_actions)
    group.add_argument(
        "--mask",
        choices=list(STRATEGIES),
        default="random",
        help="masking strategy: which patches are hidden",
    )
    group.add_argument(
        "--mask_ratio",
        type=number(float, 0, 1, open_low=True),
        default=0.75,
        help="share of the patches that are hidden",
    )
    group.add_argument(
        "--mask_cell",
        type=number(int, 0, MOST_SIDE),
        nargs="+",
        default=[1],
        metavar="N",
        help="patches that are hidden together, one number or one for each axis; 0: the whole axis",
    )
    add_strategy_flags(group)
    for action in group._group_actions[before:] if unset else ():
        action.default, action.help = None, f"{action.help}; {unset}"


def add_strategy_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of all strategies; one that inherits its flags does not add them again."""
    added = []
    for strategy in STRATEGIES.values():
        add = getattr(strategy, "add_flags", None)
        if add is not None and add not in added:
            add(group)
            added.append(add)
