"""What files of weights do not say of their model, and what is taken for it instead.

A file that says nothing is still read, since most files of this field are such; but nothing is
assumed without a word. `ASSUMED` in a file's contents lists it for the reader.
"""

from collections.abc import Callable, Mapping
from typing import Any

from util.errors import BadInput

ASSUMED = "assumed"


def settle_number(
    what: str,
    said: int | None,
    given: int | None,
    guess: Callable[[], tuple[int, str]],
    source: str,
) -> tuple[int, list[str]]:
    """A number that the shapes of weights do not tell: the file's, the user's, or a guess.

    Args:
        what: its name, which is the flag's too: num_heads.
        said: by the file; given: by the user.
        guess: (number, from what), asked only where neither says it.
        source: the file, for messages.

    Returns:
        the number, and what was assumed: nothing, or one text.

    Raises:
        BadInput: file and user contradict each other.
    """
    if said is not None and given not in (None, said):
        raise BadInput(
            f"--{what} {given}, but {source} says {said}; leave --{what} out to take the file's"
        )
    if said is not None:
        return said, []
    if given is not None:
        return given, []
    number, reason = guess()
    return number, [f"{what} {number} ({reason}; else --{what} N)"]


def check_given(given: Mapping[str, Any], said: Mapping[str, Any], source: str) -> None:
    """See that flags do not contradict a checkpoint that is used as it is.

    Args:
        given: by flag's name; None: not given.
        said: the same of the checkpoint's model.
        source: the checkpoint, for the message.

    Raises:
        BadInput: they do.
    """
    for what, value in given.items():
        if value is not None and value != said[what]:
            raise BadInput(
                f"--{what} {value}, but {source} says {said[what]}; leave --{what} out to take the "
                "file's"
            )


def assumptions(
    state: Mapping[str, Any], source: str | None, statistics: str | None = None
) -> list[str]:
    """What was assumed of a file's model: one line for the reader, or none.

    Args:
        state: what else the file holds, as the functions that load it return it.
        statistics: whose mean and deviation its images get, where neither file nor user say.
    """
    found = list(state.get(ASSUMED, []))
    if statistics is not None and "mean" not in state.get("data", {}):
        found.append(f"images normalised by {statistics}")
    return [f"{source} does not say all of its model; assumed: {', '.join(found)}"] if found else []


def set_statistics(given: object) -> str | None:
    """`statistics` of a command that takes the data set's where `--mean` does not say them."""
    return "the data set's mean and deviation (else --mean, --std)" if given is None else None
