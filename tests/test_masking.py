"""Masks: exact counts, each strategy's own law, references by loops, and what must not matter."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from util.errors import BadInput
from util.mask.patches import patch_averages
from util.mask.strategies import (
    ORDERS,
    STRATEGIES,
    Mixed,
    count_visible,
    create_strategy,
    fixed_order_mean,
    keep_smallest,
)

GRIDS = [(14, 14), (7, 5), (1, 8), (3, 2), (8, 8), (4, 4)]
RATIOS = [i / 20 for i in range(2, 20)]
USES_AVERAGES = ["average", "mixed"]


def noise_of(strategy, grid: tuple[int, int], number: int, seed: int = 0) -> Tensor:
    """What `number` images draw, each from a generator of its own: float32 [number, S, L]."""
    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(number)]
    return torch.stack([strategy.draw(grid, generator) for generator in generators])


def masks_of(name: str, grid: tuple[int, int], number: int, visible: int, **settings) -> np.ndarray:
    """bool [number, gh, gw] of a strategy that does not look at the images."""
    strategy = create_strategy(name, **settings)
    return strategy.mask(noise_of(strategy, grid, number), None, visible).numpy().reshape(-1, *grid)


def photographs(number: int = 12, size: tuple[int, int] = (56, 40), channels: int = 3) -> Tensor:
    """Crops of real photographs: uint8 [number, channels, *size]."""
    from skimage import data

    crops = []
    for i, photo in zip(range(number), itertools.cycle([data.astronaut(), data.camera()])):
        top, left = 31 * i % (512 - size[0]), 57 * i % (512 - size[1])
        crop = np.atleast_3d(photo)[top : top + size[0], left : left + size[1]]
        crops.append(np.broadcast_to(crop, (*size, 3)).transpose(2, 0, 1)[:channels])
    return torch.from_numpy(np.stack(crops))


# --- Counts ---


def expected_visible(grid: tuple[int, int], ratio: float) -> int:
    return int(math.prod(grid) * (1 - ratio))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_counts_are_exact_at_every_ratio(name, grid):
    L, B = math.prod(grid), 5
    strategy = create_strategy(name)
    noise = noise_of(strategy, grid, B)
    averages = 255 * torch.rand(B, L, dtype=torch.float64)
    possible = [ratio for ratio in RATIOS if expected_visible(grid, ratio) > 0]
    assert len(possible) >= 15
    for ratio in possible:
        visible = count_visible(L, ratio)
        assert visible == expected_visible(grid, ratio)
        mask = strategy.mask(noise, averages, visible)
        assert mask.dtype == torch.bool and mask.shape == (B, L), ratio
        assert (~mask).sum(dim=1).tolist() == [visible] * B, ratio


def test_count_visible_is_the_official_count():
    # Rounding included: 1 - .9 is a little less than .1, so that 100 patches leave 9.
    known = {(196, 0.75): 49, (35, 0.75): 8, (196, 0.9): 19, (100, 0.9): 9, (64, 0.1): 57}
    assert {given: count_visible(*given) for given in known} == known


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, 75, float("nan")])
def test_count_visible_refuses_ratios_outside_0_to_1(ratio):
    with pytest.raises(BadInput, match=f"between 0 and 1, not {ratio}"):
        count_visible(196, ratio)


@pytest.mark.parametrize(("patches", "ratio"), [(6, 0.95), (10, 0.9), (1, 0.5), (4, 1e-17)])
def test_count_visible_refuses_to_hide_all_or_nothing(patches, ratio):
    message = rf"mask_ratio {ratio} leaves \d of {patches} patches .*visible"
    with pytest.raises(BadInput, match=message):
        count_visible(patches, ratio)


# --- Noise ---


@pytest.mark.parametrize("grid", [(7, 5), (1, 8)])
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_noise_is_a_function_of_the_generator_alone(name, grid):
    strategy = create_strategy(name)
    noise = noise_of(strategy, grid, 6)
    assert noise.dtype == torch.float32 and noise.shape[2] == math.prod(grid)
    assert noise.isfinite().all()
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert torch.equal(noise_of(create_strategy(name), grid, 6), noise)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len({tuple(one.flatten().tolist()) for one in noise}) == 6


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_further_rows_of_noise_are_ignored(name):
    strategy = create_strategy(name)
    noise = noise_of(strategy, (7, 5), 4)
    averages = patch_averages(photographs(4), (8, 8))
    longer = torch.cat([noise, -100 * torch.rand(4, 2, 35)], dim=1)
    expected = strategy.mask(noise, averages, 9)
    assert torch.equal(strategy.mask(longer, averages, 9), expected)


def test_keep_smallest_masks_the_largest_and_breaks_ties_as_it_is_told():
    priority = torch.tensor([[3.0, 1.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0], [1.0, 0.0, 1.0, 1.0]])
    ties = torch.tensor([[0.0, 9.0, 1.0, 8.0], [3.0, 2.0, 1.0, 1.0], [7.0, 9.0, 5.0, 6.0]])
    assert keep_smallest(priority, 2, ties).tolist() == [
        [True, False, True, False],
        [True, True, False, False],
        [True, False, False, True],
    ]
    assert keep_smallest(priority, 2).tolist() == [
        [True, False, True, False],
        [False, False, True, True],
        [False, False, True, True],
    ]


# --- Random ---


def uniformity(counts: np.ndarray, trials: int, size: int, drawn: int) -> float:
    """p-value of `counts`: how often each of `size` items was among the `drawn` of a trial.

    Drawing without replacement makes Pearson's sum too small by (size - 1) / size times the share
    that was not drawn; so corrected it is chi-square with size - 1 degrees of freedom.
    """
    from scipy import stats

    expected = trials * drawn / size
    pearson = ((counts - expected) ** 2 / expected).sum()
    return stats.chi2.sf(pearson * (size - 1) / (size - drawn), size - 1)


@pytest.mark.parametrize(("grid", "visible"), [((7, 5), 8), ((14, 14), 49), ((1, 8), 6)])
def test_random_masks_every_patch_equally_often(grid, visible):
    number, L = 3000, math.prod(grid)
    masks = masks_of("random", grid, number, visible).reshape(number, L)
    assert 1e-4 < uniformity(masks.sum(axis=0), number, L, L - visible) < 1 - 1e-4


def test_uniformity_notices_a_bias():
    # A test of the test: priorities that favour the first patch.
    noise = torch.rand(3000, 35, generator=torch.Generator().manual_seed(0))
    noise[:, 0] *= 0.75
    counts = keep_smallest(noise, 8).sum(dim=0).numpy()
    assert uniformity(counts, 3000, 35, 27) < 1e-4


def test_random_masks_every_pair_equally_often():
    from scipy import stats

    number, L, masked = 3000, 35, 18
    masks = masks_of("random", (7, 5), number, L - masked).reshape(number, L).astype(int)
    together = (masks.T @ masks)[np.triu_indices(L, 1)]
    share = masked * (masked - 1) / (L * (L - 1))
    p = 2 * np.minimum(
        stats.binom.cdf(together, number, share), stats.binom.sf(together - 1, number, share)
    )
    assert p.min() * len(p) > 1e-3  # Bonferroni, over the 595 pairs


# --- Average and mixed ---


def reference(
    image: np.ndarray,
    patch: int,
    noise: np.ndarray,
    visible: int,
    share: float,
    order: str,
    temperature: float,
) -> list[bool]:
    """As docs/method.md defines it, for one uint8 image [C, H, W] and noise [2, L]: a list of L."""
    C, H, W = image.shape
    averages = []
    for top in range(0, H, patch):
        for left in range(0, W, patch):
            pixels = image[:, top : top + patch, left : left + patch].astype(np.int64)
            averages.append(int(pixels.sum()) / (C * patch * patch))
    L = len(averages)
    mean = math.fsum(averages) / L
    std = math.sqrt(math.fsum((a - mean) ** 2 for a in averages) / L)
    scores = []
    for patch_average, gumbel in zip(averages, noise[1], strict=True):
        z = (patch_average - mean) / (std + 1e-6)
        score = {"far": abs(z), "near": -abs(z), "high": z, "low": -z}[order]
        scores.append(score + temperature * float(gumbel))
    by_average = round(share * (L - visible))
    ranking = sorted(range(L), key=lambda i: (scores[i], noise[1][i]))
    chosen = set(ranking[L - by_average :])
    others = sorted((i for i in range(L) if i not in chosen), key=lambda i: noise[0][i])
    kept = set(others[:visible])
    return [i not in kept for i in range(L)]


@pytest.mark.parametrize("order", ORDERS)
def test_scores_are_the_standardised_averages_in_float64(order):
    averages = patch_averages(photographs(), (8, 8))
    z = averages.numpy() - averages.numpy().mean(axis=1, keepdims=True)
    z /= np.sqrt((z**2).mean(axis=1, keepdims=True)) + 1e-6
    scores = Mixed(avg_order=order).scores(averages)
    assert scores.dtype == torch.float64
    expected = {"far": np.abs(z), "near": -np.abs(z), "high": z, "low": -z}[order]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("temperature", [0, 1, 0.25])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("size", "patch", "channels"), [((56, 40), 8, 3), ((28, 28), 7, 1)])
def test_mixed_equals_the_reference(size, patch, channels, order, temperature, share):
    images = photographs(12, size, channels)
    grid = (size[0] // patch, size[1] // patch)
    strategy = create_strategy(
        "mixed", avg_share=share, avg_order=order, avg_temperature=temperature
    )
    noise = noise_of(strategy, grid, len(images))
    averages = patch_averages(images, (patch, patch))
    for ratio in (0.3, 0.75):
        visible = count_visible(math.prod(grid), ratio)
        mask = strategy.mask(noise, averages, visible)
        settings = (visible, share, order, temperature)
        for i, image in enumerate(images.numpy()):
            expected = reference(image, patch, noise[i].numpy(), *settings)
            assert mask[i].tolist() == expected, (i, ratio)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_average_equals_the_reference_and_is_mixed_of_share_1(order, temperature):
    images = photographs()
    average = create_strategy("average", avg_order=order, avg_temperature=temperature)
    mixed = create_strategy("mixed", avg_share=1, avg_order=order, avg_temperature=temperature)
    noise = noise_of(average, (7, 5), len(images))
    assert torch.equal(noise_of(mixed, (7, 5), len(images)), noise)
    mask = average.mask(noise, patch_averages(images, (8, 8)), 9)
    assert torch.equal(mixed.mask(noise, patch_averages(images, (8, 8)), 9), mask)
    for i, image in enumerate(images.numpy()):
        expected = reference(image, 8, noise[i].numpy(), 9, 1, order, temperature)
        assert mask[i].tolist() == expected, i


def test_average_orders_mask_what_they_are_named_for():
    averages = torch.tensor([[0.0, 40, 90, 110, 160, 250]], dtype=torch.float64)  # mean 108.3
    noise = noise_of(Mixed(), (2, 3), 1)
    masked = {}
    for order in ORDERS:
        strategy = create_strategy("average", avg_order=order, avg_temperature=0)
        masked[order] = strategy.mask(noise, averages, 4)[0].nonzero().flatten().tolist()
    assert masked == {"far": [0, 5], "near": [2, 3], "high": [4, 5], "low": [0, 1]}


@pytest.mark.parametrize("grid", GRIDS)
def test_share_0_is_random_mask_for_mask(grid):
    L = math.prod(grid)
    random, mixed = create_strategy("random"), create_strategy("mixed", avg_share=0)
    averages = 255 * torch.rand(20, L, dtype=torch.float64)
    for visible in (1, L // 4, L - 1):
        expected = random.mask(noise_of(random, grid, 20), None, visible)
        noise = noise_of(mixed, grid, 20)
        assert torch.equal(mixed.mask(noise, averages, visible), expected)
        assert torch.equal(mixed.mask(noise, None, visible), expected)


def test_averages_are_needed_as_soon_as_one_patch_is_chosen_by_them():
    for name in USES_AVERAGES:
        strategy = create_strategy(name)
        assert strategy.uses_averages
        with pytest.raises(BadInput, match="patch averages"):
            strategy.mask(noise_of(strategy, (4, 4), 2), None, 4)
    assert not any(create_strategy(n).uses_averages for n in set(STRATEGIES) - set(USES_AVERAGES))


def test_the_rest_of_mixed_is_random_among_the_others():
    image = photographs(1)
    averages, number = patch_averages(image, (8, 8)), 3000
    strategy = create_strategy("mixed", avg_share=0.5, avg_temperature=0)
    masks = strategy.mask(noise_of(strategy, (7, 5), number), averages.expand(number, -1), 11)
    counts = masks.sum(dim=0).numpy()
    always = counts == number
    assert always.sum() == 12  # half of the 24 to mask
    assert 1e-4 < uniformity(counts[~always], number, 23, 12) < 1 - 1e-4


def test_temperature_goes_from_strict_order_to_random():
    averages, number = patch_averages(photographs(1), (8, 8)).expand(3000, -1), 3000
    counts = {}
    for temperature in (0, 1, 1e9):
        strategy = create_strategy("average", avg_temperature=temperature)
        masks = strategy.mask(noise_of(strategy, (7, 5), number), averages, 11)
        counts[temperature] = masks.sum(dim=0).numpy()
    assert set(counts[0]) == {0, number}
    assert counts[1].min() > 0
    # What temperature 0 masks is masked more often at 1, too.
    assert counts[1][counts[0] > 0].mean() > counts[1][counts[0] == 0].mean() + 0.05 * number
    assert 1e-4 < uniformity(counts[1e9], number, 35, 24) < 1 - 1e-4


def test_gumbel_noise_is_gumbel_and_apart_from_the_uniform_noise():
    from scipy import stats

    uniform, gumbel = noise_of(Mixed(), (14, 14), 30).double().unbind(dim=1)
    assert stats.kstest(gumbel.flatten().numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    assert stats.kstest(uniform.flatten().numpy(), stats.uniform.cdf).pvalue > 1e-3
    pairs = torch.stack([uniform.flatten(), gumbel.flatten()])
    assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / math.sqrt(pairs.shape[1])


# --- Images with ties ---


@pytest.mark.parametrize("level", [0, 77, 255])
@pytest.mark.parametrize("patch", [4, 7])
def test_a_constant_image_has_no_scores(level, patch):
    images = torch.full((3, 3, 7 * patch, 5 * patch), level, dtype=torch.uint8)
    averages = patch_averages(images, (patch, patch))
    for order in ORDERS:
        assert not Mixed(avg_order=order).scores(averages).any()
        strict = create_strategy("average", avg_order=order, avg_temperature=0)
        # Without scores, average masking is random masking by the Gumbel row, at any temperature.
        noise = noise_of(strict, (7, 5), 3)
        assert torch.equal(strict.mask(noise, averages, 9), keep_smallest(noise[:, 1], 9))
        noisy = create_strategy("average", avg_order=order)
        noise = noise_of(noisy, (7, 5), 3)
        assert torch.equal(noisy.mask(noise, averages, 9), keep_smallest(noise[:, 1], 9))


def two_valued(grid: tuple[int, int], patch: int, number: int = 16, seed: int = 0) -> Tensor:
    """Images whose patches are half of one average, half of another, as far from the mean."""
    rng = np.random.default_rng(seed)
    L = math.prod(grid)
    images = []
    for _ in range(number):
        side = rng.permutation(L).reshape(grid) % 2
        image = np.kron(np.where(side, *rng.integers(0, 256, 2)), np.ones((patch, patch)))
        image = np.repeat(image[None], 3, axis=0)
        # One pixel of each patch: averages that binary fractions cannot hold.
        image[0, ::patch, ::patch] = np.where(side, *rng.integers(0, 256, 2))
        images.append(image.astype(np.uint8))
    return torch.from_numpy(np.stack(images))


@pytest.mark.parametrize("order", ["far", "near"])
@pytest.mark.parametrize(("grid", "patch"), [((14, 14), 4), ((8, 8), 7), ((3, 2), 5)])
def test_ties_are_broken_alike_in_every_batch(grid, patch, order):
    images = two_valued(grid, patch)
    strategy = create_strategy("average", avg_order=order, avg_temperature=0)
    noise, visible = noise_of(strategy, grid, len(images)), math.prod(grid) // 4
    averages = patch_averages(images, (patch, patch))
    expected = strategy.mask(noise, averages, visible)
    for size in (1, 2, 3, 5, 11):
        parts = [
            strategy.mask(*chunk, visible)
            for chunk in zip(noise.split(size), averages.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), expected), size
    # The same images at other places of memory and of the batch.
    spread = torch.stack([averages, averages], dim=-1).flip(0)[..., 0]
    assert torch.equal(strategy.mask(noise.flip(0), spread, visible).flip(0), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 35, 196, 1000])
def test_the_mean_is_a_mean_in_one_order(size):
    x = torch.randn(6, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    mean = fixed_order_mean(x)
    for row, value in zip(x.tolist(), mean[:, 0].tolist(), strict=True):
        assert abs(value - math.fsum(row) / size) < 1e-14
    assert torch.equal(fixed_order_mean(x.T.contiguous().T), mean)
    assert torch.equal(torch.cat([fixed_order_mean(row[None]) for row in x]), mean)


# --- Evenness ---
# No strategy prefers a side: masked frequencies do not change when the grid is mirrored, nor, where
# it is square, when it is turned. `Grid` is a fixed lattice, with a test of its own.

SIGMAS = 5  # of the mean of n images; draws are fixed, so what passes once passes always


def mirrored(masks: np.ndarray) -> dict[str, np.ndarray]:
    """[n, gh, gw] as a mirror or a turn of the grid would show them."""
    views = {"top-bottom": masks[:, ::-1], "left-right": masks[:, :, ::-1]}
    if masks.shape[1] == masks.shape[2]:
        views["turned"] = np.rot90(masks, axes=(1, 2))
    return views


def leaning(differences: np.ndarray) -> float:
    """How many deviations the mean over n images is from 0, the worst of the columns of [n, ...].

    With fewer than some events a mean is not normal: each column gets one more of each sign.
    """
    n = len(differences)
    error = np.sqrt(((differences**2).sum(axis=0) + 2) / n - differences.mean(axis=0) ** 2)
    return float(np.max(np.abs(differences.mean(axis=0)) / error * math.sqrt(n)))


def even_images(kind: str, number: int, patches: int) -> Tensor:
    """float64 [number, patches] averages that prefer no place: all ties, many of them, none."""
    generator = torch.Generator().manual_seed(5)
    levels = {"uniform": 1, "few levels": 3, "many levels": 10**9}[kind]
    shape = (number, patches)
    return torch.randint(levels, shape, generator=generator).double() / levels * 255


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (8, 8), (12, 20), (16, 8)])
@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"grid"}))
def test_no_mask_leans_to_a_side(name, grid):
    number, L = 2000, math.prod(grid)
    strategies = [create_strategy(name)]
    kinds = ["none"]
    if strategies[0].uses_averages:
        strategies.append(create_strategy(name, avg_temperature=0))
        kinds = ["uniform", "few levels", "many levels"]
    noise = noise_of(strategies[0], grid, number)
    for strategy, kind, ratio in itertools.product(strategies, kinds, (0.25, 0.5, 0.75)):
        averages = None if kind == "none" else even_images(kind, number, L)
        mask = strategy.mask(noise, averages, count_visible(L, ratio))
        masks = mask.numpy().reshape(-1, *grid).astype(int)
        for view, other in mirrored(masks).items():
            differences = masks - other
            assert leaning(differences) < SIGMAS, (kind, ratio, view)
            half = differences[:, : grid[0] // 2] if view == "top-bottom" else differences
            half = half[..., : grid[1] // 2] if view == "left-right" else half
            assert leaning(half.sum(axis=(1, 2))) < SIGMAS, (kind, ratio, view)


def test_a_lean_would_be_noticed():
    # A test of the test: a fifth of the images keep their first row of patches visible.
    masks = masks_of("random", (14, 14), 3000, 98).astype(int)
    masks[::5, 0] = 0
    assert leaning((masks - masks[:, ::-1])[:, :7].sum(axis=(1, 2))) > SIGMAS


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (8, 8), (12, 20), (16, 8)])
def test_halves_of_the_lattice_differ_by_at_most_a_line(grid, ratio):
    (mask,) = masks_of("grid", grid, 1, count_visible(math.prod(grid), ratio)).astype(int)
    for axis in (0, 1):
        half = grid[axis] // 2
        first, last = (
            mask.take(range(*r), axis) for r in ((half,), (grid[axis] - half, grid[axis]))
        )
        assert abs(int(first.sum()) - int(last.sum())) <= grid[1 - axis]


# --- What must not matter ---


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_masks_do_not_depend_on_batch_order_precision_or_layout(name):
    images, visible = photographs(), 9
    strategy = create_strategy(name)
    noise = noise_of(strategy, (7, 5), len(images))

    def mask(images: Tensor, noise: Tensor) -> Tensor:
        return strategy.mask(noise, patch_averages(images, (8, 8)), visible)

    expected = mask(images, noise)
    for size in (1, 5, 8):
        parts = zip(images.split(size), noise.split(size), strict=True)
        assert torch.equal(torch.cat([mask(*part) for part in parts]), expected), size
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask(images[order], noise[order]), expected[order])
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(mask(images, noise), expected), dtype
    wide = torch.zeros(*images.shape[:3], 2 * images.shape[3], dtype=torch.uint8)
    wide[..., ::2] = images
    long = torch.zeros(*noise.shape, 3)
    long[..., 1] = noise
    assert torch.equal(mask(wide[..., ::2], long[..., 1]), expected)
    assert torch.equal(mask(images.contiguous(memory_format=torch.channels_last), noise), expected)


@pytest.mark.parametrize("name", ["random", "block", "grid", "average"])
def test_a_lower_ratio_masks_a_subset(name):
    images = photographs()
    strategy = create_strategy(name)
    noise, averages = noise_of(strategy, (7, 5), len(images)), patch_averages(images, (8, 8))
    masks = [strategy.mask(noise, averages, visible) for visible in range(34, 0, -1)]
    for lower, higher in itertools.pairwise(masks):
        assert not (lower & ~higher).any()


# --- Block ---


def first_rectangles(grid: tuple[int, int], number: int) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of the rectangle numbered 0 of each draw."""
    rectangles = []
    for noise in noise_of(create_strategy("block"), grid, number):
        inside = (noise[0].floor() == 0).reshape(grid)
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        top, left = int(rows[0]), int(columns[0])
        height, width = int(rows[-1]) - top + 1, int(columns[-1]) - left + 1
        assert int(inside.sum()) == height * width  # a rectangle, all of it
        rectangles.append((top, left, height, width))
    return rectangles


