"""What a YAML file says, checked: mappings with known keys, and seeds."""

from collections.abc import Collection
from typing import Any

from util.errors import BadInput
from util.names import known


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


def read_seeds(given: Any, where: str) -> tuple[int, ...]:
    """Different whole numbers, as seeds have to be."""
    whole = isinstance(given, list) and all(type(s) is int and 0 <= s < 2**32 for s in given)
    if not whole or len(set(given)) < len(given):
        raise BadInput(f"seeds in {where} must be different whole numbers, not {given!r}")
    return tuple(given)
