"""`--val_fraction`: held-out images of the training set in place of a set's own val split.

The one definition for every command, so that pretraining, fine-tuning, kNN and pictures hold out
the same images. Choices (epochs, rates, settings) belong on them, and val is measured once.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from util.data.source import Source, Subset
from util.errors import BadInput


@dataclass(frozen=True)
class HoldOut:
    """Which images of train are held out.

    Attributes:
        fraction: share of train, above 0 and below 1; None: none, val is the set's own.
        seed: of the draw. Not the run's: seeds of a table are compared on the same images.
    """

    fraction: float | None
    seed: int

    @property
    def words(self) -> str:
        """What `val` is then, for results and readers."""
        if self.fraction is None:
            return "val"
        return f"{self.fraction:.4g} of train, held out (val_seed {self.seed})"

    def open(self, build: Callable[[str], Source], split: str) -> Source:
        """A split, train without what is held out of it, or val.

        Args:
            build: opens a split of the set, train | val.

        Raises:
            BadInput: too few images to hold some out and keep some.
        """
        if self.fraction is None:
            return build(split)
        train = build("train")
        labels = getattr(train, "labels", None)
        held = hold_out(draw_ranks(train, self.seed), self.fraction, labels)
        if not 0 < len(held) < len(train):
            raise BadInput(
                f"--val_fraction {self.fraction} of {len(train):,} images holds {len(held):,} out; "
                "both parts need some"
            )
        keep = np.ones(len(train), dtype=bool)
        keep[held] = False
        return Subset(train, held if split == "val" else np.flatnonzero(keep), split)

    def left(self, images: int) -> int:
        """About how many images of train are learnt from, of so many; exact without labels."""
        return images if self.fraction is None else images - round(self.fraction * images)


NOTHING_HELD_OUT = HoldOut(None, 0)


def hold_out(
    ranks: np.ndarray, fraction: float, labels: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """The share of images of lowest rank, the same share of each class where labels are given.

    A class keeps at least one image to learn from, and what rounding leaves over goes to the
    classes that lost most by it. Without labels a larger fraction holds out these images and more.

    Args:
        ranks: of N images, random; equal ones go by position.
        fraction: 0 to 1.
        labels: int [N], equal for images of one class.

    Returns:
        int64, ascending.
    """
    count = len(ranks)
    if labels is None or not count:
        labels = np.zeros(count, dtype=np.int64)
    labels = np.asarray(labels)
    order = np.lexsort((ranks, labels))  # by class, and inside of it by chance
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    most = sizes - 1
    wanted = fraction * sizes
    taken = np.minimum(np.floor(wanted).astype(np.int64), most)
    spare = max(round(fraction * count) - int(taken.sum()), 0)
    lost = np.where(taken < most, wanted - taken, -1.0)
    best = np.argsort(-lost, kind="stable")[:spare]
    taken[best[lost[best] > 0]] += 1
    inside = np.arange(count) - np.repeat(first, sizes)
    return np.sort(order[inside < np.repeat(taken, sizes)])


def draw_ranks(train: Source, seed: int) -> np.ndarray:
    """A random number for each image: uint64 [N], a function of (seed, class, its file's name).

    Not of its position: a copy of the set that lacks some images, or has more, packed or not,
    holds out the same of those that both have.
    """
    labels = getattr(train, "labels", None)
    classes = [os.fsencode(name) for name in train.classes]

    def rank(index: int) -> int:
        own = b"" if labels is None or labels[index] < 0 else classes[labels[index]]
        name = os.fsencode(os.path.basename(train.file_name(index)))
        digest = hashlib.blake2b(b"%d/%s/%s" % (seed, own, name), digest_size=8)
        return int.from_bytes(digest.digest(), "little")

    return np.fromiter(map(rank, range(len(train))), np.uint64, len(train))


def find_leak(state: Mapping[str, Any], hold_out: HoldOut, path: str) -> str | None:
    """What a reader must know where a checkpoint's run held out other images than are measured on.

    Args:
        state: contents of the checkpoint; weights of other programs say nothing.
        hold_out: of the measurement.
        path: of the checkpoint.
    """
    if hold_out.fraction is None or "arithmetic" not in state:
        return None
    own = read_hold_out(state["arithmetic"])
    if own == hold_out:
        return None
    there = "nothing of train"
    if own.fraction is not None:
        there = f"other images ({own.fraction:.4g} of train, val_seed {own.seed})"
    return (
        f"the run of {path} held out {there}: if it learnt from this set, then also from images "
        "that are measured on here; give its --val_fraction and --val_seed, or neither"
    )


def read_hold_out(settings: Mapping[str, Any]) -> HoldOut:
    """What a run holds out: its flags, or the settings in its checkpoint (older: nothing)."""
    return HoldOut(settings.get("val_fraction"), settings.get("val_seed", 0))
