"""What a YAML file says, checked: mappings with known keys, and the nearest name of a wrong one."""

import difflib
from collections.abc import Collection
from typing import Any

from util.errors import BadInput


def mapping(given: Any, where: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """A mapping whose keys are text and, where they are given, among the known ones."""
    if not isinstance(given, dict):
        raise BadInput(f"{where}: expected a mapping, found {given!r}")
    for key in given:
        if not isinstance(key, str):
            raise BadInput(f"{where}: the key {key!r} must be text; put it in quotes")
        if keys is not None:
            known(key, keys, f"key of {where}")
    return given


def known(name: Any, names: Collection[str], what: str) -> None:
    """Refuse a name that is not among these."""
    if not isinstance(name, str) or name not in names:
        raise BadInput(f"unknown {what}: {name!r}{nearest(str(name), names)}")


def nearest(name: str, names: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or all."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else f"; known: {', '.join(names)}"


def seeds_of(given: Any, where: str) -> tuple[int, ...]:
    """Different whole numbers, as seeds have to be."""
    whole = isinstance(given, list) and all(type(s) is int and 0 <= s < 2**32 for s in given)
    if not whole or len(set(given)) < len(given):
        raise BadInput(f"seeds in {where} must be different whole numbers, not {given!r}")
    return tuple(given)
