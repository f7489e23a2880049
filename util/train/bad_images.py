"""Images of a run that could not be decoded."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from util.console import counted, visible_line
from util.data.conversions import Tally
from util.errors import RunFailed
from util.files import write_text
from util.progress import say

BAD_IMAGES = "bad_images.txt"


class BadImages:
    """The images of a run that could not be decoded: counted over all processes, and listed.

    Args:
        path: of the list.
        describe: index to path and fault.
        limit: more bad images than this end the run.
        gather: a thing of every process, for all of them.
        tally: the conversions of those that could.
        write: True in the main process.
    """

    def __init__(
        self,
        path: Path,
        describe: Callable[[int], str],
        limit: int,
        gather: Callable[[Any], list[Any]],
        *,
        tally: Tally,
        write: bool,
    ) -> None:
        self.path, self.describe, self.limit = path, describe, limit
        self.gather, self.write, self.tally = gather, write, tally
        self.indices: set[int] = set()
        self.listed: set[int] = set()

    def note(self, indices: Iterable[int]) -> None:
        """Remember what this process met."""
        self.indices.update(indices)

    def agree(self) -> int:
        """Unite the lists of all processes, write them, return how many. A collective.

        Kinds of conversions that were not met before are said.

        Raises:
            RunFailed: more than the limit, on every process.
        """
        for line in self.tally.news(self.gather):
            if self.write:
                say(line)
        self.indices = set().union(*self.gather(self.indices))
        if self.indices != self.listed:
            new = sorted(self.indices - self.listed)
            self.listed = set(self.indices)
            if self.write:
                lines = [visible_line(self.describe(i)) for i in sorted(self.indices)]
                write_text(self.path, "".join(f"{line}\n" for line in lines))
                for i in new:
                    say(f"could not decode {self.describe(i)}; using another image instead")
        if len(self.indices) > self.limit:
            raise RunFailed(
                f"{counted(len(self.indices), 'image')} cannot be decoded, more than "
                f"--max_bad_images {self.limit}; they are listed in {self.path}"
            )
        return len(self.indices)

    def load(self, indices: Iterable[int]) -> None:
        """Go on with the list of a checkpoint."""
        self.indices = set(indices)
