"""Batches from loading processes: errors for people arrive as themselves, and conversions are told.

A loading process hands an exception over as text, with its traceback around the message; here
those for people come back as values and are raised where the batch was awaited.
"""

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from util.data.conversions import Found, Tally, get_tally, take
from util.errors import BadInput, RunFailed
from util.progress import say

# What a dataset gave, which conversions that took, and the error in its place.
Fetched = tuple[Any, Found, BadInput | RunFailed | None]
# torch's words for a loading process that is gone.
ENDED = re.compile(r"DataLoader worker \(pid")


class Guarded(Dataset):
    """Items or batches of another dataset, each as `Fetched`."""

    def __init__(self, samples: Dataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Fetched:
        return self._fetch(self.samples.__getitem__, key)

    def __getitems__(self, keys: Sequence[Any]) -> Fetched:
        many = getattr(self.samples, "__getitems__", None)
        return self._fetch(many or (lambda keys: [self.samples[key] for key in keys]), keys)

    def _fetch(self, get: Callable[[Any], Any], key: Any) -> Fetched:
        take()  # of images that this process read for a picture, or its parent before it forked
        try:
            return get(key), take(), None
        except (BadInput, RunFailed) as error:
            return None, {}, error
        except OSError as error:
            failed = RunFailed(
                f"reading the data failed: {error}; mend that, and the same command goes on from "
                "the last checkpoint"
            )
            return None, {}, failed


def _collated(collate: Callable[[Any], Any], fetched: Fetched) -> Fetched:
    items, found, error = fetched
    return None if error else collate(items), found, error


class Loader(DataLoader):
    """A DataLoader of a `Guarded` dataset.

    Args:
        samples: with an attribute `source`, the data set whose tally takes in the conversions.
        collate: items of a batch to the batch; None, with batch_size None: items as they are.
        options: of DataLoader.

    Iterating raises what a loading process met, and RunFailed where one ended.
    """

    tally: Tally

    def __init__(
        self, samples: Dataset, collate: Callable[[Any], Any] | None, **options: Any
    ) -> None:
        # Of the three values of `Fetched`; with batch_size None torch hands over a single one.
        whole: Any = partial(_collated, collate or _as_it_is)
        super().__init__(Guarded(samples), collate_fn=whole, **options)
        self.tally = get_tally(getattr(samples, "source", samples))

    def close(self) -> None:
        """End the loading processes now; the next iteration would start others."""
        self._iterator = None  # torch keeps persistent processes here

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own class
        return self._opened(super().__iter__())

    def _opened(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            for batch, found, error in batches:
                self.tally.add(found)
                if error is not None:
                    raise error
                yield batch
        except Exception as met:
            # The loading processes end with torch's iterator. That must be now: where it becomes
            # garbage together with the exception, torch waits ten seconds for each of them.
            del batches
            self.close()
            traceback.clear_frames(met.__traceback__)
            if not isinstance(met, RuntimeError) or not ENDED.search(str(met)):
                raise
            raise RunFailed(
                f"a loading process ended: {str(met).splitlines()[0]} Often it is memory: "
                "lower --num_workers, or give the machine more; the same command goes on from "
                "the last checkpoint"
            ) from met


def _as_it_is(item: Any) -> Any:
    return item


def say_conversions(loader: Any, gather: Callable[[Any], list[Any]]) -> None:
    """Say which conversions a loader's images took, each once in a run. A collective.

    Args:
        loader: other iterables of batches know none.
        gather: a thing of every process, for all of them.
    """
    if isinstance(loader, Loader):
        lines = loader.tally.news(gather)
        if not dist.is_initialized() or dist.get_rank() == 0:
            for line in lines:
                say(line)
