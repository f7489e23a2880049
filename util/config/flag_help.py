"""How a command explains its flags: the few that most runs need, or all of them."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from util.console import print_text

# name of a flag -> what each of its values presets, see `FlagParser`
Presets = tuple[str, Mapping[str, Mapping[str, Any]]]

WIDEST = 100  # columns
MANY_CHOICES = 26  # characters of a list of choices that the first screen leaves to --help_all


class FlagHelp(argparse.HelpFormatter):
    """argparse's, each flag with its default.

    Args:
        presets: the flag that presets others.
        brief: short names for values, no long lists of choices, and of a text what stands before
            the first semicolon, with the default.
    """

    def __init__(self, prog: str, presets: Presets | None = None, *, brief: bool = False) -> None:
        super().__init__(prog, max_help_position=26)
        self._width = min(self._width, WIDEST)
        self.presets, self.brief = presets, brief

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", default_text(action, self.presets)
        if self.brief:
            what, *more = text.split("; ")
            if self._hides_choices(action):
                what = f"{what} (names: --help_all)"
            text = "; ".join([what, *(part for part in more if part.startswith("default"))])
        return f"{text} {default.replace('%', '%%')}".strip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.split("_")[-1].upper() if self.brief else action.dest.upper()

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if self._hides_choices(action):
            return lambda size: (default_metavar,) * size
        return super()._metavar_formatter(action, default_metavar)

    def _hides_choices(self, action: argparse.Action) -> bool:
        choices = ",".join(map(str, action.choices or ()))
        long = len(choices) > MANY_CHOICES and bool(action.option_strings)
        return self.brief and action.metavar is None and long


def default_text(action: argparse.Action, presets: Presets | None) -> str:
    """A flag's default in brackets; empty for a switch, and where the help text has to say it."""
    if action.default == argparse.SUPPRESS:
        flag, values = presets or ("", {})
        shown = {n: _shown(p[action.dest]) for n, p in values.items() if action.dest in p}
        if len(shown) == len(values) and len(set(shown.values())) == 1:
            return f"(default: {next(iter(shown.values()))})"
        parts = [f"{name} {value}" for name, value in shown.items()]
        return f"(default by --{flag}: {', '.join(parts)})" if parts else ""
    if action.default is None or isinstance(action.default, bool):
        return ""
    return f"(default: {_shown(action.default)})"


def _shown(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def first_screen(
    parser: argparse.ArgumentParser, first: Sequence[str], example: str, presets: Presets | None
) -> str:
    """The flags `first`, in this order, an example, and where the others are."""
    formatter = FlagHelp(parser.prog, presets, brief=True)
    formatter.add_text(parser.description)
    by_dest = {action.dest: action for action in reversed(parser._actions)}
    formatter.start_section("flags that most runs need")
    formatter.add_arguments([by_dest[dest] for dest in first if dest in by_dest])
    formatter.end_section()
    count = len({action.dest for action in parser._actions if action.option_strings})
    head, _, flags = formatter.format_help().partition("\n\n")
    rest = f"--help_all explains all {count} flags, by group"
    return f"{head}\n\n{example_text(example)}\n{flags}\n{rest}\n"


def example_text(example: str) -> str:
    """An example command with its heading."""
    return "example:\n" + "".join(f"  {line}\n" for line in example.splitlines())


class Help(argparse.Action):
    """Print the first screen, or with `--help_all` everything, and leave."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, *_: Any) -> None:
        """See the class."""
        everything = self.dest == "help_all"
        print_text(parser.format_help() if everything else parser.first_screen(), end="")
        parser.exit()