@pytest.mark.parametrize("grid", [(14, 14), (2, 20), (7, 5)])
def test_rectangles_are_those_of_the_numbers_drawn(grid):
    """Again in Python's own floats: an old run's masks stay what they were."""
    block = create_strategy("block")
    inside = block._rectangles(grid, torch.Generator().manual_seed(3))
    share, turn, down, right = torch.rand(
        4, block.at_once, generator=torch.Generator().manual_seed(3), dtype=torch.float32
    ).tolist()
    checked, heights = 0, set()
    for i in range(block.at_once):
        area = (0.08 + (0.4 - 0.08) * share[i]) * grid[0] * grid[1]
        aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * turn[i])
        exact = math.sqrt(area * aspect), math.sqrt(area / aspect)
        size = [min(max(round(s), 1), g) for s, g in zip(exact, grid, strict=True)]
        room = [u * (g - s + 1) for u, g, s in zip((down[i], right[i]), grid, size, strict=True)]
        # What lies on the edge between two numbers float32 may round to the other side.
        edges = [abs(s % 1 - 0.5) for s in exact] + [min(r % 1, -r % 1) for r in room]
        if min(edges) < 1e-4:
            continue
        expected = torch.zeros(grid, dtype=torch.bool)
        top, left = map(int, room)
        expected[top : top + size[0], left : left + size[1]] = True
        assert torch.equal(inside[i], expected), (size, room)
        checked, heights = checked + 1, heights | {size[0]}
    assert checked > block.at_once // 2
    assert grid != (2, 20) or heights == {1, 2}  # a rectangle is no lower than a patch


