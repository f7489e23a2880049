"""`--val_fraction`: held-out images of the training set in place of a set's own val split.

The one definition for every command, so that pretraining, fine-tuning, kNN and pictures hold out
the same images. Choices (epochs, rates, settings) belong on them, and val is measured once.
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from util.errors import BadInput
from util.randomness import seed_of

S = TypeVar("S", bound=Sized)


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

    def open(
        self,
        build: Callable[[str], S],
        split: str,
        subset: Callable[[S, np.ndarray, str], S],
    ) -> S:
        """A split, train without what is held out of it, or val.

        Args:
            build: opens a split of the set, train | val.
            subset: makes a split of some images of another: by their indices, and its name.

        Raises:
            BadInput: too few images to hold some out and keep some.
        """
        if self.fraction is None:
            return build(split)
        train = build("train")
        labels = getattr(train, "labels", None)
        held = hold_out(len(train), self.fraction, self.seed, labels)
        if not 0 < len(held) < len(train):
            raise BadInput(
                f"--val_fraction {self.fraction} of {len(train):,} images holds {len(held):,} out; "
                "both parts need some"
            )
        keep = np.ones(len(train), dtype=bool)
        keep[held] = False
        return subset(train, held if split == "val" else np.flatnonzero(keep), split)

    def left(self, images: int) -> int:
        """About how many images of train are learnt from, of so many; exact without labels."""
        return images if self.fraction is None else images - round(self.fraction * images)


NOTHING_HELD_OUT = HoldOut(None, 0)


def hold_out(
    count: int, fraction: float, seed: int, labels: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Draw a share of `count` images, the same share of each class where labels are given.

    A larger fraction holds out these images and more. A class keeps at least one image to learn
    from, and what rounding leaves over goes to the classes that lost most by it.

    Args:
        fraction: 0 to 1.
        labels: int [count], equal for images of one class.

    Returns:
        int64, ascending.
    """
    # Raw, for this stream stays what it is in every version of numpy.
    rank = np.random.PCG64(seed_of(seed, "held out")).random_raw(count)
    if labels is None or not count:
        labels = np.zeros(count, dtype=np.int64)
    labels = np.asarray(labels)
    order = np.lexsort((rank, labels))  # by class, and inside of it by chance
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


def hold_out_of(settings: Mapping[str, Any]) -> HoldOut:
    """What a run holds out: its flags, or the settings in its checkpoint (older: nothing)."""
    return HoldOut(settings.get("val_fraction"), settings.get("val_seed", 0))
