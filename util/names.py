"""A wrong name, and the valid one that was probably meant."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from util.errors import BadInput


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` of the nearest valid name; nothing where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def nearest(name: str, names: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or all."""
    return did_you_mean(name, names) or f"; known: {', '.join(names)}"


def known(name: Any, names: Collection[str], what: str) -> None:
    """Refuse a name that is not among these."""
    if not isinstance(name, str) or name not in names:
        raise BadInput(f"unknown {what}: {name!r}{nearest(str(name), names)}")
