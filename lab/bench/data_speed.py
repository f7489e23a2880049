"""Images a second of one core, from files to batches: ours beside the usual path, in turns.

Every way to read stands in two versions. `alone` is source and transform, from an index to a uint8
crop [C, H, W]. `whole` is what a loading process does for a batch: ours adds keys, seeds, masks'
noise and collating, the peer floats, normalisation and collating. Ours normalises on the device.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler

from lab.bench.limits import stopwatch
from lab.bench.measuring import ratios, spread, summary, table, take_turns
from lab.bench.peers import UsualFiles
from util.data.packing import Recipe, pack
from util.data.randomness import EpochSampler, Key, evenly
from util.data.samples import Samples, build_loader
from util.data.source import Source, Subset
from util.errors import BadInput
from util.progress import say

PEER, VERSIONS = "PIL + torchvision v1", ("alone", "whole")
PACKINGS = {"packed JPEG": Recipe("jpeg", 256, 90), "packed raw": Recipe("raw", 256, 90)}
# More would be a long packing, and no other figure.
MOST_IMAGES = 4096
# One repeat: does its work, and gives images a second.
Measure = Callable[[], float]


class TurnSampler(Sampler[list[Key]]):
    """So many batches of a sampler in each iteration, from a new epoch whenever one ends."""

    def __init__(self, sampler: EpochSampler, batches: int) -> None:
        self.sampler, self.batches = sampler, batches
        self.epochs = itertools.count()

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        left = self.batches
        while left:
            self.sampler.start(next(self.epochs))
            for batch in itertools.islice(self.sampler, left):
                left -= 1
                yield batch


def few(source: Source) -> Source:
    """At most `MOST_IMAGES` of a source, evenly spaced; the same of each copy of a set."""
    if len(source) <= MOST_IMAGES:
        return source
    return Subset(source, evenly(len(source), MOST_IMAGES))


def has_files(source: Source) -> bool:
    """Whether its images are in files of their own."""
    return os.path.isfile(source.file_name(0))


def usual_files(
    source: Source, size: tuple[int, int], crop_scale: tuple[float, float]
) -> UsualFiles | None:
    """The peer on the files of a source; None where it has none, which is said."""
    if has_files(source):
        files = [source.file_name(index) for index in range(len(source))]
        return UsualFiles(files, size, crop_scale)
    say(
        "the source has no files of its own: no peer, and nothing is packed; --usual_path names a "
        "JPEG folder for the peer"
    )
    return None


@contextmanager
def packed_folder(given: str | None, data_path: str) -> Iterator[Path]:
    """The folder for packed copies: the given one, or one beside the set for as long as it lasts.

    Raises:
        BadInput: no folder can be made there.
    """
    if given is not None:
        yield Path(given).expanduser()
        return
    beside = Path(data_path).expanduser().resolve().parent
    try:
        made = tempfile.TemporaryDirectory(prefix=".packed-", dir=beside)
    except OSError as error:
        raise BadInput(
            f"cannot make a folder in {beside} for the packed copies: {error.strerror}; name one "
            "by --packed_path"
        ) from error
    with made as folder:
        yield Path(folder)


def pack_copies(
    source: Source, root: Path, described: Mapping[str, Any], *, num_workers: int
) -> dict[str, str]:
    """The packed copies of a set, as main_pack.py writes them; those that are there are kept.

    Args:
        source: decoding by Pillow.
        root: folder; each copy gets a folder in it.
        described: where the images came from, see `util.data.packing.pack`.

    Returns:
        name to what `--data_path` takes.

    Raises:
        BadInput: the folder holds another packing, or cannot be written.
        RunFailed: the disk is full, or an image cannot be decoded.
    """
    places = {}
    for name, recipe in PACKINGS.items():
        place = root / recipe.format
        say(f"{name}: {place}")
        pack(
            source,
            place / "train",
            recipe,
            dict(described),
            num_workers=num_workers,
            max_bad_images=0,
        )
        places[name] = f"packed:{place}"
    return places


@contextmanager
def one_core() -> Iterator[int | None]:
    """Keep this thread on one processor and torch to one thread; gives the processor's number.

    None where the system cannot (macOS).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pins = hasattr(os, "sched_setaffinity")
    allowed = os.sched_getaffinity(0) if pins else set[int]()
    cpu = max(allowed, default=None)  # the first ones serve most interrupts
    try:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        yield cpu
    finally:
        if cpu is not None:
            os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


# ---- What is measured ----------------------------------------------------------------------------


def rate(count: int, work: Callable[[], Any]) -> float:
    """Images a second of a piece of work on so many."""
    return count / stopwatch(torch.device("cpu"))(work)


