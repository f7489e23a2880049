"""Scenes of garments on photographs, with the class of every pixel, made on demand.

A scene is a function of (split, index) alone: which photograph and which crop of it is the ground,
which garments of Fashion-MNIST lie on it, where, how large, in which colour. So any process, worker
or restart sees the same scenes, and nothing is stored.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from util.data.images import as_channels
from util.data.sets.photos import PhotosSource
from util.data.source import ArraySource, Source
from util.errors import BadInput

BACKGROUND = 0
LENGTHS = {"train": 20_000, "val": 500}
SPLITS = tuple(LENGTHS)
SIZE = 96  # pixels, the side of a scene
GARMENTS = (2, 5)  # fewest and most in a scene
SIDES = (0.35, 0.75)  # smallest and largest side of a garment's square, as a share of the scene's
OUTSIDE = 0.25  # the most of a garment's square that may lie beyond the scene's edge, each way
# Gray level of a garment's own pixels: Fashion-MNIST is black around them, but for the haze of its
# resizing.
OWN_PIXELS = 32
DARKEST_TINT = 0.35
# Of a scene's pixels, measured on the first 500 scenes of train at 96 pixels (tests check it).
MEAN = (0.4375, 0.3939, 0.3846)
STD = (0.2492, 0.2162, 0.2171)


@dataclass(frozen=True)
class GarmentScenes:
    """The scenes of one split.

    Args:
        garments: Fashion-MNIST, gray, of the same split.
        photographs: the bundled ones of the same split; none of the other split's files.
        size: side of a scene, pixels.

    Raises:
        BadInput: a size below 16, where a garment has too few pixels to be one.
    """

    garments: ArraySource
    photographs: PhotosSource
    size: int = SIZE

    def __post_init__(self) -> None:
        if self.size < 16:
            raise BadInput(f"size of garments is {self.size} pixels; expected at least 16")

    def __len__(self) -> int:
        return LENGTHS[self.garments.split]

    @property
    def classes(self) -> list[str]:
        """Names by label: background, then Fashion-MNIST's ten."""
        return ["background", *self.garments.classes]

    def scene(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [S, S, 3] and label uint8 [S, S] of one scene.

        Later garments hide earlier ones. A pixel is a garment's where its gray level, at the size
        it is shown, reaches `OWN_PIXELS`: holes in a sandal or a bag's handle are background.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng((SPLITS.index(self.garments.split), index))
        image = self._ground(rng)
        label = np.full((self.size, self.size), BACKGROUND, dtype=np.uint8)
        for _ in range(rng.integers(GARMENTS[0], GARMENTS[1] + 1)):
            self._lay(image, label, rng)
        return image, label

    def _ground(self, rng: np.random.Generator) -> np.ndarray:
        """A square of a photograph, uint8 [S, S, 3]; enlarged where the photograph is smaller."""
        photographs = self.photographs.images
        photograph = photographs[rng.integers(len(photographs))]
        short = min(photograph.size)
        side = int(rng.integers(min(self.size, short), min(4 * self.size, short) + 1))
        left = int(rng.integers(photograph.width - side + 1))
        top = int(rng.integers(photograph.height - side + 1))
        crop = photograph.crop((left, top, left + side, top + side))
        resized = crop.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.array(resized)

    def _lay(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> None:
        """One garment onto image and label, in place."""
        S = self.size
        which = int(rng.integers(len(self.garments.images)))
        side = round(S * rng.uniform(*SIDES))
        tint = rng.uniform(DARKEST_TINT, 1.0, size=3)
        beyond = round(OUTSIDE * side)
        top, left = (int(o) for o in rng.integers(-beyond, S - side + beyond + 1, size=2))
        small = Image.fromarray(self.garments.images[which])
        gray = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR))
        # What of the square lies inside the scene.
        rows = slice(max(top, 0), min(top + side, S))
        columns = slice(max(left, 0), min(left + side, S))
        gray = gray[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        own = gray >= OWN_PIXELS
        coloured = np.round(gray[..., None] * tint).astype(np.uint8)  # [h, w, 3]
        image[rows, columns][own] = coloured[own]
        label[rows, columns][own] = 1 + int(self.garments.labels[which])


class GarmentImages(Source):
    """The scenes as images alone, for pretraining; the label is what covers most of the scene."""

    labelled = False  # a scene holds several classes

    def __init__(self, scenes: GarmentScenes) -> None:
        super().__init__("garments", scenes.garments.split, MEAN, STD, scenes.classes)
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.scenes.scene(index)
        most = int(np.bincount(label.ravel()).argmax())
        return as_channels(Image.fromarray(image), self.channels), most
