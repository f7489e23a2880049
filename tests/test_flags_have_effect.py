"""Every flag of every command is read by what the command does."""

import argparse
import ast
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
from commands import COMMANDS
from launch import ROOT

from util.config.flags import FlagParser, add_dry_run_flags, run_options
from util.mask.strategies import STANDARD
from util.slurm import add_job_flags

# The files beside a main that are its own.
PARTS = ("build", "eval", "plan")
# What only a dry run calls: a flag that is read there alone does nothing in a run.
PLANS = ("plan_run", "planned_model", "rate_here")
# Flags that are for the parser, and those that are accepted and say that they do nothing.
READ_BY_THE_PARSER, SAID_TO_DO_NOTHING = {"help", "help_all", "config", "plugin"}, {"dist_eval"}


class Everything:
    """Settings that have every name."""

    def __getattr__(self, name: str) -> Any:
        return None


def read_names(source: str, settings: str = "args", without: tuple[str, ...] = ()) -> set[str]:
    """Attributes of a variable that a source reads, `getattr(args, "name")` among them."""
    found = set()
    for node in nodes(ast.parse(source), without):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and ast.unparse(node.value) == settings
        ):
            found.add(node.attr)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and ast.unparse(node.args[0]) == settings
            and isinstance(node.args[1], ast.Constant)
        ):
            found.add(node.args[1].value)
    return found


def nodes(tree: ast.AST, without: tuple[str, ...]) -> Iterator[ast.AST]:
    """All nodes but those inside some functions."""
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.FunctionDef) and child.name in without):
            yield child
            yield from nodes(child, without)


def value_names(source: str) -> set[str]:
    """Words in the functions of a source that are handed the values of all flags."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    handed = [f for f in functions if "values" in {argument.arg for argument in f.args.args}]
    found = [node.value for f in handed for node in ast.walk(f) if isinstance(node, ast.Constant)]
    return {value for value in found if isinstance(value, str)}


# Flags that a source reads by a list of their names: the words that do so, and the names.
SESSION = (ROOT / "util/config/session_flags.py").read_text()
FLAGS = ast.parse((ROOT / "util/config/flags.py").read_text())
COURSE = ast.unparse(
    next(n for n in FLAGS.body if isinstance(n, ast.FunctionDef) and n.name == "read_course")
)
WEIGHTS = (ROOT / "util/config/weights_flags.py").read_text()
READ_TOGETHER = {
    "session_settings(args, ": (
        read_names(SESSION, "settings")
        | read_names(COURSE, "settings")
        | set(run_options(Everything()))
    ),
    "build_masker(vars(args), ": set(STANDARD),
    "read_hold_out(vars(args))": {"val_fraction", "val_seed"},
    "all_mask_settings()": set(STANDARD),
    "encoder_options(args)": read_names(WEIGHTS, "settings"),
    "autoencoder_options(args)": read_names(WEIGHTS, "settings"),
    "kind.from_args(vars(args))": {
        word
        for name in ("models_mmae.py", "models_targets.py")
        for word in value_names((ROOT / name).read_text())
    },
}


def names_of(add: Any) -> set[str]:
    """The flags that a function adds to a parser."""
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    return {action.dest for action in parser._actions}


def flags_without_effect(parser: argparse.ArgumentParser, source: str) -> set[str]:
    """The flags of a command that its source does not read where it runs."""
    read = read_names(source, without=PLANS)
    for words, names in READ_TOGETHER.items():
        read |= names if words in source else set()
    read |= names_of(add_dry_run_flags) & read_names(source)
    flags = {action.dest for action in parser._actions}
    return flags - read - READ_BY_THE_PARSER - SAID_TO_DO_NOTHING


@pytest.mark.parametrize("main", COMMANDS)
def test_every_flag_is_read(main: str) -> None:
    module = importlib.import_module(main)
    own = [f"{main.replace('.', '/')}.py", *(main.replace("main", part) + ".py" for part in PARTS)]
    source = "\n".join((ROOT / name).read_text() for name in own if (ROOT / name).exists())
    assert flags_without_effect(module.build_parser(), source) == set()


def test_every_flag_of_a_job_is_read() -> None:
    source = (ROOT / "util/slurm.py").read_text()
    assert names_of(add_job_flags) - read_names(source, "job") == set()


def test_a_flag_that_only_the_dry_run_reads_is_found() -> None:
    parser = FlagParser()
    parser.add_argument("--used")
    parser.add_argument("--planned")
    parser.add_argument("--forgotten")
    add_dry_run_flags(parser)
    source = """
def plan_run(args):
    return args.planned, args.dry_run_images, args.dry_run_processes, args.dry_run_measure
def main(args):
    args.forgotten = args.used or args.dry_run or getattr(args, "images_per_second")
"""
    assert flags_without_effect(parser, source) == {"planned", "forgotten"}
