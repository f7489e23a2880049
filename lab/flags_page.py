"""`docs/flags.md`, made from the parsers.

python -m lab.flags_page
"""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

from util.config.flag_help import default_text
from util.config.flags import FlagParser
from util.console import print_text
from util.files import write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "flags.md"
COMMANDS = sorted(path.stem for path in ROOT.glob("main_*.py"))
HEAD = """# Flags

Every flag of every command, made from the parsers by `python -m lab.flags_page`. `--help_all` of a
command prints the same. A recipe (`--config FILE.yaml`) has the flags' names as keys.
`submitit_*.py` takes the flags of its main, and those of the job. Flags of methods, masks and
targets are those of the methods that come with the framework.
"""


def cell(text: str) -> str:
    """A text that stays in its cell of a table, and is no markup."""
    text = text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return " ".join(text.split())


def describe_default(action: argparse.Action, parser: FlagParser) -> str:
    """What counts where the flag is not given; empty: the help text says it."""
    return default_text(action, parser.presets).removeprefix("(default").strip("(): ")


def make_rows(parser: FlagParser, group: argparse._ArgumentGroup) -> Iterator[str]:
    """The flags of a group as rows of a table."""
    for action in group._group_actions:
        words = [f"`{word}`" for word in action.option_strings] or [f"`{action.dest}`"]
        text = (action.help or "") % {"prog": parser.prog, "default": action.default}
        if action.choices is not None and action.metavar is None:
            text = f"{text}; one of {', '.join(map(str, action.choices))}"
        yield f"| {', '.join(words)} | {cell(text)} | {cell(describe_default(action, parser))} |"


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name in COMMANDS:
        parser: FlagParser = importlib.import_module(name).build_parser()
        lines += [f"## {name}.py\n", f"{parser.description}\n"]
        for group in parser._action_groups:
            if rows := list(make_rows(parser, group)):
                title = "" if group.title == "options" else f"**{group.title}**\n\n"
                table = "\n".join(["| flag | what | default |", "|---|---|---|", *rows])
                lines.append(f"{title}{table}\n")
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    write_text(PAGE, page())
    print_text(f"written  {PAGE}")


if __name__ == "__main__":
    main()
