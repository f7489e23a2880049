"""The parser of every command: recipe first, then the command line, and messages for people."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from util.config.flag_help import FlagHelp, Help, Presets, example_text, first_screen
from util.config.recipes import read_layers, read_recipe
from util.console import SHOWN, shown
from util.errors import BadInput
from util.flag_types import expanded_path
from util.names import did_you_mean
from util.plugins import load_plugin


class StrictParser(argparse.ArgumentParser):
    """argparse without abbreviations and without exits: a bad flag is a `BadInput`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which for dozens of flags buries the message."""
        raise BadInput(message)


class FlagParser(StrictParser):
    """The flags of a main and their recipe; a wrong name is an error that names the nearest one.

    Args:
        example: a command that works, for `--help`; a long one has lines that end with a backslash.
        first: the flags (their dest) that most runs need; `--help` shows them, in this order.
        presets: of a flag that presets others: its name, and for each value what that presets.

    Attributes:
        given: what the last `parse` found in recipe or command line, by the flags' dest; the rest
            have their defaults.
    """

    given: frozenset[str] = frozenset()
    presets: Presets | None
    filled = False  # whether `parse` fills in what is preset

    def __init__(
        self,
        *,
        example: str = "",
        first: Sequence[str] = (),
        presets: Presets | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            add_help=False,
            usage="python %(prog)s [flags]",
            formatter_class=lambda prog: FlagHelp(prog, self.presets),
            **kwargs,
        )
        self.example, self.first, self.presets = example, tuple(first), presets
        self.add_argument("-h", "--help", action=Help, help="show the flags that most runs need")
        self.add_argument("--help_all", action=Help, help="show all flags, by group")
        self.add_argument(
            "--config",
            type=expanded_path,
            metavar="RECIPE",
            help="YAML file of flags; those of the command line win; default: none",
        )
        self.add_argument(
            "--plugin",
            type=expanded_path,
            nargs="+",
            metavar="FILE",
            help="Python files of yours that register models, encoders, masks, data sets or "
            "targets; default: none",
        )

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Recipe first, then the command line (None: the program's own).

        Plugins are loaded here at the latest; who builds flags from registries loads them before.

        Raises:
            BadInput: an unknown flag or key, or a value that its flag does not take.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        load_plugins(argv)
        recipe = early_values(argv)["config"]
        tokens = self._recipe_tokens(Path(recipe)) if recipe else []
        words = (word.split("=")[0] for word in tokens + argv)
        known = self._option_string_actions
        self.given = frozenset(known[word].dest for word in words if word in known)
        settings, unknown = self.parse_known_args(tokens + argv)
        if unknown:
            flags = [a for a in unknown if a.startswith("-")] or unknown
            self.error(f"unknown argument {flags[0][:SHOWN]}{self._nearest(flags[0])}")
        if self.presets is not None and self.filled:
            flag, presets = self.presets
            fill_unset(settings, presets[getattr(settings, flag)])
        return settings

    @property
    def names(self) -> list[str]:
        """All flags, as they are typed."""
        return list(self._option_string_actions)

    def add_presets(self, flag: str, presets: Mapping[str, Mapping[str, Any]]) -> None:
        """Let each value of a flag preset others; `parse` fills in what nobody gave.

        Args:
            flag: its dest.
            presets: of each value, values of other flags by dest. What one value does not name and
                another does, it presets to that flag's own default.
        """
        by_dest = {action.dest: action for action in self._actions if action.option_strings}
        names = dict.fromkeys(name for preset in presets.values() for name in preset)
        if strange := [name for name in names if name not in by_dest]:
            raise BadInput(f"--{flag} presets what is no flag: {', '.join(strange)}")
        whole = {
            value: {name: preset.get(name, by_dest[name].default) for name in names}
            for value, preset in presets.items()
        }
        for name in names:
            by_dest[name].default = argparse.SUPPRESS
            self._defaults.pop(name, None)  # of `set_defaults`, which argparse fills in too
        self.presets, self.filled = (flag, whole), True

    def format_help(self) -> str:
        """All flags by group, each with its default."""
        text = super().format_help()
        return f"{text}\n{example_text(self.example)}" if self.example else text

    def first_screen(self) -> str:
        """The flags that most runs need."""
        return first_screen(self, self.first, self.example, self.presets)

    def _nearest(self, flag: str) -> str:
        flags = [f for action in self._actions for f in action.option_strings]
        return did_you_mean(flag.split("=")[0], flags) or "; --help_all lists the flags"

    def _recipe_tokens(self, recipe: Path) -> list[str]:
        """A recipe as command-line words, so that each value is cast and checked as its flag's."""
        # Of flags that set the same, the first takes values; others are switches for one of them.
        flags = {a.dest: a for a in reversed(self._actions) if a.option_strings}
        resolved: dict[str, tuple[Any, Path]] = {}
        for file, flags_there in read_layers(recipe):
            for key, value in flags_there.items():
                if key not in flags or key in ("config", "help", "help_all"):
                    hint = did_you_mean(str(key), flags)
                    self.error(f"unknown key {key!r} in {file}{hint}")
                resolved[key] = value, file
        tokens: list[str] = []
        for key, (value, file) in resolved.items():
            tokens += self._make_tokens(flags[key], value, file)
        return tokens

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, and the message names the nearest choice."""
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), map(str, action.choices))
            choices = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"invalid choice: {shown(str(value))}{hint}; choose from {choices}"
            )

    def _make_tokens(self, action: argparse.Action, value: Any, file: Path) -> list[str]:
        flag = action.option_strings[0]
        if value is None and action.default is None:
            return []
        if action.nargs == 0:  # a switch, perhaps with one for the contrary
            if not isinstance(value, bool):
                self.error(f"{action.dest} in {file} is a switch: true or false, not {value!r}")
            switches = [a for a in self._actions if a.dest == action.dest and a.const == value]
            return [a.option_strings[0] for a in switches[:1]]
        values = value if isinstance(value, list) else ["none" if value is None else value]
        for one in values:
            if one is None or isinstance(one, bool | dict | list | set | bytes):
                self.error(f"{action.dest} in {file} cannot be {shown(str(value))}")
            if len(values) > 1 and str(one).startswith("--"):
                self.error(f"{action.dest} in {file}: {shown(str(one))} is a flag, not a value")
        # With "=", a value such as -1 is not taken for a flag.
        if len(values) == 1:
            return [f"{flag}={values[0]}"]
        return [flag, *(str(v) for v in values)]


def fill_unset(settings: argparse.Namespace, preset: Mapping[str, Any]) -> None:
    """Set what no flag has set, in place; such flags have the default `argparse.SUPPRESS`."""
    for name, value in preset.items():
        if not hasattr(settings, name):
            setattr(settings, name, value)


def early_values(argv: Sequence[str], names: Sequence[str] = ()) -> dict[str, Any]:
    """What recipe and command line say of flags that decide which other flags there are.

    Args:
        names: dests of such flags, beside `config` and `plugin`; each takes one text.

    Returns:
        the value of each; None: not given.

    Raises:
        BadInput: an unreadable recipe.
    """
    first = StrictParser(add_help=False)
    first.add_argument("--config", type=expanded_path)
    first.add_argument("--plugin", type=expanded_path, nargs="+")
    for name in names:
        first.add_argument(f"--{name}")
    found = vars(first.parse_known_args(list(argv))[0])
    if found["config"]:
        recipe = read_recipe(Path(found["config"]))
        for name in ("plugin", *names):
            if found[name] is None and recipe.get(name) is not None:
                found[name] = recipe[name]
    if isinstance(found["plugin"], str):
        found["plugin"] = [found["plugin"]]
    return found


def load_plugins(argv: Sequence[str] | None) -> None:
    """Run the files of `--plugin`, so that what they register has its flags and choices."""
    for path in early_values(sys.argv[1:] if argv is None else argv)["plugin"] or ():
        load_plugin(Path(path))