def usual_reads(usual: UsualFiles, images: int, batch: int) -> dict[str, Measure]:
    """The peer's two versions, on so many images a repeat."""
    order = RandomSampler(usual, num_samples=images)
    loader = DataLoader(usual, batch, sampler=order, num_workers=0)

    def alone() -> float:
        indices = list(order)
        return rate(images, lambda: [usual.pixels(index).shape for index in indices])

    return {"alone": alone, "whole": lambda: rate(images, lambda: [None for _ in loader])}


def our_reads(samples: Samples, images: int, batch: int, crops: int) -> dict[str, Measure]:
    """Our two versions, on so many crops a repeat, `crops` of each decoded image."""
    source, transform = samples.source, samples.transform

    def keys() -> TurnSampler:
        sampler = EpochSampler(len(source), batch, seed=samples.seed, crops_per_image=crops)
        return TurnSampler(sampler, images // batch)

    drawn, loader = keys(), build_loader(samples, keys(), num_workers=0, pin_memory=False)

    def alone() -> float:
        # As the peer does: one image after the other, from torch's global generator.
        taken = [key.index for batch in drawn for key in batch]

        def work() -> None:
            for index in taken[::crops]:
                image = source[index][0]
                for _ in range(crops):
                    transform(image)

        return rate(len(taken), work)

    def whole() -> float:
        return rate(len(drawn) * batch, lambda: [None for _ in loader])

    return {"alone": alone, "whole": whole}


def read_once(source: Any) -> None:
    """Each image once: files are in memory then, and the checksums of packed ones compared."""
    for index in range(len(source)):
        source[index]


def compare_reads(
    usual: UsualFiles | None,
    sources: Mapping[str, tuple[Samples, int]],
    *,
    images: int,
    batch: int,
    repeats: int,
    warmup: int,
) -> dict[str, Any]:
    """The peer and all ways of ours, on one core, in turns; the table is printed.

    Args:
        usual: the peer, the first arm; None: there is none.
        sources: name to samples, and crops of each decoded image.
        images: of a repeat, a multiple of `batch`.
        repeats, warmup: turns that count, and turns before them.

    Raises:
        BadInput: fewer images than a batch, or crops that do not divide it.
    """
    reads = {} if usual is None else {PEER: usual_reads(usual, images, batch)}
    for name, (samples, crops) in sources.items():
        reads[name] = our_reads(samples, images, batch, crops)
    count = len(next(iter(sources.values()))[0])
    with one_core() as cpu:
        where = "one thread" if cpu is None else f"one thread, pinned to processor {cpu}"
        say(f"{count:,} images, {images:,} a repeat; {where}; no loading processes")
        for source in {id(s.source): s.source for s, _ in sources.values()}.values():
            read_once(source)
        rows = measure_reads(reads, repeats, warmup)
    return {"rows": rows, "images": count, "processor": cpu}


def measure_reads(
    reads: Mapping[str, Mapping[str, Measure]], repeats: int, warmup: int
) -> list[dict[str, Any]]:
    """All versions of all ways to read, in turns; the table is printed.

    Args:
        reads: way to version to measure; the first way is what the others are compared with.

    Returns:
        a row for each: rate, ratio to the first way's same version, and to its whole one.
    """
    turns = [(way, version) for version in VERSIONS for way in reads]
    named = {f"{way}, {version}": reads[way][version] for way, version in turns}
    found = dict(zip(turns, take_turns(named, repeats, warmup).values(), strict=True))
    base = next(iter(reads))
    rows = [
        {
            "arm": way,
            "version": version,
            "images_per_s": summary(rates),
            "ratio": ratios(rates, found[base, version]),
            "ratio_to_whole": ratios(rates, found[base, "whole"]),
        }
        for (way, version), rates in found.items()
    ]
    show_reads(rows)
    return rows


def show_reads(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of `data`."""
    shown = [
        {
            "version": row["version"],
            "arm": row["arm"],
            "n": row["images_per_s"]["n"],
            "images/s": row["images_per_s"]["median"],
            "min-max": spread(row["images_per_s"]),
            "ratio": row["ratio"]["median"],
            "ratio min-max": spread(row["ratio"]),
            "to the first's whole": row["ratio_to_whole"]["median"],
        }
        for row in rows
    ]
    say(table(shown))
    say(
        "alone: source and transform, from an index to a uint8 crop; whole: batches as a loading "
        "process makes them, ours with keys, masks' noise and collating, the peer's with floats, "
        "normalisation and collating; ours normalises on the device, which is not counted. "
        "ratio: to the first arm's same version, turn by turn."
    )
