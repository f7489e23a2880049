"""Transforms of an image together with its label map; numbers and order as mmsegmentation's.

An image is a PIL picture in, a uint8 tensor [3, h, w] out; a label map is uint8 [H, W]. What is
random comes from numpy's global generator, which the caller seeds for each sample.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from util.data.label_maps import IGNORE
from util.errors import BadInput

Size = tuple[int, int]
TRIES = 10  # of a crop in which one class covers too much

# mmsegmentation's PhotoMetricDistortion.
BRIGHTNESS = 32.0  # gray levels, added
CONTRAST = SATURATION = (0.5, 1.5)  # factors
HUE_DEGREES = 36.0  # its 18 steps of OpenCV's two degrees


def fitted(shape: Sequence[int], scale: Size) -> Size:
    """(h, w) of an image that is scaled with its aspect kept (mmcv's rule for a pair of numbers).

    Args:
        shape: (H, W) of the image.
        scale: the larger number bounds the long side, the smaller one the short side; in either
            order. Whichever bound is met first decides, also when that enlarges.
    """
    height, width = shape
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_image(image: Tensor, size: Size) -> Tensor:
    """uint8 [3, H, W] to [3, h, w], bilinear at the pixels' centres, without smoothing before.

    So do OpenCV and with it mmsegmentation; weights trained there expect these images.
    """
    if image.shape[1:] == size:
        return image
    return v2.functional.resize(
        image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=False
    )


def resize_label(label: Tensor, size: Size) -> Tensor:
    """uint8 [H, W] to [h, w]: each pixel takes the class at its own centre, so none is invented."""
    return F.interpolate(label[None, None], size, mode="nearest-exact")[0, 0]


def as_tensors(image: Image.Image, label: np.ndarray) -> tuple[Tensor, Tensor]:
    """A pair as uint8 [3, H, W] and uint8 [H, W]."""
    return v2.functional.pil_to_tensor(image), torch.from_numpy(np.ascontiguousarray(label))


def crop_place(label: Tensor, size: Size, most_of_one: float) -> tuple[slice, slice]:
    """Rows and columns of a random crop in which no class covers too much.

    Ten places are tried; then the next one is taken as it is. Ignored pixels do not count, and a
    crop with a single class never passes (mmsegmentation's `cat_max_ratio`).

    Args:
        label: uint8 [H, W].
        size: (h, w) of the crop; what is smaller stays whole.
        most_of_one: largest share of one class; 1: any crop will do.
    """

    def place() -> tuple[slice, slice]:
        starts = [
            int(np.random.randint(0, max(have - want, 0) + 1))
            for have, want in zip(label.shape, size, strict=True)
        ]
        rows, columns = (slice(s, s + want) for s, want in zip(starts, size, strict=True))
        return rows, columns

    chosen = place()
    if most_of_one < 1:
        for _ in range(TRIES):
            counts = torch.bincount(label[chosen].flatten(), minlength=IGNORE + 1)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() / counts.sum() < most_of_one:
                break
            chosen = place()
    return chosen


def distort(image: Tensor) -> Tensor:
    """Photometric distortion, each part with even odds: uint8 [3, H, W] to the same.

    Brightness; contrast; saturation; hue; and contrast last instead of second in half of the cases.
    Hue and saturation are changed in Pillow's HSV, whose hue has 256 steps (OpenCV's has 180).
    """
    contrast_last = bool(np.random.randint(2))
    if np.random.randint(2):
        image = linear(image, 1.0, np.random.uniform(-BRIGHTNESS, BRIGHTNESS))
    if not contrast_last and np.random.randint(2):
        image = linear(image, np.random.uniform(*CONTRAST), 0.0)
    saturation = np.random.uniform(*SATURATION) if np.random.randint(2) else 1.0
    turn = np.random.uniform(-HUE_DEGREES, HUE_DEGREES) if np.random.randint(2) else 0.0
    if saturation != 1 or turn:
        image = turned(image, saturation, turn)
    if contrast_last and np.random.randint(2):
        image = linear(image, np.random.uniform(*CONTRAST), 0.0)
    return image


def linear(image: Tensor, factor: float, offset: float) -> Tensor:
    """factor x + offset, cut to 0..255 and to whole numbers, as mmsegmentation does."""
    return image.float().mul_(factor).add_(offset).clamp_(0, 255).to(torch.uint8)


def turned(image: Tensor, saturation: float, degrees: float) -> Tensor:
    """Saturation times a factor (cut at full), hue turned by degrees: uint8 [3, H, W]."""
    hsv = v2.functional.to_pil_image(image).convert("HSV")
    hue, saturated, value = hsv.split()
    shift = round(degrees / 360 * 256)
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    saturated = saturated.point([min(int(level * saturation), 255) for level in range(256)])
    rgb = Image.merge("HSV", (hue, saturated, value)).convert("RGB")
    return v2.functional.pil_to_tensor(rgb)


class SegmentTransform:
    """Training: scale, crop, flip, distort, pad; of image and label map together.

    Args:
        size: (h, w) of the result, pixels.
        scale: two numbers that bound the sides of the image before `ratio`, see `fitted`.
        ratio: smallest and largest factor on `scale`.
        most_of_one: see `crop_place`.
        flip: flip half of them left to right.
        distortion: see `distort`.

    Raises:
        BadInput: numbers that are no such.
    """

    takes_target = True

    def __init__(
        self,
        size: Size,
        *,
        scale: Size = (2048, 512),
        ratio: tuple[float, float] = (0.5, 2.0),
        most_of_one: float = 0.75,
        flip: bool = True,
        distortion: bool = True,
    ) -> None:
        if not 0 < ratio[0] <= ratio[1]:
            raise BadInput(f"ratio_range {ratio} is not a smallest and a largest factor above 0")
        if not 0 < most_of_one <= 1:
            raise BadInput(f"cat_max_ratio {most_of_one} must be above 0 and at most 1")
        self.size, self.scale, self.ratio = size, scale, ratio
        self.most_of_one, self.flip, self.distortion = most_of_one, flip, distortion

    def __call__(self, image: Image.Image, label: np.ndarray) -> dict[str, Tensor]:
        """A view: x uint8 [3, h, w], y uint8 [h, w], extent int64 [2].

        `extent` is (rows, columns) of the view before padding. The image is padded on the right and
        at the bottom with zeros, which `engine_segment` sets to the mean once it has normalised;
        the label with 255.
        """
        pixels, classes = as_tensors(image, label)
        factor = np.random.uniform(*self.ratio)
        bounds = (int(self.scale[0] * factor), int(self.scale[1] * factor))
        scaled = fitted(classes.shape, (max(bounds[0], 1), max(bounds[1], 1)))
        pixels, classes = resize_image(pixels, scaled), resize_label(classes, scaled)
        rows, columns = crop_place(classes, self.size, self.most_of_one)
        pixels, classes = pixels[:, rows, columns], classes[rows, columns]
        if self.flip and np.random.randint(2):
            pixels, classes = pixels.flip(-1), classes.flip(-1)
        if self.distortion:
            pixels = distort(pixels)
        h, w = classes.shape
        right_and_below = (0, self.size[1] - w, 0, self.size[0] - h)
        return {
            "x": F.pad(pixels, right_and_below),
            "y": F.pad(classes, right_and_below, value=IGNORE),
            "extent": torch.tensor([h, w]),
        }


class SegmentEvalTransform:
    """Evaluation: the image scaled within two bounds, the label map as it is.

    Args:
        scale: see `fitted`; (2048, 512) makes the short side 512, unless the long one passes 2048.
    """

    takes_target = True

    def __init__(self, scale: Size = (2048, 512)) -> None:
        self.scale = scale

    def __call__(self, image: Image.Image, label: np.ndarray) -> dict[str, Tensor]:
        """A view: x uint8 [3, h, w], y uint8 [H, W]."""
        pixels, classes = as_tensors(image, label)
        return {"x": resize_image(pixels, fitted(classes.shape, self.scale)), "y": classes}
