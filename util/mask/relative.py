"""Relative position biases of other windows: the tables of Swin and BEiT, resized.

A table has a row for each offset between two patches of a window, (2h - 1)(2w - 1) of them in
raster order, and a column for each head.
"""

import numpy as np
import torch
from torch import Tensor

from util.spec import Pair

CUBIC = 3
# The official code looks for the ratio of its grid between these.
SMALLEST_RATIO, LARGEST_RATIO = 1.01, 1.5


def resize_bias(table: Tensor, old: Pair, new: Pair, resize: str = "rescale") -> Tensor:
    """The biases of one window as those of another, float64 inside, rounded once.

    Args:
        table: [(2h - 1)(2w - 1) + e, heads]; the last e rows, of the class token, stay as they are.
        old, new: (height, width) of the windows, in patches.
        resize: rescale: the window keeps its extent: a cubic spline on a grid whose steps grow
            geometrically from the centre, so that near offsets change least, as the official code.
            extend: an offset keeps its bias, one beyond the table has that at its edge.

    Source: Swin's and BEiT's loading of weights (microsoft/SimMIM, utils.py).
    """
    if tuple(old) == tuple(new):
        return table
    (h, w), inner = (2 * side - 1 for side in old), table
    extra = table[h * w :]
    inner = table[: h * w].double().unflatten(0, (h, w))
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        matrix = torch.from_numpy(_axis_matrix(before, after, resize)).to(table.device)
        inner = torch.tensordot(matrix, inner, dims=([1], [axis])).movedim(0, axis)
    return torch.cat([inner.flatten(0, 1).to(table.dtype), extra])


def _axis_matrix(old: int, new: int, resize: str) -> np.ndarray:
    """What makes biases of the offsets 1 - new ... new - 1 of those of 1 - old ... old - 1."""
    offsets = np.arange(1 - new, new, dtype=np.float64)
    if resize == "extend":
        rows = np.clip(offsets, 1 - old, old - 1).astype(int) + old - 1
        return np.eye(2 * old - 1)[rows]
    if old == new:
        return np.eye(2 * old - 1)
    if old == 1:  # one bias for all
        return np.ones((len(offsets), 1))
    places = _geometric_places(old - 1, new - 1)
    # As FITPACK's, which the official code calls: beyond the outermost place nothing changes.
    at = np.clip(offsets, places[0], places[-1])
    return np.linalg.solve(_splines(places, places).T, _splines(places, at).T).T


def _geometric_places(steps: int, reach: int) -> np.ndarray:
    """So many places on both sides of 0, of steps 1, q, q^2 ..., the last of them at `reach`."""
    low, high = SMALLEST_RATIO, LARGEST_RATIO
    ratio = high
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    side = np.cumsum(ratio ** np.arange(steps))
    return np.concatenate([-side[::-1], [0.0], side])


def _splines(places: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The B-splines of the interpolating cubic through `places`, at other points: [points, places].

    Of fewer than four places the polynomial through all of them.
    """
    degree, last = min(CUBIC, len(places) - 1), places[-1]
    inner = places[2:-2] if degree == CUBIC else places[:0]
    knots = np.concatenate([[places[0]] * (degree + 1), inner, [last] * (degree + 1)])
    x = at[:, None]
    basis = ((knots[:-1] <= x) & (x < knots[1:])).astype(np.float64)
    basis[at == last, len(places) - 1] = 1.0  # the last interval holds its end
    for k in range(1, degree + 1):
        width = knots[k:-1] - knots[: -k - 1], knots[k + 1 :] - knots[1:-k]
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.where(width[0] > 0, (x - knots[: -k - 1]) / width[0], 0.0)
            right = np.where(width[1] > 0, (knots[k + 1 :] - x) / width[1], 0.0)
        basis = left * basis[:, :-1] + right * basis[:, 1:]
    return basis
