"""Cutting into patches and back, and the numbers taken of patches, against loops and numpy."""

import numpy as np
import pytest
import torch

from util.mask.patches import patch_averages, patch_statistics, patchify, unpatchify

# (grid, patch size, channels)
LAYOUTS = [
    ((7, 5), (4, 4), 3),
    ((3, 2), (2, 5), 1),
    ((1, 8), (3, 1), 4),
    ((14, 14), (2, 2), 3),
]


def uint8_images(number: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Every pixel drawn on its own: any pixel in the wrong place is noticed."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (number, channels, height, width), np.uint8))


def patches_by_loops(images: np.ndarray, patch_size: tuple[int, int]) -> np.ndarray:
    """[B, L, ph*pw*C], one number at a time."""
    B, C, H, W = images.shape
    ph, pw = patch_size
    gh, gw = H // ph, W // pw
    patches = np.empty((B, gh * gw, ph * pw * C), images.dtype)
    for row in range(gh):
        for column in range(gw):
            place = 0
            for y in range(ph):
                for x in range(pw):
                    for c in range(C):
                        pixel = images[:, c, row * ph + y, column * pw + x]
                        patches[:, row * gw + column, place] = pixel
                        place += 1
    return patches


@pytest.mark.parametrize(("grid", "patch_size", "channels"), LAYOUTS)
def test_patchify_equals_loops_and_unpatchify_inverts_it(grid, patch_size, channels):
    images = uint8_images(2, channels, grid[0] * patch_size[0], grid[1] * patch_size[1])
    patches = patchify(images, patch_size)
    assert patches.dtype == torch.uint8
    assert np.array_equal(patches.numpy(), patches_by_loops(images.numpy(), patch_size))
    assert torch.equal(unpatchify(patches, patch_size, grid), images)


def test_patchify_equals_the_official_einsum():
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    official = images.reshape(2, 3, 3, 4, 3, 4)
    official = torch.einsum("nchpwq->nhwpqc", official).reshape(2, 9, 4 * 4 * 3)
    assert torch.equal(patchify(images, (4, 4)), official)


def test_patchify_does_not_depend_on_the_memory_layout():
    wide = uint8_images(2, 3, 8, 24)
    strided = wide[..., ::2]
    expected = patchify(strided.contiguous(), (4, 4))
    assert torch.equal(patchify(strided, (4, 4)), expected)
    last = strided.contiguous(memory_format=torch.channels_last)
    assert torch.equal(patchify(last, (4, 4)), expected)


def test_patchify_refuses_sizes_that_are_not_a_multiple():
    with pytest.raises(ValueError, match=r"12x10.*4x4"):
        patchify(torch.zeros(1, 3, 12, 10), (4, 4))
    with pytest.raises(ValueError, match=r"10x12.*4x4"):
        patchify(torch.zeros(1, 3, 10, 12), (4, 4))


@pytest.mark.parametrize(("shape", "grid"), [((1, 6, 12), (2, 2)), ((1, 6, 13), (3, 2))])
def test_unpatchify_refuses_patches_that_do_not_fit(shape, grid):
    with pytest.raises(ValueError, match="do not fit"):
        unpatchify(torch.zeros(shape), (2, 2), grid)


@pytest.mark.parametrize(("grid", "patch_size", "channels"), LAYOUTS)
def test_statistics_equal_numpy(grid, patch_size, channels):
    images = uint8_images(2, channels, grid[0] * patch_size[0], grid[1] * patch_size[1])
    patches = patches_by_loops(images.numpy(), patch_size) / 255 - 0.4
    mean, std = patch_statistics(torch.from_numpy(patches))
    assert mean.shape == std.shape == (2, grid[0] * grid[1], 1)
    expected = np.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(mean, patches.mean(axis=-1, keepdims=True), atol=1e-14)
    np.testing.assert_allclose(std, expected, rtol=1e-13)


def test_statistics_of_a_constant_patch_stay_finite():
    mean, std = patch_statistics(torch.full((5, 7, 12), 0.3, dtype=torch.float64))
    torch.testing.assert_close(mean, torch.full_like(mean, 0.3))
    torch.testing.assert_close(std, torch.full_like(std, 1e-3))


# --- Averages of uint8 patches ---


def integer_sums(images: torch.Tensor, patch_size: tuple[int, int]) -> np.ndarray:
    """int64 [B, L], sums over the pixels and channels of each patch."""
    ph, pw = patch_size
    array = images.numpy().astype(np.int64)
    rows, columns = range(0, array.shape[2], ph), range(0, array.shape[3], pw)
    sums = [array[:, :, y : y + ph, x : x + pw].sum(axis=(1, 2, 3)) for y in rows for x in columns]
    return np.stack(sums, axis=1)


# 148 is the largest square RGB patch whose sum is exact in float32; 149 is summed in float64.
@pytest.mark.parametrize(
    "patch", [(1, 1), (4, 4), (7, 3), (16, 16), (148, 148), (149, 149), (160, 160)]
)
def test_averages_equal_exact_integer_sums(patch):
    images = uint8_images(2, 3, 2 * patch[0], 3 * patch[1])
    images[1, :, : patch[0], : patch[1]] = 255
    images[1, 0, 0, 0] = 254  # an odd sum: from 2^24 on, float32 could not hold it
    averages = patch_averages(images, patch)
    assert averages.dtype == torch.float64 and averages.shape == (2, 6)
    assert np.array_equal(averages.numpy(), integer_sums(images, patch) / (3 * patch[0] * patch[1]))


@pytest.mark.parametrize("level", [0, 1, 127, 255])
@pytest.mark.parametrize("patch", [7, 16, 160])
def test_averages_of_a_constant_image_are_its_level(level, patch):
    images = torch.full((1, 3, patch, 2 * patch), level, dtype=torch.uint8)
    assert patch_averages(images, (patch, patch)).tolist() == [[level, level]]


def test_averages_do_not_depend_on_batch_layout_or_autocast():
    wide = uint8_images(6, 3, 28, 40)
    images = wide[..., ::2]
    expected = patch_averages(images.contiguous(), (4, 4))
    assert torch.equal(patch_averages(images, (4, 4)), expected)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(patch_averages(last, (4, 4)), expected)
    one_by_one = [patch_averages(image[None], (4, 4)) for image in images]
    assert torch.equal(torch.cat(one_by_one), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(patch_averages(images, (4, 4)), expected)


def test_averages_are_refused_on_floats():
    with pytest.raises(ValueError, match=r"uint8.*float32"):
        patch_averages(torch.zeros(1, 3, 8, 8), (4, 4))
