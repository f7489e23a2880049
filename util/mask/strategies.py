"""Mask strategies, by name.

Every strategy gives each patch a priority; the `num_visible` patches of smallest priority stay
visible, and noise decides among equal ones. Sorts are stable and scores are float64, so a mask
depends on nothing but its own image and its own noise: not on the batch, the order, the precision
or the device.

The work is split in two. `draw` runs in the loader's worker, on the CPU, and makes the noise of one
image; `mask` runs on the device, for a batch, without a host synchronisation.

A new strategy is one class with `draw` and `mask` and one line in `STRATEGIES`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from util.errors import BadInput
from util.spec import Pair


class MaskStrategy(Protocol):
    """What the loader and the engine need of a strategy."""

    uses_averages: bool

    def draw(self, grid: Pair, generator: Generator) -> Tensor:
        """Noise of one image: float32 [S, L], S as the strategy needs."""
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
            f"mask_ratio {mask_ratio} leaves {visible} of {num_patches} patches visible; "
            "at least one must be visible and one masked"
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


class Random:
    """Uniformly random patches (MAE, section 3)."""

    uses_averages = False

    def draw(self, grid: Pair, generator: Generator) -> Tensor:
        """float32 [1, L], uniform in [0, 1)."""
        return torch.rand(1, math.prod(grid), generator=generator, dtype=torch.float32)

    def mask(self, noise: Tensor, averages: Tensor | None, num_visible: int) -> Tensor:
        """See `MaskStrategy.mask`."""
        return keep_smallest(noise[:, 0], num_visible)


class Grid:
    """A regular lattice of visible patches, at any ratio.

    The priority is the patch's rank in the 8 x 8 Bayer matrix, tiled over the grid: taking patches
    by rank keeps them evenly spread at every count (at 75 % exactly MAE's grid-wise mask, one patch
    of every 2 x 2 visible). Noise chooses among patches of equal rank. The lattice itself is the
    same for every image, as MAE's is: halves of the grid differ by at most one line of patches.
    """

    uses_averages = False
    order = 8

    def draw(self, grid: Pair, generator: Generator) -> Tensor:
        """float32 [1, L]: Bayer rank + uniform noise in [0, 1), exact to 2^-18."""
        gh, gw = grid
        rank = bayer_matrix(self.order)
        rank = rank.repeat(-(-gh // self.order), -(-gw // self.order))[:gh, :gw]
        # Noise on multiples of 2^-18 keeps the float32 sum exact, hence always below the next rank.
        ties = torch.randint(2**18, (1, gh * gw), generator=generator) / 2**18
        return rank.reshape(1, -1) + ties

    def mask(self, noise: Tensor, averages: Tensor | None, num_visible: int) -> Tensor:
        """See `MaskStrategy.mask`."""
        return keep_smallest(noise[:, 0], num_visible)


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

    def draw(self, grid: Pair, generator: Generator) -> Tensor:
        """float32 [1, L]: minus the number of the first rectangle over the patch + noise in [0, 1).

        The noise is exact to 2^-14, and drawn after the rectangles.
        """
        covered_by = torch.full(grid, float(self.at_once * self.rounds))
        for start in range(0, self.at_once * self.rounds, self.at_once):
            inside = self._rectangles(grid, generator)  # [at_once, gh, gw]
            numbers = torch.arange(start, start + self.at_once, dtype=torch.float32)
            first = numbers[:, None, None].where(inside, torch.inf).amin(dim=0)
            covered_by = torch.minimum(covered_by, first)
            if covered_by.max() < start + self.at_once:
                break
        # Numbers up to 1,024 leave 14 of float32's 24 bits: the sum is exact, below the next rank.
        ties = torch.randint(2**14, (1, math.prod(grid)), generator=generator) / 2**14
        return ties - covered_by.reshape(1, -1)

    def _rectangles(self, grid: Pair, generator: Generator) -> Tensor:
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

    def __init__(self, share: float = 0.5, order: str = "far", temperature: float = 1.0) -> None:
        if not 0 <= share <= 1:
            raise BadInput(f"avg_share must lie in [0, 1], not {share}")
        if order not in ORDERS:
            raise BadInput(f"unknown avg_order {order!r}, choose from {list(ORDERS)}")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise BadInput(f"avg_temperature must be a number from 0 up, not {temperature}")
        self.share, self.order, self.temperature = share, order, temperature

    def draw(self, grid: Pair, generator: Generator) -> Tensor:
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


STRATEGIES: dict[str, Callable[..., MaskStrategy]] = {
    "random": lambda **_: Random(),
    "block": lambda **_: Block(),
    "grid": lambda **_: Grid(),
    "average": lambda *, order, temperature, **_: Mixed(1.0, order, temperature),
    "mixed": lambda *, share, order, temperature: Mixed(share, order, temperature),
}


# What measurements are under unless told otherwise, so that runs compare: MAE's own masks.
STANDARD: dict[str, Any] = {
    "mask": "random",
    "mask_ratio": 0.75,
    "avg_share": 0.5,
    "avg_order": "far",
    "avg_temperature": 1.0,
}


def strategy_of(settings: Mapping[str, Any]) -> MaskStrategy:
    """The strategy of settings with the names of `STANDARD`; see `create_strategy`."""
    return create_strategy(
        settings["mask"],
        avg_share=settings["avg_share"],
        avg_order=settings["avg_order"],
        avg_temperature=settings["avg_temperature"],
    )


def create_strategy(
    name: str, *, avg_share: float = 0.5, avg_order: str = "far", avg_temperature: float = 1.0
) -> MaskStrategy:
    """The strategy of that name.

    Args:
        name: a key of `STRATEGIES`.
        avg_share: share of the masked patches that `mixed` chooses by their average, 0 to 1.
        avg_order: far | near | high | low, which averages go first (`average`, `mixed`).
        avg_temperature: factor of the Gumbel noise on the score; 0 is the strict order.

    Raises:
        BadInput: unknown name or setting; the message lists the valid ones.
    """
    if name not in STRATEGIES:
        raise BadInput(f"unknown mask {name!r}, choose from {list(STRATEGIES)}")
    return STRATEGIES[name](share=avg_share, order=avg_order, temperature=avg_temperature)
