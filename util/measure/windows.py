"""Logits of whole images: at once, in windows that overlap, and over several scales.

A model is here any function of images, float [1, C, H, W], normalised, to logits [1, K, h, w] of
the same picture at any resolution. No gradient is kept. What is in memory beside the image is one
window's logits and one sum at the size of the image, in float32.

Source: mmsegmentation's `EncoderDecoder.whole_inference` and `slide_inference`, its test-time
augmentation, and the least short side of SETR's and MAE's evaluation.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import BadInput
from util.spec import Pair

Predict = Callable[[Tensor], Tensor]


def resize(x: Tensor, size: Pair) -> Tensor:
    """[B, C, H, W] at another (height, width): bilinear, corners not aligned, no antialiasing."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def whole(model: Predict, image: Tensor) -> Tensor:
    """Logits of an image at once.

    Args:
        model: see the module.
        image: float [1, C, H, W].

    Returns:
        float32 [1, K, H, W].
    """
    size = _size(image)
    return resize(model(image).float(), size)


@torch.no_grad()
def slide(model: Predict, image: Tensor, window: int | Pair, stride: int | Pair) -> Tensor:
    """Logits of an image as the mean over windows; a pixel's windows count alike.

    The last window of a row or column is moved inside. A side that is shorter than the window is
    one window of that side, so that an image that one window covers is as in `whole`.

    Args:
        model: see the module.
        image: float [1, C, H, W].
        window: side or (height, width), pixels.
        stride: from one window to the next, side or (down, right), pixels; at most the window.

    Returns:
        float32 [1, K, H, W].

    Raises:
        BadInput: windows that would leave pixels out.
    """
    windows, strides = _pair(window), _pair(stride)
    if any(not 1 <= s <= w for s, w in zip(strides, windows, strict=True)):
        raise BadInput(
            f"a window of {windows} pixels at a stride of {strides}: the stride must be at least 1 "
            "and at most the window, or pixels are left out"
        )
    H, W = _size(image)
    total: Tensor | None = None
    count = torch.zeros(1, 1, H, W, device=image.device)
    for top, bottom in spans(H, windows[0], strides[0]):
        for left, right in spans(W, windows[1], strides[1]):
            logits = whole(model, image[:, :, top:bottom, left:right])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], H, W)
            total[:, :, top:bottom, left:right] += logits
            count[:, :, top:bottom, left:right] += 1
    assert total is not None
    return total.div_(count)


def spans(length: int, window: int, stride: int) -> Iterator[Pair]:
    """(start, end) of the windows along a side of `length` pixels; all of the window's length,
    but at most the side's."""
    for number in range(max(math.ceil((length - window) / stride), 0) + 1):
        end = min(number * stride + window, length)
        yield max(end - window, 0), end


def scaled_sizes(size: Pair, scales: Sequence[float], short_side: int = 0) -> dict[Pair, int]:
    """The sizes of an image at some scales, and how many of the scales give each.

    Args:
        size: (height, width) at scale 1.
        scales: factors of both sides.
        short_side: the least length of the shorter side; the aspect is kept.

    Raises:
        BadInput: no scales, or one that is not positive.
    """
    if not scales or not all(scale > 0 and math.isfinite(scale) for scale in scales):
        raise BadInput(f"scales {list(scales)} must be at least one number above 0")
    sizes: dict[Pair, int] = {}
    for scale in scales:
        factor = max(scale, short_side / min(size))
        height, width = (max(int(side * factor + 0.5), 1) for side in size)  # mmcv's rounding
        sizes[height, width] = sizes.get((height, width), 0) + 1
    return sizes


@torch.no_grad()
def multi_scale(
    predict: Predict,
    image: Tensor,
    scales: Sequence[float],
    flip: bool,
    short_side: int = 0,
    size: Pair | None = None,
) -> Tensor:
    """Probabilities of an image as their mean over scales, each also mirrored.

    Logits are brought to the final size before their softmax. Scales that the least short side
    makes equal are computed once and count as often as they were asked for.

    Args:
        predict: images [1, C, h, w] to logits [1, K, h, w], for example
            `partial(slide, model, window=512, stride=341)`.
        image: float [1, C, H, W], scale 1; resized bilinearly.
        scales: factors of both sides; published: .5 .75 1 1.25 1.5 1.75.
        flip: whether to add the mirror image, left and right exchanged, of each scale.
        short_side: the least length of the shorter side; published: 512. 0: none.
        size: (height, width) of the result; None: the image's.

    Returns:
        float32 [1, K, H, W], which sums to 1 over the classes.

    Raises:
        BadInput: no scales, or one that is not positive.
    """
    to = size or _size(image)
    total: Tensor | None = None
    for scaled, times in scaled_sizes(_size(image), scales, short_side).items():
        picture = resize(image, scaled)
        for mirrored in (False, True) if flip else (False,):
            logits = predict(picture.flip(-1) if mirrored else picture).float()
            shares = resize(logits, to).softmax(dim=1)
            if mirrored:
                shares = shares.flip(-1)
            total = shares * times if total is None else total.add_(shares, alpha=times)
    assert total is not None
    return total.div_(len(scales) * (2 if flip else 1))


def _size(image: Tensor) -> Pair:
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"expected an image [1, C, H, W], got {list(image.shape)}")
    return image.shape[2], image.shape[3]


def _pair(side: int | Pair) -> Pair:
    return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
