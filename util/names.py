"""Things that are found by name; a wrong name, and the valid one that was probably meant."""

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from util.errors import BadInput

T = TypeVar("T")


class Registry(MutableMapping[str, T], Generic[T]):
    """What is found by name, in the order in which it was registered.

    A plugin (`util.plugins`) adds names; the framework's own stay what they are.

    Args:
        what: one of them is called in messages: mask, data set.
        things: the framework's own.

    Attributes:
        owner: plugin that registers now, in every registry; None: the framework itself.
    """

    owner: str | None = None

    def __init__(self, what: str, things: Mapping[str, T] | None = None) -> None:
        self.what = what
        self.things = dict(things or {})
        self.owners: dict[str, str | None] = dict.fromkeys(self.things)

    def __getitem__(self, name: str) -> T:
        return self.things[name]

    def __setitem__(self, name: str, thing: T) -> None:
        """Set it whatever is there; `add` refuses a name that is taken."""
        self.things[name], self.owners[name] = thing, Registry.owner

    def __delitem__(self, name: str) -> None:
        del self.things[name], self.owners[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.things)

    def __len__(self) -> int:
        return len(self.things)

    def add(self, name: str, thing: T) -> None:
        """Register a thing; a plugin that is loaded once more replaces its own.

        Raises:
            BadInput: the name is taken.
        """
        if not name or name.split() != [name]:
            raise BadInput(f"{name!r} cannot name a {self.what}; use a word without spaces")
        if name in self.things and (Registry.owner is None or self.owners[name] != Registry.owner):
            whose = f"plugin {self.owners[name]}" if self.owners[name] else "the framework itself"
            raise BadInput(f"{self.what} {name!r} is there already, of {whose}; choose another")
        self.things[name], self.owners[name] = thing, Registry.owner

    def register(self, name: str) -> Callable[[T], T]:
        """`add` as a decorator."""

        def decorate(thing: T) -> T:
            self.add(name, thing)
            return thing

        return decorate

    def find(self, name: str) -> T:
        """The thing of that name.

        Raises:
            BadInput: there is none; the message lists the valid names.
        """
        if name not in self.things:
            hint = did_you_mean(name, self.things)
            raise BadInput(f"unknown {self.what} {name!r}{hint}, choose from {list(self.things)}")
        return self.things[name]


@contextmanager
def registering_for(owner: str) -> Iterator[None]:
    """Inside the block a plugin registers."""
    before, Registry.owner = Registry.owner, owner
    try:
        yield
    finally:
        Registry.owner = before


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
