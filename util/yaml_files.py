"""Every YAML file of the project is read here: plain types, of a size that a person writes."""

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from util.errors import BadInput

MOST_BYTES = 1 << 20  # recipes and plans are a few kB
MOST_DEPTH = 32  # mappings and lists inside each other
MOST_VALUES = 100_000  # with what each alias stands for counted again
MOST_DIGITS = 40  # of a whole number
MERGE = "tag:yaml.org,2002:merge"  # of the key <<


def read_yaml(path: Path, who: str) -> Any:
    """What a YAML file says, in plain types.

    Args:
        who: how the message calls the file, such as `the plan study.yaml`.

    Raises:
        BadInput: unreadable, no regular file, too large or too deep, a key given twice, or not
            YAML; with the place in the file where there is one.
    """
    text = _read_text(path, who)
    try:
        # The loader is a SafeLoader: it makes plain types only.
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        text = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise BadInput(f"{who} is not YAML: {text}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """The flags that a run has saved, by name.

    Raises:
        BadInput: see `read_yaml`; or no mapping.
    """
    found = read_yaml(path, str(path))
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds no settings of a run: expected a mapping of flags to values")
    return found


def _read_text(path: Path, who: str) -> str:
    """The text of a small regular file. One that is not, such as a pipe, would be waited for."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(MOST_BYTES + 1) if regular else b""
    except OSError as error:
        raise BadInput(f"cannot read {who}: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise BadInput(f"cannot read {who}: {error}") from None
    if not regular:
        raise BadInput(f"cannot read {who}: it is no regular file; give a YAML file")
    if len(content) > MOST_BYTES:
        raise BadInput(f"{who} is larger than {MOST_BYTES:,} bytes, so it is no file of settings")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{who} is not YAML: {error}") from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


class _Loader(yaml.SafeLoader):
    """YAML within bounds, in which a key given twice is an error: the first value would be lost."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = self.count = 0
        self.sizes: dict[str, int] = {}  # values that an anchor stands for, once it is whole

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As PyYAML's, counting. Ten aliases of ten of ten ... are more than a machine holds."""
        event = self.peek_event()
        anchor, before = event.anchor, self.count
        alias = isinstance(event, yaml.AliasEvent)
        if alias and anchor in self.anchors and anchor not in self.sizes:
            raise _error(f"*{anchor} stands inside of what it is", event.start_mark)
        self.depth += 1
        self.count += self.sizes.get(anchor, 1) if alias else 1
        if self.depth > MOST_DEPTH:
            raise _error(f"more than {MOST_DEPTH} levels inside each other", event.start_mark)
        if self.count > MOST_VALUES:
            raise _error(f"more than {MOST_VALUES:,} values, aliases followed", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if anchor is not None and not alias:
            self.sizes[anchor] = self.count - before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As PyYAML's; a date that is none, or a number without end, is an error with its place."""
        try:
            value = super().construct_object(node, deep)
        except ValueError as error:
            raise _error(str(error), node.start_mark) from None
        if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
            raise _error(f"a whole number of more than {MOST_DIGITS} digits", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's, after a look for keys given twice."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be one word or number", key.start_mark)
            if key.tag == MERGE:
                continue
            name = self.construct_object(key)
            if name in seen:
                raise _error(f"the key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _error(problem: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
