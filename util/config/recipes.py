"""Recipe files: YAML mappings of flags, one of which may extend another."""

from pathlib import Path
from typing import Any

import yaml

from util.errors import BadInput
from util.flag_types import expand_home
from util.yaml_files import read_yaml

EXTENDS = "extends"


def read_layers(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe and those that it extends, the most general first; later ones win.

    `extends: base.yaml` names another recipe, relative to the file that says so.

    Args:
        path: a YAML file.

    Returns:
        (file, its own flags) of each, without `extends`.

    Raises:
        BadInput: unreadable, no mapping, a key given twice, or recipes that extend each other.
    """
    layers: list[tuple[Path, dict[str, Any]]] = []
    trail = [path]
    while True:
        recipe = dict(_read(trail[-1], trail))
        base = recipe.pop(EXTENDS, None)
        layers.insert(0, (trail[-1], recipe))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise BadInput(f"{EXTENDS} in {trail[-1]} must name one file, not {base!r}")
        following = trail[-1].parent / expand_home(base)
        if following.resolve() in [p.resolve() for p in trail]:
            raise BadInput(f"recipes extend each other: {' -> '.join(map(str, trail))} -> {base}")
        trail.append(following)


def read_recipe(path: Path) -> dict[str, Any]:
    """All flags of a recipe, those of the files that it extends among them."""
    return {key: value for _, own in read_layers(path) for key, value in own.items()}


def write_recipe(recipe: dict[str, Any]) -> bytes:
    """The file that stands for a recipe by itself."""
    return yaml.safe_dump(recipe, sort_keys=False).encode()


def _read(path: Path, trail: list[Path]) -> dict[str, Any]:
    who = f"--config {path}" if len(trail) == 1 else f"{path}, which {trail[-2]} extends"
    recipe = read_yaml(path, who)
    if not isinstance(recipe, dict):
        raise BadInput(f"{who} must be a mapping of flags to values")
    return recipe
