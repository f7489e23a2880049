"""What a set of many files costs beside reading it: the start, and the memory of the workers."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch

from lab.bench.children import Answer, Children
from lab.bench.limits import stopwatch
from lab.bench.measuring import private_memory, summary
from util.progress import say


def build_start(rank: int, open_source: Callable[[], Sized]) -> Answer:
    """In a child: opens the data set, and gives the seconds of it and the number of images."""

    def answer(request: Any) -> tuple[float, int]:
        found: list[int] = []
        seconds = stopwatch(torch.device("cpu"))(lambda: found.append(len(open_source())))
        return seconds, found[0]

    return answer


def build_growth(rank: int, open_loader: Callable[[int], Iterable[Any]], steps: int) -> Answer:
    """In a child: reads images, and gives each worker's own memory after a tenth and at the end."""

    def answer(request: Any) -> dict[str, list[int]]:
        sizes: dict[str, list[int]] = {}
        for step, _ in enumerate(open_loader(steps), 1):
            if step in (max(2, steps // 10), steps):
                workers = sorted(child.pid or 0 for child in multiprocessing.active_children())
                sizes["early" if step < steps else "late"] = [private_memory(p) for p in workers]
        return sizes

    return answer


def measure_files(
    open_source: Callable[[], Sized],
    open_loader: Callable[[int], Iterable[Any]],
    *,
    steps: int,
    batch: int,
    repeats: int,
) -> dict[str, Any]:
    """First and later starts on a set of many files, and the memory of the workers; printed.

    Args:
        open_source: opens the set; picklable, for each start is a process of its own.
        open_loader: gives so many batches from workers; picklable.
        steps: batches to read, at least 4.
        repeats: later starts.
    """
    starts, images = [], 0
    before = os.environ.get("MMAE_CACHE")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MMAE_CACHE"] = cache  # the children's: the first start finds none
        try:
            for _ in range(1 + repeats):
                child = Children("the start", build_start, open_source, threads=1)
                ((seconds, images),) = child.ask("start")
                child.close()
                starts.append(seconds)
            child = Children("an epoch", build_growth, open_loader, steps, threads=1)
            (memory,) = child.ask("read")
            child.close()
        finally:
            del os.environ["MMAE_CACHE"]
            if before is not None:
                os.environ["MMAE_CACHE"] = before
    growth = [b - a for a, b in zip(memory["early"], memory["late"], strict=True)]
    later = summary(starts[1:])
    say(f"{images:,} images: first start {starts[0]:.2f} s, later ones {later['median']:.2f} s")
    say(
        f"workers' own memory, MiB: {[round(m / 2**20) for m in memory['early']]} after a tenth, "
        f"{[round(m / 2**20) for m in memory['late']]} at the end of {steps * batch:,} images"
    )
    return {
        "images": images,
        "first_start_s": starts[0],
        "later_start_s": later,
        "worker_bytes": memory,
        "growth_bytes": growth,
    }
