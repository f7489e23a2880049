"""`--help` is one screen with what most runs need; `--help_all` explains every flag."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import COMMANDS, JOBS, words_of

from util.config.flag_help import default_text
from util.config.flags import FlagParser
from util.slurm import job_parser

SCREEN = 30  # lines of 80 columns
FEW_WORDS = 3


def parser_of(name: str) -> FlagParser:
    if name in JOBS:
        return job_parser(importlib.import_module(name.replace("submitit", "main")))
    return importlib.import_module(name).build_parser()


def flags() -> Iterator[tuple[str, FlagParser, argparse.Action]]:
    for name in [*COMMANDS, *JOBS]:
        parser = parser_of(name)
        for action in parser._actions:
            yield f"{name} {action.dest}", parser, action


def test_every_flag_has_a_text_of_a_few_words() -> None:
    bare = [where for where, _, action in flags() if len((action.help or "").split()) < FEW_WORDS]
    assert bare == []


def test_every_flag_tells_its_default() -> None:
    """A value is shown; without one the text says what happens. A switch is off."""
    untold = []
    for where, parser, action in flags():
        if action.nargs == 0 or not action.option_strings:
            continue
        if not default_text(action, parser.presets) and "default" not in (action.help or ""):
            untold.append(where)
    assert untold == []


def test_a_default_is_never_told_twice() -> None:
    for where, parser, action in flags():
        if default_text(action, parser.presets):
            assert "default:" not in (action.help or ""), where


@pytest.mark.parametrize("name", [*COMMANDS, *JOBS])
def test_the_first_screen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = parser_of(name)
    text = parser.first_screen()
    lines = text.splitlines()
    assert len(lines) <= SCREEN and max(map(len, lines)) <= 80, f"{len(lines)} lines\n{text}"
    assert len(parser.first) == len(set(parser.first)) >= 6
    for dest in parser.first:
        action = next(a for a in parser._actions if a.dest == dest)
        assert (action.option_strings or [action.dest])[-1] in text
    assert "--help_all" in text
    # The example is a command of this program that its parser takes.
    words = shlex.split(parser.example.replace("\\\n", " "))
    begin = ["python", *words_of(name)]
    assert words[: len(begin)] == begin
    parser.parse(words[len(begin) :])


@pytest.mark.parametrize("name", [*COMMANDS, *JOBS])
@pytest.mark.parametrize("flag", ["--help", "-h", "--help_all"])
def test_help_is_printed_and_ends_well(
    name: str, flag: str, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run_main(name, [flag])
    parser = parser_of(name)
    assert code == 0 and err == ""
    assert " ".join(["python", *words_of(name)]) in out
    everything = flag == "--help_all"
    for action in parser._actions:
        if action.option_strings and (everything or action.dest in parser.first):
            assert action.option_strings[-1] in out
    assert everything or len(out.splitlines()) <= SCREEN


def test_help_all_shows_presets_sizes_and_lists(run_main) -> None:
    def said(name: str) -> str:
        return " ".join(run_main(name, ["--help_all"])[1].split())

    text = said("main_pretrain")
    assert "(default by --method: mmae mixed, mae random)" in text
    assert "(default by --method: mmae 0.1, mae none)" in text
    assert "(default: 0.2 1.0)" in text and "(default: 400)" in text
    text = said("main_finetune")
    assert "(default by --tune: full 50, linear 90)" in text
    text = said("main_segment")
    assert "(default: 512x512)" in text and "unset: the model" not in text
    assert "default: None" not in text and "==SUPPRESS==" not in text


def test_a_recipe_cannot_ask_for_help(run_main, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("help_all: true\n")
    code, _, err = run_main("main_pretrain", [f"--config={recipe}"])
    assert code == 2 and "unknown key 'help_all'" in err


def test_a_mistyped_flag_is_sent_to_the_whole_list(run_main) -> None:
    code, _, err = run_main("main_pretrain", ["--zzzzzz=1"])
    assert code == 2 and "--help_all lists the flags" in err


def test_texts_have_no_leading_or_doubled_blanks() -> None:
    for where, _, action in flags():
        text = action.help or ""
        assert text == text.strip() and not re.search("  ", text), where