def before_rounding(side: int, size: int) -> tuple[float, float]:
    """Between which numbers a rectangle's side lay before it was rounded and held in the grid."""
    return side - 0.5 if side > 1 else 0, side + 0.5 if side < size else math.inf


@pytest.mark.parametrize("grid", [(24, 24), (14, 14), (7, 5), (12, 24)])
def test_rectangles_keep_their_bounds_of_area_and_aspect(grid):
    L, shares, aspects = math.prod(grid), [], []
    for _, _, height, width in first_rectangles(grid, 250):
        low_h, high_h = before_rounding(height, grid[0])
        low_w, high_w = before_rounding(width, grid[1])
        assert low_h * low_w <= 0.4 * L and high_h * high_w >= 0.08 * L
        assert low_h <= high_w / 0.3 and high_h >= 0.3 * low_w
        shares.append(height * width / L)
        aspects.append(height / width)
    # The whole range is used.
    assert min(shares) < 0.11 and max(shares) > 0.35
    assert min(aspects) < 0.5 and max(aspects) > 2 and 0.8 < np.median(aspects) < 1.25


def test_rectangles_fall_everywhere():
    rectangles = np.array(first_rectangles((14, 14), 500))
    corner, size = rectangles[:, :2], rectangles[:, 2:]
    for axis in (0, 1):
        assert set(corner[:, axis]) >= set(range(9))
        assert set((corner + size)[:, axis]) >= set(range(6, 15))
    # Where along the room that its size leaves: rows say nothing about columns.
    share = (corner / np.maximum(14 - size, 1))[(size < 14).all(axis=1)]
    assert abs(np.corrcoef(share.T)[0, 1]) < 4 / math.sqrt(len(share))


