"""Recipe files: YAML mappings of flags, one of which may extend another."""

from pathlib import Path
from typing import Any

import yaml

from util.errors import BadInput

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
        following = trail[-1].parent / base
        if following.resolve() in [p.resolve() for p in trail]:
            raise BadInput(f"recipes extend each other: {' -> '.join(map(str, trail))} -> {base}")
        trail.append(following)


def read_recipe(path: Path) -> dict[str, Any]:
    """All flags of a recipe, those of the files that it extends among them."""
    return {key: value for _, own in read_layers(path) for key, value in own.items()}


def write_recipe(recipe: dict[str, Any]) -> bytes:
    """The file that stands for a recipe by itself."""
    return yaml.safe_dump(recipe, sort_keys=False).encode()


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


def _read(path: Path, trail: list[Path]) -> dict[str, Any]:
    who = f"--config {path}" if len(trail) == 1 else f"{path}, which {trail[-2]} extends"
    try:
        # The loader is a SafeLoader: it makes plain types only.
        recipe = yaml.load(path.read_text(), Loader=_Loader)
    except OSError as error:
        raise BadInput(f"cannot read {who}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{who} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise BadInput(f"{who} must be a mapping of flags to values")
    return recipe
