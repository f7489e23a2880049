"""Types that all share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from util.errors import BadInput

Pair = tuple[int, int]  # height and width: of an image, a patch, a grid
# Lengths of axes from the outermost on: (rows, columns), or (times, rows, columns).
Shape = tuple[int, ...]


@dataclass(frozen=True)
class InputSpec:
    """What a model takes.

    Attributes:
        channels: of an image, or of each frame of a clip.
        size: (height, width), or (frames, height, width).
    """

    channels: int
    size: Shape

    @property
    def image_size(self) -> Pair:
        """(height, width)."""
        return self.size[-2], self.size[-1]

    @property
    def shape(self) -> Shape:
        """Of one input: (channels, *size)."""
        return (self.channels, *self.size)

    @property
    def values(self) -> int:
        """Numbers of one input."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    def check(self, x: Tensor) -> None:
        """Refuse inputs [B, channels, *size] that are others.

        Raises:
            BadInput: with both sizes.
        """
        if tuple(x.shape[1:]) != self.shape:
            axes = ("frames, " if len(self.size) > 2 else "") + "height, width"
            raise BadInput(
                f"images are {tuple(x.shape[1:])}, the model was built for {self.shape} "
                f"(channels, {axes})"
            )

    def __str__(self) -> str:
        return " x ".join(map(str, self.shape))


@dataclass(frozen=True)
class EncoderState:
    """An encoder, whatever method it was pretrained by; what every use of it starts from.

    Attributes:
        kind: names an encoder's class, see `models_zoo.ENCODER_KINDS`: vit, or a plugin's.
        arguments: of its constructor, plain, without what a head or a use adds. A vit's may also
            say `pos_offset`, of which its positions are the code (`util.mask.pos_embed`).
        weights: by the encoder's own names, its positions among them.
    """

    kind: str
    arguments: Mapping[str, Any]
    weights: Mapping[str, Tensor]
