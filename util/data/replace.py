"""An image that cannot be decoded is replaced by another, which the key alone decides."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from util.console import counted
from util.data.images import BadImage
from util.data.randomness import Key, derive_seed
from util.data.source import Source
from util.errors import BadInput

ATTEMPTS = 100
BAD_SLOTS = 4
NONE_BAD = torch.full((BAD_SLOTS,), -1)


def decode(source: Source, key: Key, seed: int) -> tuple[Any, Any, list[int]]:
    """The image of a key or, where its file cannot be decoded, another that (seed, key) names.

    So the replacement is the same in any worker, on any process and after a restart.

    Returns:
        Image and label of what was decoded, and the indices that could not be: none, or the key's
        own and then those of replacements that failed as well.

    Raises:
        BadInput: `ATTEMPTS` replacements failed too.
    """
    index = key.index
    bad: list[int] = []
    for attempt in range(ATTEMPTS):
        try:
            if index not in bad:
                return *source[index], bad
        except BadImage as error:
            bad.append(index)
            last = error
        index = derive_seed(seed, "fallback", *key, attempt) % len(source)
    raise BadInput(
        f"{len(bad)} of {len(source)} images were tried in turn and none could be decoded; the "
        f"last: {last}; see that --data_path is still there and holds images"
    )


def bad_slots(bad: list[int]) -> Tensor:
    """The first `BAD_SLOTS` bad indices, then -1: int64 [BAD_SLOTS], to collate into batches.

    Those that do not fit are named when their own turn comes.
    """
    return torch.tensor((bad + [-1] * BAD_SLOTS)[:BAD_SLOTS]) if bad else NONE_BAD


def refuse_bad(bad: Iterable[int], gather: Callable[[Any], list[Any]]) -> None:
    """End an evaluation in which an image could not be decoded. A collective.

    Args:
        bad: indices of this process; below 0 they stand for none.
        gather: a thing of every process, for all of them.

    Raises:
        BadInput: there is one, on all processes: without it the numbers would be another set's.
    """
    found = sorted({i for theirs in gather([i for i in bad if i >= 0]) for i in theirs})
    if found:
        raise BadInput(
            f"{counted(len(found), 'image')} of the evaluation set cannot be decoded (numbers "
            f"{', '.join(map(str, found[:8]))}{' ...' if len(found) > 8 else ''}): replace the "
            "files, evaluation leaves none out"
        )


def find_fault(source: Source, index: int) -> str:
    """Why an image cannot be decoded, for the list of bad ones; decodes it once more."""
    try:
        source[index]
    except BadImage as error:
        return error.reason
    return "decoded when tried again: the file has changed since"
