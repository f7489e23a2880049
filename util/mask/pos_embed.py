"""Fixed 2-D sin-cos position codes and M-MAE's offset in them.

MAE's code (its ``get_2d_sincos_pos_embed``) gives each axis half of the channels; an axis at
coordinate c has sin(w_k c) for all frequencies w_k = 10000^(-k / (D/4)), then cos(w_k c); the first
half belongs to the column (x), the second to the row (y). M-MAE puts an offset into it: the
coordinate c and a phase phi in sin(w_k c + phi), see `COORDINATES`.

The code is separable, so sines and cosines are only ever taken of one axis at a time. All
arithmetic is float64, so that a code does not depend on the device or on autocast; callers cast.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import BadInput
from util.float64 import float64_home, to_float64
from util.spec import Pair


def indices(size: int, device: torch.device | None = None) -> Tensor:
    """c = i, MAE's coordinate. float64 [size]."""
    return torch.arange(size, dtype=torch.float64, device=device)


def centered(size: int, device: torch.device | None = None) -> Tensor:
    """c = i - (size - 1) / 2: zero in the middle of the image. float64 [size]."""
    return indices(size, device) - (size - 1) / 2


# How each `--pos_offset` places the coordinates. `learned` adds a phase per axis and frequency,
# `jitter` a shift per image while training; both are added by the caller, on top of `centered`.
COORDINATES: dict[str, Callable[[int, torch.device | None], Tensor]] = {
    "none": indices,
    "center": centered,
    "learned": centered,
    "jitter": centered,
}


def spread(coordinates: Tensor, size: int) -> Tensor:
    """`size` patches over the extent of those at `coordinates` (1 apart): their centres.

    Args:
        coordinates: float64 [n].

    Returns:
        float64 [size].
    """
    if size == len(coordinates):
        return coordinates
    centres = (indices(size, coordinates.device) + 0.5) * (len(coordinates) / size) - 0.5
    return coordinates[0] + centres


def axis_code(coordinates: Tensor, dim: int, phase: Tensor | None = None) -> Tensor:
    """sin(w_k c + phi_k) and cos(w_k c + phi_k) of one axis.

    Args:
        coordinates: float64 [..., n], in patches.
        dim: channels of this axis, even.
        phase: [dim / 2], radians, or None for zero.

    Returns:
        float64 [..., n, dim]: all sines, then all cosines.
    """
    k = torch.arange(dim // 2, dtype=torch.float64, device=coordinates.device)
    frequencies = 1.0 / 10000 ** (k / (dim / 2.0))
    angles = coordinates.unsqueeze(-1) * frequencies
    if phase is not None:
        angles = angles + to_float64(phase)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(
    dim: int,
    grid: Pair,
    pos_offset: str = "none",
    *,
    phase: Tensor | None = None,
    shift: Tensor | None = None,
    device: torch.device | None = None,
    extent: Pair | None = None,
) -> Tensor:
    """The position code of a grid of patches.

    Args:
        dim: channels, a multiple of 4.
        grid: (gh, gw) patches.
        pos_offset: a key of `COORDINATES`.
        phase: [2, dim / 4], row axis then column axis, radians; `learned` hands its own.
        shift: [B, 2], row then column, in patches; added to the coordinates of each image.
        device: where to compute; a given phase or shift decides it otherwise.
        extent: grid whose image this one covers with more or fewer patches; None: patches keep
            their distance of 1.

    Returns:
        float64 [gh*gw, dim], or [B, gh*gw, dim] with a shift; on the CPU if the device has none.

    Source: MAE (arXiv 2111.06377), appendix A.1 and its code; the offset is our reading of M-MAE.
    """
    if dim % 4:
        raise BadInput(f"a 2-D sin-cos code needs a multiple of 4 channels, not {dim}")
    if pos_offset not in COORDINATES:
        raise BadInput(f"unknown pos_offset {pos_offset!r}, choose from {sorted(COORDINATES)}")
    for given in (phase, shift):
        device = given.device if given is not None else device
    device = device if device is None else float64_home(device)
    gh, gw = grid
    rows, columns = (COORDINATES[pos_offset](size, device) for size in grid)
    if extent is not None:
        rows, columns = (
            spread(COORDINATES[pos_offset](side, device), size)
            for side, size in zip(extent, grid, strict=True)
        )
    if shift is not None:
        rows = rows + to_float64(shift[:, 0:1])  # [B, gh]
        columns = columns + to_float64(shift[:, 1:2])  # [B, gw]
    code_y = axis_code(rows, dim // 2, None if phase is None else phase[0])
    code_x = axis_code(columns, dim // 2, None if phase is None else phase[1])
    batch = code_y.shape[:-2]
    code = torch.cat(
        [
            code_x.unsqueeze(-3).expand(*batch, gh, gw, dim // 2),
            code_y.unsqueeze(-2).expand(*batch, gh, gw, dim // 2),
        ],
        dim=-1,
    )
    return code.reshape(*batch, gh * gw, dim)


def resize_table(table: Tensor, grid: Pair, to: Pair) -> Tensor:
    """A learned table of positions for another grid, as MAE's code does: bicubic, no antialiasing.

    Args:
        table: [1, n + gh*gw, D], those of n class tokens first.
        grid, to: (gh, gw) before and after.

    Returns:
        [1, n + gh'*gw', D]; the class tokens' and, for an equal grid, all are unchanged.
    """
    if tuple(grid) == tuple(to):
        return table
    D, first = table.shape[-1], table.shape[1] - grid[0] * grid[1]
    patches_1DHW = table[:, first:].reshape(1, *grid, D).permute(0, 3, 1, 2)
    resized = F.interpolate(patches_1DHW, size=tuple(to), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :first], resized.permute(0, 2, 3, 1).reshape(1, -1, D)], dim=1)
