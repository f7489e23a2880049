"""Mask strategies, by name.

Every strategy gives each patch a priority; the `num_visible` patches of smallest priority stay
visible, and noise decides among equal ones. Sorts are stable and scores are float64, so a mask
depends on nothing but its own image and its own noise: not on the batch, the order, the precision
or the device.

The work is split in two. `draw` runs in the loader's worker, on the CPU, and makes the noise of one
image; `mask` runs on the device, for a batch, without a host synchronisation.

A strategy draws over a grid of any number of axes: rows and columns of an image, or before them the
times of a clip. What a grid is of is not its concern: patches, or cells of several (`Cells`).

A new strategy is one class with `draw` and `mask` under `@STRATEGIES.register("name")`. Arguments
of its constructor are settings of its own; `add_flags` gives each of them a flag of its name.
"""

import argparse
import math
from collections.abc import Mapping
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from util.errors import BadInput
from util.flag_types import number
from util.names import Registry
from util.spec import Shape


class MaskStrategy(Protocol):
    """What the loader and the engine need of a strategy.

    A class may have a static method `add_flags(group)`, which adds a flag for each argument of its
    constructor; settings without a flag stay at their defaults.
    """

    uses_averages: bool

    def draw(self, grid: Shape, generator: Generator) -> Tensor:
        """Noise of one sample: float32 [S, L], S as the strategy needs, L the grid's product."""
        ...

    def mask(self, noise: Tensor, averages: Tensor | None, num_visible: int) -> Tensor:
        """Masks of a batch: bool [B, L], True = masked, `num_visible` False in each row.

        Args:
            noise: float32 [B, S', L], what `draw` gave, stacked; further rows are ignored.
            averages: float64 [B, L], patch averages of the uint8 images (`patch_averages`); None
                where the strategy does not use them.
            num_visible: patches that stay visible, on the host.
        """
        ...


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """K = int(L * (1 - mask_ratio)), MAE's count.

    Raises:
        BadInput: nothing would be visible, or nothing masked.
    """
    if not 0 < mask_ratio < 1:
        raise BadInput(f"mask_ratio must lie between 0 and 1, not {mask_ratio}")
    visible = int(num_patches * (1 - mask_ratio))
    if not 0 < visible < num_patches:
        raise BadInput(
            f"mask_ratio {mask_ratio} leaves {visible} of {num_patches} patches (cells, with "
            "--mask_cell) visible; at least one must be visible and one masked"
        )
    return visible


def keep_smallest(priority: Tensor, num_visible: int, ties: Tensor | None = None) -> Tensor:
    """Mask all but the `num_visible` smallest priorities of each row.

    Args:
        priority: [B, L].
        ties: [B, L], of equal priorities the smaller of these stays visible; None: the lower
            index, which leans to the top left wherever equal priorities are common.

    Returns:
        bool [B, L], True = masked.
    """
    if ties is None:
        order = priority.argsort(dim=1, stable=True)
    else:  # stable: what is equal keeps the order of `ties`
        by_ties = ties.argsort(dim=1, stable=True)
        order = by_ties.gather(1, priority.gather(1, by_ties).argsort(dim=1, stable=True))
    keep = order[:, :num_visible]
    mask = torch.ones(priority.shape, dtype=torch.bool, device=priority.device)
    return mask.scatter_(1, keep, False)


def fixed_order_mean(x: Tensor) -> Tensor:
    """Mean over the last dimension by halving, so that every device adds in the same order.

    Two patches as far above as below the mean have (nearly) equal scores; a reduction whose order
    depends on the batch or the device would rank them by its rounding, here one way, there another.

    Returns:
        [..., 1].
    """
    total, n = x, x.shape[-1]
    while total.shape[-1] > 1:
        if total.shape[-1] % 2:
            total = torch.nn.functional.pad(total, (0, 1))
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total / n


STRATEGIES: Registry[type[MaskStrategy]] = Registry("mask")


