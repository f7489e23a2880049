"""Flags of main_tables.py, by what it makes: a plan's tables, those of papers, curves."""

from util.config.flags import FlagParser, number
from util.flag_types import expanded_path, processes_flag


def add_plan_flags(parser: FlagParser) -> None:
    """Which cells of which plan are run."""
    parser.add_argument(
        "--plan",
        type=expanded_path,
        help="YAML file of runs and tables; no default",
    )
    parser.add_argument(
        "--output_dir", type=expanded_path, help="default: output_dir/tables/ and the plan's name"
    )
    parser.add_argument(
        "--seeds",
        type=number(int, 0, 2**32 - 1),
        nargs="+",
        help="seeds to run; default: the plan's",
    )
    parser.add_argument("--jobs", type=processes_flag(1), default=1, help="runs at the same time")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="runs (or seed-S/RUN) whose name matches, such as 'knn_*', and what they need; "
        "default: all",
    )
    parser.add_argument("--list", action="store_true", help="print the cells and exit")


def add_paper_flags(parser: FlagParser) -> None:
    """Which tables of papers are filled, and from which runs."""
    group = parser.add_argument_group("tables of papers, from runs that are there")
    group.add_argument(
        "--papers",
        type=expanded_path,
        nargs="+",
        metavar="FILE",
        help="tables to fill, such as recipes/papers/mae.yaml; default: none",
    )
    group.add_argument(
        "--runs",
        type=expanded_path,
        nargs="+",
        default=["output_dir"],
        metavar="FOLDER",
        help="folders in which runs are found",
    )
    group.add_argument("--commands", action="store_true", help="print each row's commands instead")


def add_curve_flags(parser: FlagParser, tolerance: float, window: int) -> None:
    """Which curves are compared or kept.

    Args:
        tolerance: where --tolerance is not given. window: the same of --window.
    """
    group = parser.add_argument_group("curves: loss by step")
    group.add_argument(
        "--compare",
        type=expanded_path,
        nargs=2,
        metavar=("RUN", "REFERENCE"),
        help="how far two loss curves differ, and where they part; default: none",
    )
    group.add_argument(
        "--tolerance",
        type=number(float, 0),
        default=tolerance,
        help="relative difference of a stretch of steps up to which curves are the same",
    )
    group.add_argument(
        "--window", type=number(int, 1), default=window, help="steps of such a stretch, at least"
    )
    group.add_argument(
        "--save_curve",
        type=expanded_path,
        nargs=2,
        metavar=("RUN", "FILE"),
        help="keep a run of this machine and these versions as a reference; default: none",
    )
