"""What a data set gives, whatever it holds: an input and its target, by index."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from util.data.images import IMAGE_DECODERS, MODES, Stats, as_channels
from util.errors import BadInput


class Source(Dataset):
    """Inputs of one split with their targets; subclasses load, this class keeps what is known.

    ``source[i]`` is (x, y): x a PIL image of mode L (1 channel) or RGB (3), otherwise a uint8
    tensor [C, H, W] or of one axis more; y what `target` says.

    Attributes:
        name, split: as given to what builds it by name.
        channels: C of every x.
        mean, std: one number per channel, in units of 0..1.
        classes: names of the labels.
        target: what y is. "class": an index into `classes`, or -1 where it is not known; "mask":
            uint8 [H, W] of such indices, 255 where nothing counts.
        notes: what the reader should know of the set.
        eval_margin: whether evaluation cuts a margin off, as it does for photographs of any size.
        labelled: whether its labels can be learnt.
        decoder: one of `IMAGE_DECODERS`; with "torchvision" images from files are uint8 tensors
            [C, H, W], of which training alone makes use.
        stored: how the pixels are kept, where that is not as their makers published them; a run
            that goes on from a checkpoint must find the same.
        max_pixels: an image of more is refused; None: of more than `MOST_PIXELS`. It belongs to the
            source, and not to the process, so that loading processes have it however they start.
    """

    target = "class"
    eval_margin = False
    labelled = True
    decoder = "pil"
    stored = "as published"
    max_pixels: int | None = None

    def __init__(
        self, name: str, split: str, mean: Stats, std: Stats, classes: Sequence[str]
    ) -> None:
        self.name = name
        self.split = split
        self.channels = len(mean)
        self.mean = mean
        self.std = std
        self.classes = list(classes)
        self.notes: list[str] = []

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        raise NotImplementedError

    def encoded(self, index: int) -> tuple[bytes, int]:
        """An image as its file holds it, and its label.

        Raises:
            BadInput: it is in no file of its own.
            BadImage: the file cannot be read.
        """
        raise BadInput(f"{self.name} has no image files to keep; give --format jpeg or raw")

    def file_name(self, index: int) -> str:
        """A path, or a name such as digits-train-17, for messages and captions."""
        return f"{self.name}-{self.split}-{index}"

    def with_decoder(self, decoder: str) -> "Source":
        """This source, decoding files by one of `IMAGE_DECODERS`."""
        if decoder not in IMAGE_DECODERS:
            raise BadInput(
                f"unknown decoder {decoder!r}; the valid ones: {', '.join(IMAGE_DECODERS)}"
            )
        self.decoder = decoder
        return self

    def with_max_pixels(self, max_pixels: int | None) -> "Source":
        """This source with another limit on the pixels of an image; None: `MOST_PIXELS`."""
        self.max_pixels = max_pixels
        return self

    def with_channels(self, channels: int) -> "Source":
        """This source, giving gray (1) or RGB (3) images; mean and deviation follow.

        Gray statistics are repeated for RGB; RGB ones are averaged for gray.

        Raises:
            BadInput: another number of channels.
        """
        if channels == self.channels:
            return self
        if {channels, self.channels} != set(MODES):
            raise BadInput(
                f"channels is {channels}, but {self.name} holds images of {self.channels}; it can "
                "be made gray (1) or RGB (3) and nothing else; 'synthetic' takes any number"
            )
        self.mean, self.std = (
            stats * 3 if channels == 3 else (sum(stats) / 3,) for stats in (self.mean, self.std)
        )
        self.channels = channels
        return self

    def with_stats(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> "Source":
        """This source with another mean or deviation; None leaves what it has.

        Args:
            mean, std: one number for all channels or one for each, in units of 0..1.

        Raises:
            BadInput: another count, or values that are no mean or deviation of gray levels 0..1.
        """
        for name, values in (("mean", mean), ("std", std)):
            if values is None:
                continue
            if len(values) not in (1, self.channels):
                raise BadInput(
                    f"{name} has {len(values)} numbers, but {self.name} gives images of "
                    f"{self.channels} channels; expected 1 number or {self.channels}"
                )
            # A comparison with NaN is false.
            if not all(0 <= value <= 1 and (value or name == "mean") for value in values):
                raise BadInput(
                    f"{name} is {' '.join(map(str, values))}; expected numbers "
                    f"{'from 0' if name == 'mean' else 'above 0'} to 1, in units of gray levels "
                    "0..1; divide those of levels 0..255 by 255"
                )
            repeats = self.channels // len(values)
            setattr(self, name, tuple(float(value) for value in values) * repeats)
        return self


# What a source that stands for another has of it.
KNOWN = (
    "channels", "target", "notes", "eval_margin", "labelled", "decoder", "stored", "max_pixels",
)  # fmt: skip


class View(Source):
    """Another source, seen in another way; what is known of that one is known of this.

    Args:
        source: the other.
        split: what this is called; None: as the other.
        classes: of this; None: as of the other.
    """

    def __init__(
        self, source: Source, split: str | None = None, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(
            source.name,
            split or source.split,
            source.mean,
            source.std,
            source.classes if classes is None else classes,
        )
        self.source = source
        for name in KNOWN:
            setattr(self, name, getattr(source, name))

    def __len__(self) -> int:
        return len(self.source)

    def file_name(self, index: int) -> str:
        return self.source.file_name(index)


class Subset(View):
    """Some of another source.

    Args:
        source: the whole.
        indices: which of it, in this order.
        split: what these are called; None: as the whole.
    """

    def __init__(
        self, source: Source, indices: Sequence[int] | np.ndarray, split: str | None = None
    ) -> None:
        super().__init__(source, split)
        self.indices = np.asarray(indices)

    @property
    def labels(self) -> np.ndarray:
        """Of these images, where the whole lists its labels; otherwise there is no attribute."""
        return np.asarray(self.source.labels)[self.indices]  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.source[int(self.indices[index])]

    def with_channels(self, channels: int) -> Source:
        return Subset(self.source.with_channels(channels), self.indices, self.split)

    def with_decoder(self, decoder: str) -> Source:
        return Subset(self.source.with_decoder(decoder), self.indices, self.split)

    def with_max_pixels(self, max_pixels: int | None) -> Source:
        return Subset(self.source.with_max_pixels(max_pixels), self.indices, self.split)

    def encoded(self, index: int) -> tuple[bytes, int]:
        return self.source.encoded(int(self.indices[index]))

    def file_name(self, index: int) -> str:
        return self.source.file_name(int(self.indices[index]))


class ArraySource(Source):
    """Images in memory: arrays are uint8 [N, H, W] (gray) or [N, H, W, 3], and labels [N]."""

    def __init__(
        self,
        name: str,
        split: str,
        arrays: tuple[np.ndarray, np.ndarray],
        stats: tuple[Stats, Stats],
        classes: list[str],
    ) -> None:
        super().__init__(name, split, *stats, classes)
        self.images, self.labels = arrays

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[index])
        return as_channels(image, self.channels), int(self.labels[index])