def two_axes(grid: Shape, name: str) -> tuple[int, int]:
    """The two axes of a grid that has no others, but for those of length 1.

    Raises:
        BadInput: there are more: the strategy knows rows and columns alone.
    """
    sides = grid if len(grid) == 2 else tuple(side for side in grid if side > 1)
    if len(sides) > 2:
        raise BadInput(
            f"--mask {name} draws over rows and columns, and this grid is "
            f"{' x '.join(map(str, grid))}; give a --mask_cell that spans the other axes (0: the "
            "whole axis), or --mask random"
        )
    rows, columns = (1, 1, *sides)[-2:]
    return rows, columns


@STRATEGIES.register("random")
class Random:
    """Uniformly random patches (MAE, section 3)."""

    uses_averages = False

    def draw(self, grid: Shape, generator: Generator) -> Tensor:
        """float32 [1, L], uniform in [0, 1)."""
        return torch.rand(1, math.prod(grid), generator=generator, dtype=torch.float32)

    def mask(self, noise: Tensor, averages: Tensor | None, num_visible: int) -> Tensor:
        """See `MaskStrategy.mask`."""
        return keep_smallest(noise[:, 0], num_visible)


@STRATEGIES.register("grid")
class Grid:
    """A regular lattice of visible patches, at any ratio.

    The priority is the patch's rank in the 8 x 8 Bayer matrix, tiled over the grid: taking patches
    by rank keeps them evenly spread at every count (at 75 % exactly MAE's grid-wise mask, one patch
    of every 2 x 2 visible). Noise chooses among patches of equal rank. The lattice itself is the
    same for every image, as MAE's is: halves of the grid differ by at most one line of patches.
    """

    uses_averages = False
    order = 8

    def draw(self, grid: Shape, generator: Generator) -> Tensor:
        """float32 [1, L]: Bayer rank + uniform noise in [0, 1), exact to 2^-18."""
        gh, gw = two_axes(grid, "grid")
        rank = bayer_matrix(self.order)
        rank = rank.repeat(-(-gh // self.order), -(-gw // self.order))[:gh, :gw]
        # Noise on multiples of 2^-18 keeps the float32 sum exact, hence always below the next rank.
        ties = torch.randint(2**18, (1, gh * gw), generator=generator) / 2**18
        return rank.reshape(1, -1) + ties

    def mask(self, noise: Tensor, averages: Tensor | None, num_visible: int) -> Tensor:
        """See `MaskStrategy.mask`."""
        return keep_smallest(noise[:, 0], num_visible)


@STRATEGIES.register("block")
class Block:
    """Rectangles, first covered first masked (block-wise masks after BEiT, as in MAE's ablation).

    Rectangles of aspect 0.3 to 1 / 0.3 (log-uniform) and 8 % to 40 % of the grid's area (uniform)
    fall at uniformly random places; a patch is masked the earlier the sooner one covers it. Noise
    chooses among patches that the same rectangle covers first: of the last rectangle often only a
    part is masked, and by any fixed order that part would lie on one side.
    """

    uses_averages = False
    aspects = (0.3, 1 / 0.3)  # as BEiT's: a turned grid has the same rectangles
    areas = (0.08, 0.4)
    at_once = 32
    rounds = 32  # 1,024 rectangles: what none of them covers (seen from 32 x 32 on) is masked last

    def draw(self, grid: Shape, generator: Generator) -> Tensor:
        """float32 [1, L]: minus the number of the first rectangle over the patch + noise in [0, 1).

        The noise is exact to 2^-14, and drawn after the rectangles.
        """
        sides = two_axes(grid, "block")
        covered_by = torch.full(sides, float(self.at_once * self.rounds))
        for start in range(0, self.at_once * self.rounds, self.at_once):
            inside = self._rectangles(sides, generator)  # [at_once, gh, gw]
            numbers = torch.arange(start, start + self.at_once, dtype=torch.float32)
            first = numbers[:, None, None].where(inside, torch.inf).amin(dim=0)
            covered_by = torch.minimum(covered_by, first)
            if covered_by.max() < start + self.at_once:
                break
        # Numbers up to 1,024 leave 14 of float32's 24 bits: the sum is exact, below the next rank.
        ties = torch.randint(2**14, (1, math.prod(grid)), generator=generator) / 2**14
        return ties - covered_by.reshape(1, -1)

    def _rectangles(self, grid: tuple[int, int], generator: Generator) -> Tensor:
        """bool [at_once, gh, gw], True inside each rectangle."""
        gh, gw = grid
        u = torch.rand(4, self.at_once, generator=generator)
        low, high = self.areas
        area = (low + (high - low) * u[0]) * gh * gw
        log_low, log_high = (math.log(a) for a in self.aspects)
        aspect = (log_low + (log_high - log_low) * u[1]).exp()
        height = (area * aspect).sqrt().round().clamp(1, gh)
        width = (area / aspect).sqrt().round().clamp(1, gw)
        top = (u[2] * (gh - height + 1)).floor()
        left = (u[3] * (gw - width + 1)).floor()
        y, x = torch.arange(gh)[None, :], torch.arange(gw)[None, :]
        rows = (y >= top[:, None]) & (y < (top + height)[:, None])
        columns = (x >= left[:, None]) & (x < (left + width)[:, None])
        return rows[:, :, None] & columns[:, None, :]

    def mask(self, noise: Tensor, averages: Tensor | None, num_visible: int) -> Tensor:
        """See `MaskStrategy.mask`."""
        return keep_smallest(noise[:, 0], num_visible)


ORDERS = ("far", "near", "high", "low")


@STRATEGIES.register("mixed")
class Mixed:
    """M-MAE's patch-average masking combined with random masking (our reading of it).

    z is the patch average standardised over its image; the score is |z| (`far`), -|z| (`near`),
    z (`high`) or -z (`low`), plus `temperature` times Gumbel noise. Of the patches to mask,
    round(share * count) are those of highest score, the rest random among the others. Of equal
    scores that of higher Gumbel noise goes first, as at the smallest temperature above 0.
    Share 0 is `Random`, mask for mask; share 1 is average masking alone.
    """

    uses_averages = True
    eps = 1e-6  # gray levels; a uniform image has z = 0 throughout

    def __init__(
        self, avg_share: float = 0.5, avg_order: str = "far", avg_temperature: float = 1.0
    ) -> None:
        if not 0 <= avg_share <= 1:
            raise BadInput(f"avg_share must lie in [0, 1], not {avg_share}")
        if avg_order not in ORDERS:
            raise BadInput(f"unknown avg_order {avg_order!r}, choose from {list(ORDERS)}")
        if not (avg_temperature >= 0 and math.isfinite(avg_temperature)):
            raise BadInput(f"avg_temperature must be a number from 0 up, not {avg_temperature}")
        self.share, self.order, self.temperature = avg_share, avg_order, avg_temperature

    @staticmethod
    def add_flags(group: argparse._ArgumentGroup) -> None:
        """`--avg_share`, `--avg_order` and `--avg_temperature`."""
        group.add_argument(
            "--avg_share",
            type=number(float, 0, 1),
            default=0.5,
            help="share of the masked patches that --mask mixed picks by their average",
        )
        group.add_argument(
            "--avg_order",
            choices=ORDERS,
            default="far",
            help="which averages are masked first: far from or near the image's own mean, high or "
            "low",
        )
        group.add_argument(
            "--avg_temperature",
            type=number(float, 0),
            default=1.0,
            help="factor of the Gumbel noise on the averages' score; 0: strict order",
        )

    def draw(self, grid: Shape, generator: Generator) -> Tensor:
        """float32 [2, L]: uniform noise (drawn first, as `Random` draws it), Gumbel noise."""
        uniform = torch.rand(1, math.prod(grid), generator=generator, dtype=torch.float32)
        # Drawn here, on the CPU: logarithms differ by device. -log(E), E exponential, is Gumbel.
        exponential = torch.empty_like(uniform).exponential_(generator=generator)
        gumbel = -exponential.clamp(min=torch.finfo(torch.float32).tiny).log()
        return torch.cat([uniform, gumbel])

    def scores(self, averages: Tensor) -> Tensor:
        """float64 [B, L]: the score without noise."""
        deviation = averages - fixed_order_mean(averages)
        std = fixed_order_mean(deviation.square()).sqrt()
        z = deviation / (std + self.eps)
        return {"far": z.abs(), "near": -z.abs(), "high": z, "low": -z}[self.order]

    def mask(self, noise: Tensor, averages: Tensor | None, num_visible: int) -> Tensor:
        """See `MaskStrategy.mask`."""
        uniform = noise[:, 0]
        num_patches = uniform.shape[1]
        by_average = round(self.share * (num_patches - num_visible))
        if by_average == 0:
            return keep_smallest(uniform, num_visible)
        if averages is None:
            raise BadInput("average masking needs the patch averages of the images")
        gumbel = noise[:, 1]
        score = self.scores(averages) + self.temperature * gumbel.double()
        chosen = keep_smallest(score, num_patches - by_average, ties=gumbel)
        return keep_smallest(uniform.masked_fill(chosen, torch.inf), num_visible)


def bayer_matrix(order: int) -> Tensor:
    """The Bayer matrix of ranks 0 .. order^2 - 1, float32 [order, order]; order a power of two."""
    matrix = torch.zeros(1, 1)
    while matrix.shape[0] < order:
        matrix = torch.cat(
            [
                torch.cat([4 * matrix, 4 * matrix + 2], 1),
                torch.cat([4 * matrix + 3, 4 * matrix + 1], 1),
            ]
        )
    return matrix


@STRATEGIES.register("average")
class Average(Mixed):
    """Patches of highest score alone: `Mixed` of share 1."""

    def __init__(self, avg_order: str = "far", avg_temperature: float = 1.0) -> None:
        super().__init__(1.0, avg_order, avg_temperature)


# What measurements are under unless told otherwise, so that runs compare: MAE's own masks.
STANDARD: dict[str, Any] = {
    "mask": "random",
    "mask_ratio": 0.75,
    "mask_cell": (1,),
    "avg_share": 0.5,
    "avg_order": "far",
    "avg_temperature": 1.0,
}


def setting_names(strategy: type[MaskStrategy]) -> list[str]:
    """The settings of a strategy, which are the arguments of its constructor."""
    if strategy.__init__ is object.__init__:
        return []
    return list(signature(strategy).parameters)


def mask_settings() -> list[str]:
    """All settings that decide the masks of a run: those of `STANDARD` and of every strategy."""
    own = [name for strategy in STRATEGIES.values() for name in setting_names(strategy)]
    return list(dict.fromkeys([*STANDARD, *own]))


def build_strategy(settings: Mapping[str, Any]) -> MaskStrategy:
    """The strategy that settings name under `mask`, with those of them that are its own."""
    return create_strategy(
        settings["mask"], **{n: settings[n] for n in mask_settings() if n in settings}
    )


def create_strategy(name: str, **settings: Any) -> MaskStrategy:
    """The strategy of that name.

    Args:
        name: a key of `STRATEGIES`.
        settings: of any strategy (`mask_settings`), such as those of `Mixed`; each takes its own.

    Raises:
        BadInput: unknown name or setting; the message lists the valid ones.
    """
    strategy = STRATEGIES.find(name)
    if strange := settings.keys() - set(mask_settings()):
        raise BadInput(
            f"unknown setting of masks: {', '.join(sorted(strange))}, choose from {mask_settings()}"
        )
    own = setting_names(strategy)
    return strategy(**{name: value for name, value in settings.items() if name in own})
