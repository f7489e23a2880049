"""Fills, compositions and the meter, against loops in numpy and against scikit-image."""

import math
from itertools import pairwise

import numpy as np
import pytest
import skimage.metrics
import torch
from torch import Tensor

from util import errors
from util.errors import BadInput
from util.mask.patches import apply_statistics, masked_patches, patchify
from util.measure import metrics

SHAPES = [  # B, C, (gh, gw), (ph, pw)
    (3, 3, (4, 4), (8, 8)),
    (2, 1, (7, 5), (4, 6)),
    (2, 5, (3, 6), (5, 4)),
]


def some_images(B: int, C: int, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Smooth gray levels with noise: patches differ, and their pixels resemble each other."""
    generator = torch.Generator().manual_seed(B * 100 + C)
    coarse = torch.rand(B, C, *grid, generator=generator)
    coarse = coarse.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
    noise = torch.rand(coarse.shape, generator=generator)
    return (200 * coarse + 55 * noise).round().to(torch.uint8)


def some_mask(B: int, L: int, hidden: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(B, L, generator=generator).argsort(dim=1)
    return torch.zeros(B, L, dtype=torch.bool).scatter_(1, order[:, :hidden], True)


def cut(image: np.ndarray, number: int, gw: int, patch: tuple[int, int]) -> np.ndarray:
    """Patch `number` of an image [C, H, W], as [C, ph, pw]."""
    y, x = number // gw * patch[0], number % gw * patch[1]
    return image[:, y : y + patch[0], x : x + patch[1]]


def flat(patch: np.ndarray) -> np.ndarray:
    """[C, ph, pw] as MAE lays a patch out: row, column, channel."""
    return patch.transpose(1, 2, 0).reshape(-1)


def windowed_ssim(a: np.ndarray, b: np.ndarray, radius: int) -> np.ndarray:
    """SSIM of two planes, formula (13) of Wang et al. 2004, window by window, borders mirrored."""
    sigma = 1.5 * radius / 5
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    a, b = (np.pad(x.astype(np.float64), radius, mode="symmetric") for x in (a, b))
    out = np.empty((a.shape[0] - 2 * radius, a.shape[1] - 2 * radius))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    for y, x in np.ndindex(*out.shape):
        u = a[y : y + 2 * radius + 1, x : x + 2 * radius + 1]
        v = b[y : y + 2 * radius + 1, x : x + 2 * radius + 1]
        mu, mv = (kernel * u).sum(), (kernel * v).sum()
        var_u, var_v = (kernel * (u - mu) ** 2).sum(), (kernel * (v - mv) ** 2).sum()
        cov = (kernel * (u - mu) * (v - mv)).sum()
        luminance = (2 * mu * mv + c1) / (mu**2 + mv**2 + c1)
        out[y, x] = luminance * (2 * cov + c2) / (var_u + var_v + c2)
    return out


@pytest.mark.parametrize(("B", "C", "grid", "patch"), SHAPES)
@pytest.mark.parametrize("share", [0.1, 0.75, 0.95])
def test_fills_equal_brute_force(B, C, grid, patch, share):
    L, gw = grid[0] * grid[1], grid[1]
    hidden = min(max(round(share * L), 1), L - 1)
    images, mask = some_images(B, C, grid, patch), some_mask(B, L, hidden)
    mean = metrics.fill_mean(images, mask, patch).numpy()
    nearest = metrics.fill_nearest(images, mask, patch).numpy()
    assert mean.shape == nearest.shape == (B, hidden, patch[0] * patch[1] * C)
    for b in range(B):
        image = images[b].numpy().astype(np.float64)
        seen = [j for j in range(L) if not mask[b, j]]
        pixels = [cut(image, j, gw, patch).reshape(C, -1) for j in seen]
        colour = np.concatenate(pixels, axis=1).mean(axis=1)
        row = 0
        for i in range(L):
            if not mask[b, i]:
                continue
            distances = [math.dist(divmod(i, gw), divmod(j, gw)) for j in seen]
            closest = seen[distances.index(min(distances))]
            np.testing.assert_allclose(mean[b, row].reshape(-1, C) - colour, 0, atol=1e-11)
            np.testing.assert_array_equal(nearest[b, row], flat(cut(image, closest, gw, patch)))
            row += 1
        assert row == hidden


def test_nearest_breaks_ties_by_the_lowest_index():
    images = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
    mask = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0, 1]], dtype=torch.bool)
    filled = metrics.fill_nearest(images, mask, (1, 1))
    assert filled.flatten().tolist() == [1, 1, 1, 3, 5]


def test_masked_patches_are_in_the_order_of_pred():
    images, mask = some_images(2, 3, (4, 4), (8, 8)), some_mask(2, 16, 12)
    got = masked_patches(images, mask, (8, 8))
    rows = [patchify(images, (8, 8))[b, i] for b in range(2) for i in range(16) if mask[b, i]]
    assert torch.equal(got, torch.stack(rows).reshape(2, 12, -1))


@pytest.mark.parametrize(("B", "C", "grid", "patch"), SHAPES)
@pytest.mark.parametrize("name", list(metrics.FILLS))
def test_normalised_fill_equals_brute_force(name, B, C, grid, patch):
    L, gw = grid[0] * grid[1], grid[1]
    images, mask = some_images(B, C, grid, patch).double(), some_mask(B, L, L // 2)
    got = metrics.fill(name, images, mask, patch, norm_pix_loss=True).numpy()
    for b in range(B):
        image = images[b].numpy()
        target, mean, std = {}, {}, {}
        for i in range(L):
            values = cut(image, i, gw, patch)
            mean[i], std[i] = values.mean(), np.sqrt(values.var(ddof=1) + 1e-6)
            target[i] = (values - mean[i]) / std[i]
        seen = [j for j in range(L) if not mask[b, j]]
        tint = np.stack([target[j] for j in seen]).mean(axis=(0, 2, 3))
        row = 0
        for i in range(L):
            if not mask[b, i]:
                continue
            distances = [math.dist(divmod(i, gw), divmod(j, gw)) for j in seen]
            copied = target[seen[distances.index(min(distances))]]
            constant = np.broadcast_to(tint[:, None, None], copied.shape)
            expected = flat(copied if name == "nearest" else constant) * std[i] + mean[i]
            np.testing.assert_allclose(got[b, row], expected, atol=1e-8)
            row += 1


def test_true_statistics_are_given():
    images, mask = some_images(2, 3, (4, 4), (8, 8)).double(), some_mask(2, 16, 12)
    true = masked_patches(images, mask, (8, 8))
    given = metrics.fill("nearest", images, mask, (8, 8), norm_pix_loss=True)
    torch.testing.assert_close(given.mean(-1), true.mean(-1), rtol=0, atol=1e-9)
    torch.testing.assert_close(given.std(-1), true.std(-1), rtol=0, atol=1e-6)
    # A prediction of nothing is the true mean; the true target is the truth.
    nothing = apply_statistics(torch.zeros_like(true), true)
    torch.testing.assert_close(nothing, true.mean(-1, keepdim=True).expand_as(true))
    target = (true - true.mean(-1, keepdim=True)) / (true.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(apply_statistics(target, true), true)


def test_a_flat_visible_patch_gives_the_true_mean():
    images = some_images(1, 1, (2, 2), (4, 4)).double()
    images[:, :, :, :4] = 77.0
    mask = torch.tensor([[False, True, False, True]])
    true = masked_patches(images, mask, (4, 4))
    for name in metrics.FILLS:
        given = metrics.fill(name, images, mask, (4, 4), norm_pix_loss=True)
        torch.testing.assert_close(given, true.mean(-1, keepdim=True).expand_as(true))


def test_plain_fill_ignores_the_truth_and_unknown_names_are_refused():
    images, mask = some_images(2, 3, (4, 4), (8, 8)), some_mask(2, 16, 12)
    changed = metrics.compose(images, mask, torch.zeros(2, 12, 192), (8, 8)).to(torch.uint8)
    for name, function in metrics.FILLS.items():
        got = metrics.fill(name, images, mask, (8, 8))
        assert torch.equal(got, function(images, mask, (8, 8)))
        assert torch.equal(got, metrics.fill(name, changed, mask, (8, 8)))
    with pytest.raises(BadInput, match=r"'median'.*mean, nearest"):
        metrics.fill("median", images, mask, (8, 8))


@pytest.mark.parametrize(("B", "C", "grid", "patch"), SHAPES)
def test_compose_pixel_by_pixel(B, C, grid, patch):
    L, gw = grid[0] * grid[1], grid[1]
    images, mask = some_images(B, C, grid, patch), some_mask(B, L, L // 2)
    torch.manual_seed(0)
    patches = 400 * torch.rand(B, L // 2, patch[0] * patch[1] * C) - 70
    before = images.clone()
    got = metrics.compose(images, mask, patches, patch).numpy()
    assert torch.equal(images, before)
    for b in range(B):
        row = 0
        for i in range(L):
            expected = flat(cut(images[b].numpy(), i, gw, patch)).astype(np.float32)
            if mask[b, i]:
                expected = np.clip(patches[b, row].numpy(), 0, 255)
                row += 1
            np.testing.assert_array_equal(flat(cut(got[b], i, gw, patch)), expected)


def test_compose_of_one_patch_leaves_its_images_alone():
    images = torch.full((1, 1, 4, 4), 9.0)
    metrics.compose(images, torch.tensor([[True]]), torch.zeros(1, 1, 16), (4, 4))
    assert images.eq(9).all()


def test_masks_that_do_not_fit_are_refused():
    images = some_images(2, 3, (4, 4), (8, 8))
    uneven = torch.zeros(2, 16, dtype=torch.bool)
    uneven[0, 0] = True
    with pytest.raises(ValueError, match="as many patches as the others"):
        metrics.fill_mean(images, uneven, (8, 8))
    with pytest.raises(ValueError, match="hides them all"):
        metrics.fill_nearest(images, torch.ones(2, 16, dtype=torch.bool), (8, 8))
    with pytest.raises(ValueError, match=r"expected torch.bool \(2, 16\)"):
        masked_patches(images, torch.zeros(2, 12, dtype=torch.bool), (8, 8))
    mask = some_mask(2, 16, 12)
    with pytest.raises(ValueError, match=r"expected \(2, 12, 192\)"):
        metrics.compose(images, mask, torch.zeros(2, 11, 192), (8, 8))
    with pytest.raises(ValueError, match="floating point"):
        metrics.compose(images, mask, torch.zeros(2, 12, 192, dtype=torch.uint8), (8, 8))


@pytest.mark.parametrize(("size", "radius"), [((13, 16), 5), ((12, 8), 3), ((3, 9), 1)])
def test_ssim_equals_its_formula(size, radius):
    torch.manual_seed(0)
    images = some_images(2, 2, size, (1, 1))
    other = (0.7 * images.double() + 20 * torch.rand(images.shape)).clamp(0, 255)
    got = metrics.ssim_map(images, other).numpy()
    for b, c in np.ndindex(2, 2):
        expected = windowed_ssim(images[b, c].numpy(), other[b, c].numpy(), radius)
        np.testing.assert_allclose(got[b, c], expected, atol=1e-10)


def test_ssim_needs_a_window():
    with pytest.raises(BadInput, match="3 x 3 pixels, not 2 x 40"):
        metrics.ssim_map(torch.zeros(1, 1, 2, 40), torch.zeros(1, 1, 2, 40))


def test_whole_images_equal_scikit_image():
    torch.manual_seed(0)
    images = some_images(3, 3, (5, 6), (5, 5))
    other = (images + 25 * torch.randn(images.shape)).clamp(0, 255).double()
    pair = images.double().numpy(), other.numpy()
    meter = metrics.ReconstructionMeter(["all", "inner"])
    meter.update("all", images, other, torch.ones(3, 30, dtype=torch.bool), (5, 5))
    # scikit-image's own mean leaves out the 5 pixels at each border: here, the outer patches.
    inner = torch.zeros(3, 5, 6, dtype=torch.bool)
    inner[:, 1:-1, 1:-1] = True
    meter.update("inner", images, other, inner.flatten(1), (5, 5))
    result = meter.result()
    psnr = skimage.metrics.peak_signal_noise_ratio(*pair, data_range=255)
    assert result["all"]["psnr"] == pytest.approx(psnr, abs=1e-10)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    settings |= {"data_range": 255, "channel_axis": 0}
    ssim = [
        skimage.metrics.structural_similarity(a, b, **settings) for a, b in zip(*pair, strict=True)
    ]
    assert result["inner"]["ssim"] == pytest.approx(np.mean(ssim), abs=1e-12)


def test_only_masked_pixels_count_and_sets_are_pooled():
    images = some_images(4, 3, (4, 4), (8, 8))
    mask = some_mask(4, 16, 12)
    fills = metrics.fill_nearest(images, mask, (8, 8))
    composite = metrics.compose(images, mask, fills, (8, 8))
    meter = metrics.ReconstructionMeter(["nearest"])
    meter.update("nearest", images, composite, mask, (8, 8))
    errors_squared, ssim = [], []
    maps = metrics.ssim_map(images, composite).numpy()
    for b in range(4):
        for i in range(16):
            if mask[b, i]:
                truth = cut(images[b].numpy().astype(np.float64), i, 4, (8, 8))
                errors_squared.append((truth - cut(composite[b].numpy(), i, 4, (8, 8))) ** 2)
                ssim.append(cut(maps[b], i, 4, (8, 8)))
    expected = 10 * math.log10(255**2 / np.mean(errors_squared))
    assert meter.result()["nearest"]["psnr"] == pytest.approx(expected, abs=1e-10)
    assert meter.result()["nearest"]["ssim"] == pytest.approx(np.mean(ssim), abs=1e-12)
    assert meter.state()[0, 2] == 4 * 12 * 192


def test_meter_does_not_depend_on_batches_or_ranks():
    images = some_images(7, 3, (4, 4), (8, 8))
    mask = some_mask(7, 16, 12)
    arms = list(metrics.FILLS)

    def measured(*bounds: int) -> metrics.ReconstructionMeter:
        meter = metrics.ReconstructionMeter(arms)
        for start, stop in pairwise(bounds):
            some, hidden = images[start:stop], mask[start:stop]
            for arm in arms:
                patches = metrics.fill(arm, some, hidden, (8, 8))
                composite = metrics.compose(some, hidden, patches, (8, 8))
                meter.update(arm, some, composite, hidden, (8, 8))
        return meter

    whole = measured(0, 7).result()
    ranks = metrics.ReconstructionMeter(arms)
    for part in (measured(0, 3), measured(3, 4, 7), metrics.ReconstructionMeter(arms)):
        ranks.merge(part.state())
    for result in (measured(0, 1, 2, 3, 4, 5, 6, 7).result(), ranks.result()):
        for arm in arms:
            assert result[arm] == pytest.approx(whole[arm], rel=1e-12)
    assert whole["mean"] != whole["nearest"]
    ranks.state().zero_()  # an all-reduce in place must not reach the meter
    assert ranks.result()["mean"] == pytest.approx(whole["mean"], rel=1e-12)
    with pytest.raises(ValueError, match="other arms"):
        ranks.merge(torch.zeros(3, 3, dtype=torch.float64))


def test_meter_says_what_it_lacks():
    meter = metrics.ReconstructionMeter(["model", "mean"])
    images, mask = some_images(1, 3, (4, 4), (8, 8)), some_mask(1, 16, 12)
    meter.update("model", images, images, mask, (8, 8))
    with pytest.raises(ValueError, match="'mean' has seen no masked pixel"):
        meter.result()
    with pytest.raises(ValueError, match=r"no arm 'mode'.*model, mean"):
        meter.update("mode", images, images, mask, (8, 8))
    with pytest.raises(ValueError, match="differ in shape"):
        meter.update("mean", images, images[:, :1], mask, (8, 8))
    meter.update("mean", images, images, mask, (8, 8))
    assert meter.result()["mean"] == {"psnr": math.inf, "ssim": pytest.approx(1.0)}


def test_a_missing_scikit_image_is_said_at_once(monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(errors.importlib, "import_module", absent)
    with pytest.raises(BadInput, match="pip install scikit-image"):
        metrics.ReconstructionMeter(["model"])
