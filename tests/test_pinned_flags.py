"""Defaults, choices, types and presets are those of `pinned_flags.yaml`; no change goes unseen."""

import difflib

import pytest
import yaml
from pin_flags import PINNED, TRAINING, collect, pinned_text

from models_mmae import METHODS
from util.data.segmentation_transforms import SegmentTransform


def test_flags_and_presets_are_the_pinned_ones() -> None:
    pinned, found = PINNED.read_text(), pinned_text()
    lines = difflib.unified_diff(
        pinned.splitlines(), found.splitlines(), "pinned", "now", lineterm="", n=0
    )
    assert pinned == found, (
        "what users rely on has changed:\n"
        + "\n".join(lines)
        + "\nif that is meant: python tests/pin_flags.py, and a line in CHANGELOG.md"
    )


def test_a_change_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS["mmae"], "avg_share", 0.25)
    text = pinned_text()
    assert text != PINNED.read_text() and yaml.safe_load(text) != yaml.safe_load(PINNED.read_text())


def test_a_change_for_callers_from_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    create = SegmentTransform.__init__
    changed = {**create.__kwdefaults__, "ratio": (0.4, 2.0)}
    monkeypatch.setattr(create, "__kwdefaults__", changed)
    text = pinned_text()
    assert yaml.safe_load(text) != yaml.safe_load(PINNED.read_text())


@pytest.mark.parametrize("main", TRAINING)
def test_what_may_differ_on_resume_are_flags(main: str) -> None:
    """A name in the program's list that is no flag of any main would free nothing, or hide one."""
    from util.config.flags import HOUSEKEEPING

    known = {
        row.get("sets", flag.lstrip("-").replace("-", "_"))
        for rows in collect()["flags"].values()
        for flag, row in rows.items()
    }
    module = __import__(main)
    assert (HOUSEKEEPING | module.HOUSEKEEPING) - known == set()