@pytest.mark.parametrize("grid", [(14, 14), (7, 5), (1, 8), (3, 2)])
def test_block_masks_what_is_covered_first(grid):
    strategy = create_strategy("block")
    for noise in noise_of(strategy, grid, 50):
        covered_by = -noise[0].floor().reshape(grid).numpy()  # what is left is noise in [0, 1)
        assert covered_by.min() == 0 and covered_by.max() < 1024
        for number in np.unique(covered_by):
            rows, columns = np.nonzero(covered_by == number)
            box = covered_by[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.max() == number  # what lies in it and is not its own was covered before
        for visible in range(1, math.prod(grid)):
            mask = strategy.mask(noise[None], None, visible).numpy().reshape(grid)
            assert covered_by[mask].max() <= covered_by[~mask].min()


@pytest.mark.parametrize("grid", [(14, 14), (7, 5), (1, 8), (3, 2)])
def test_block_reaches_every_patch(grid):
    L = math.prod(grid)
    assert masks_of("block", grid, 600, L - L // 3).any(axis=0).all()
    assert not masks_of("block", grid, 600, L // 3).all(axis=0).any()


def test_block_masks_are_coarser_than_random_ones():
    # Of neighbouring patches, how many pairs differ; at random it is 2 p (1 - p) = .375.
    differing = {}
    for name in ("block", "random"):
        masks = masks_of(name, (14, 14), 200, 49)
        differing[name] = np.diff(masks, axis=1).mean() / 2 + np.diff(masks, axis=2).mean() / 2
    assert abs(differing["random"] - 0.375) < 0.02
    assert differing["block"] < 0.2


# --- Grid ---


def bayer_rank(y: int, x: int) -> int:
    """Rank in the 8 x 8 Bayer matrix, by interleaving the bits of y and of x ^ y, reversed."""
    rank = 0
    for bit in range(3):
        row, both = y >> bit & 1, (x ^ y) >> bit & 1
        rank += (2 * both + row) << 2 * (2 - bit)
    return rank


def bayer_ranks(grid: tuple[int, int]) -> np.ndarray:
    ranks = [[bayer_rank(y % 8, x % 8) for x in range(grid[1])] for y in range(grid[0])]
    return np.array(ranks)


def test_the_reference_is_the_bayer_matrix():
    assert bayer_ranks((4, 4)).tolist() == [  # 16 of the published 8 x 8 ranks, in steps of 4
        [0, 32, 8, 40],
        [48, 16, 56, 24],
        [12, 44, 4, 36],
        [60, 28, 52, 20],
    ]
    assert sorted(bayer_ranks((8, 8)).flatten()) == list(range(64))


@pytest.mark.parametrize("grid", [*GRIDS, (16, 24), (9, 17)])
def test_grid_keeps_the_lowest_bayer_ranks(grid):
    ranks, L = bayer_ranks(grid), math.prod(grid)
    assert np.array_equal(
        noise_of(create_strategy("grid"), grid, 3).floor().numpy().reshape(3, *grid),
        np.broadcast_to(ranks, (3, *grid)),
    )
    for visible in {1, L // 4, L // 3, L // 2, L - 1} - {0}:
        for mask in masks_of("grid", grid, 4, visible):
            assert ranks[~mask].max() <= ranks[mask].min()


def test_grid_at_75_percent_is_the_lattice_of_mae():
    masks = masks_of("grid", (14, 14), 5, count_visible(196, 0.75))
    visible_of_each = (~masks).reshape(5, 7, 2, 7, 2).sum(axis=(2, 4))
    assert (visible_of_each == 1).all()
    assert (masks == masks[:1]).all()
    assert not masks[0, ::2, ::2].any()


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (13, 9)])
def test_grid_is_even_at_every_count(grid):
    # All windows of 2, 4 or 8 patches a side show as many, give or take one, wherever they lie.
    for visible in range(1, math.prod(grid), 7):
        (mask,) = masks_of("grid", grid, 1, visible)
        for side in (2, 4, 8):
            windows = np.lib.stride_tricks.sliding_window_view(~mask, (side, side))
            counts = windows.sum(axis=(2, 3))
            assert counts.max() - counts.min() <= 1, (visible, side)


def test_noise_chooses_among_equal_ranks_of_the_grid():
    # Of 14 x 14 patches 49 have the ranks 0 to 15, 4 have rank 16: two of them complete 51.
    number = 2000
    visible = ~masks_of("grid", (14, 14), number, 51)
    ranks = bayer_ranks((14, 14))
    assert visible[:, ranks < 16].all() and not visible[:, ranks > 16].any()
    counts = visible[:, ranks == 16].sum(axis=0)
    assert len(counts) == 4 and 1e-4 < uniformity(counts, number, 4, 2) < 1 - 1e-4


# --- No host synchronisation ---
# Tensors of the meta device have shapes but no numbers, like those that a device still computes:
# whatever needs a number on the host raises.


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_mask_never_asks_the_device_for_a_number(name, order):
    strategy = create_strategy(name, avg_order=order)
    noise = noise_of(strategy, (7, 5), 3).to("meta")
    averages = patch_averages(torch.zeros(3, 3, 28, 20, dtype=torch.uint8, device="meta"), (4, 4))
    mask = strategy.mask(noise, averages, 9)
    assert mask.device.type == "meta" and mask.shape == (3, 35)


@pytest.mark.parametrize(
    "read",
    [Tensor.item, Tensor.tolist, bool, Tensor.nonzero, Tensor.cpu, lambda x: x[x > 0]],
    ids=["item", "tolist", "bool", "nonzero", "cpu", "index"],
)
def test_a_number_asked_for_would_be_noticed(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(1, device="meta"))


# --- Settings ---


def test_an_unknown_strategy_lists_the_valid_ones():
    with pytest.raises(BadInput, match="unknown mask 'blocks'") as error:
        create_strategy("blocks")
    assert all(repr(name) in str(error.value) for name in STRATEGIES)


@pytest.mark.parametrize("name", USES_AVERAGES)
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("avg_order", "bright", "unknown avg_order 'bright', choose from .*far.*near.*high.*low"),
        ("avg_temperature", -1, "from 0 up, not -1"),
        ("avg_temperature", float("nan"), "from 0 up, not nan"),
        ("avg_temperature", float("inf"), "from 0 up, not inf"),
    ],
)
def test_bad_settings_of_average_masking(name, setting, value, message):
    with pytest.raises(BadInput, match=message):
        create_strategy(name, **{setting: value})


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_bad_shares(share):
    with pytest.raises(BadInput, match=rf"avg_share must lie in \[0, 1\], not {share}"):
        create_strategy("mixed", avg_share=share)
