"""Cells: patches that are hidden or seen together, on a grid of any number of axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from util.errors import BadInput
from util.spec import Shape


@dataclass(frozen=True)
class Cells:
    """A grid of cells over a grid of patches.

    Attributes:
        patches: the grid of patches.
        size: patches of a cell along each axis.
    """

    patches: Shape
    size: Shape

    @property
    def grid(self) -> Shape:
        """The grid of cells."""
        return tuple(p // s for p, s in zip(self.patches, self.size, strict=True))

    @property
    def patches_each(self) -> int:
        """Patches of one cell."""
        return math.prod(self.size)

    def to_patches(self, cells_BC: Tensor) -> Tensor:
        """What each patch's cell has: [B, C] to [B, L], both in raster order."""
        if self.patches_each == 1:
            return cells_BC
        x = cells_BC.unflatten(1, self.grid)
        for axis, times in enumerate(self.size, 1):
            x = x.repeat_interleave(times, dim=axis)
        return x.flatten(1)


def make_cells(patches: Shape, cell: Sequence[int]) -> Cells:
    """The cells of a grid.

    Args:
        patches: its lengths.
        cell: patches of a cell, one number for all axes or one for each; 0: the whole axis.

    Raises:
        BadInput: a number too many or too few, or cells that do not fill an axis.
    """
    if len(cell) not in (1, len(patches)):
        raise BadInput(
            f"--mask_cell {' '.join(map(str, cell))}: expected one number, or {len(patches)}, one "
            f"for each axis of the grid {' x '.join(map(str, patches))}"
        )
    sizes = tuple(cell) * (len(patches) if len(cell) == 1 else 1)
    sizes = tuple(side if size == 0 else size for side, size in zip(patches, sizes, strict=True))
    if any(size < 1 or side % size for side, size in zip(patches, sizes, strict=True)):
        sides = dict.fromkeys(patches) if len(cell) == 1 else patches
        common = [[n for n in range(1, side + 1) if side % n == 0] for side in sides]
        if len(cell) == 1:  # one number has to fit every axis
            common = [[n for n in common[0] if all(n in other for other in common)]]
        fitting = "; ".join(", ".join(map(str, numbers)) for numbers in common)
        raise BadInput(
            f"--mask_cell {' '.join(map(str, cell))} does not divide the grid of "
            f"{' x '.join(map(str, patches))} patches; what does: {fitting}"
        )
    return Cells(tuple(patches), sizes)
