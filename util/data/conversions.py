"""Pixels that reading an image changed in a way its owner may not expect: said once per kind."""

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary


class Conversion(Enum):
    """What was done to an image; the value says it in the words of the line that is printed.

    What is exact and expected has none: gray or palette to RGB, an EXIF orientation undone.
    """

    TRANSPARENT = "transparent pixels are laid on white"
    ALPHA_BAND = (
        "the last band of a TIFF, flagged as alpha, is taken for transparency and laid on white; "
        "if it holds data (infrared, depth), save the other bands without it"
    )
    CMYK = "CMYK is made RGB without its colour profile"
    LAB = "CIELAB is made sRGB, and colours that sRGB lacks are clipped"
    DEEP = "more than 8 bits a channel are made 8"
    DIM = (
        "values of more than 8 bits stay below a quarter of white and give a dark picture of 64 "
        "levels at most; if the data has fewer bits than its file (12 in 16), multiply the values "
        "(by 16) or save 8 bits"
    )
    STRETCHED = (
        "32-bit or float values have no white of their own: each image is stretched from its "
        "darkest to its brightest value"
    )
    NOT_FINITE = "values that are not numbers (NaN) are made black"
    FIRST_FRAME = "of several frames or pages the first alone is read"
    TURNED_PAIR = (
        "the image is turned upright by its EXIF orientation, its mask is not: they fit where the "
        "mask was drawn on the upright image"
    )


# Of each kind how many images, and the name of the first.
Found = dict[Conversion, tuple[int, str]]

# Of the images that this process has decoded and nobody has asked for yet.
_pending: Found = {}


def note(kinds: Iterable[Conversion], name: str) -> None:
    """Remember what decoding an image of that name did, for `take`."""
    for kind in sorted(kinds, key=list(Conversion).index):  # a set has another order each time
        merge(_pending, {kind: (1, name)})


def take() -> Found:
    """What was noted in this process since the last call."""
    found = _pending.copy()
    _pending.clear()
    return found


def merge(into: Found, found: Found) -> None:
    """Add counts; the first name stays."""
    for kind, (count, name) in found.items():
        before, first = into.get(kind, (0, name))
        into[kind] = before + count, first


def describe(found: Found) -> list[str]:
    """A line for each kind."""
    return [
        f"note: {kind.value} ({count:,} image{'s' * (count > 1)} so far, such as {name})"
        for kind, (count, name) in found.items()
    ]


class Tally:
    """The kinds that the batches of one data set held; each is told once."""

    def __init__(self) -> None:
        self.new: Found = {}
        self.said: set[Conversion] = set()

    def add(self, found: Found) -> None:
        """Take in those of a batch."""
        merge(self.new, {k: examples for k, examples in found.items() if k not in self.said})

    def news(self, gather: Callable[[Any], list[Any]]) -> list[str]:
        """Lines on those of all processes that were not said before. A collective.

        Args:
            gather: a thing of every process, for all of them.
        """
        together: Found = {}
        for found in gather(self.new):
            merge(together, found)
        self.new = {}
        self.said.update(together)
        return describe(together)


_tallies: WeakKeyDictionary[Any, Tally] = WeakKeyDictionary()


def get_tally(source: Any) -> Tally:
    """The tally of a data set, which its loaders fill: one for each source of images."""
    return _tallies.setdefault(source, Tally())
