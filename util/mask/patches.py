"""Images to patches and back, and what MAE computes on patches."""

import math

import torch
from torch import Tensor

from util.float64 import to_float64
from util.spec import Shape


def patchify(x: Tensor, patch_size: Shape) -> Tensor:
    """Cut images, or clips, into patches, raster order, as MAE lays them out.

    Args:
        x: [B, C, *size], each length a multiple of the patch's.
        patch_size: lengths of a patch, (ph, pw) pixels of images.

    Returns:
        [B, L, V], V the patch's lengths times C; within a patch raster order, then channel.
    """
    size = tuple(x.shape[2:])
    if len(size) != len(patch_size) or any(n % p for n, p in zip(size, patch_size, strict=True)):
        raise ValueError(f"{_by(size)} is not a multiple of the patch size {_by(patch_size)}")
    split = [
        n for side, patch in zip(size, patch_size, strict=True) for n in (side // patch, patch)
    ]
    x = x.reshape(*x.shape[:2], *split)
    places, inside = range(2, x.ndim, 2), range(3, x.ndim, 2)
    x = x.permute(0, *places, *inside, 1)  # [B, *grid, *patch, C]
    return x.reshape(x.shape[0], math.prod(split[::2]), -1)


def unpatchify(patches: Tensor, patch_size: Shape, grid: Shape) -> Tensor:
    """The inverse of `patchify`: [B, L, V] to [B, C, *size]."""
    B, L, width = patches.shape
    if math.prod(grid) != L or width % math.prod(patch_size) or len(grid) != len(patch_size):
        raise ValueError(
            f"patches {tuple(patches.shape)} do not fit grid {grid}, patch {patch_size}"
        )
    x = patches.reshape(B, *grid, *patch_size, -1)
    axes = len(grid)
    pairs = [axis for i in range(axes) for axis in (1 + i, 1 + axes + i)]
    x = x.permute(0, x.ndim - 1, *pairs)  # [B, C, gh, ph, gw, pw]
    return x.reshape(B, x.shape[1], *(g * p for g, p in zip(grid, patch_size, strict=True)))


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch over its pixels and channels (MAE, section 3).

    Args:
        patches: [..., values].

    Returns:
        mean [..., 1] and std [..., 1]; the variance is unbiased, with 1e-6 added under the root.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    var = patches.var(dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def patch_averages(images: Tensor, patch_size: Shape) -> Tensor:
    """Mean of all pixels and channels of each patch of uint8 images, exact on every device.

    The sum of integers below 2^24 is exact in float32 in any order, so the result depends neither
    on the device nor on the batch. Larger patches are summed in float64, exact up to 2^53.

    Args:
        images: uint8 [B, C, *size].

    Returns:
        float64 [B, L], gray levels 0 to 255; on the CPU if the device has no float64.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"patch averages are defined on uint8 images, not {images.dtype}")
    values = images.shape[1] * math.prod(patch_size)
    exact = images.float() if values * 255 < 2**24 else to_float64(images)
    return to_float64(patchify(exact, patch_size).sum(dim=-1)) / values


def masked_patches(images: Tensor, mask: Tensor, patch_size: Shape) -> Tensor:
    """The hidden patches of images, in raster order, as a model's `pred` has them.

    Args:
        images: [B, C, *size].
        mask: bool [B, L], True = masked, as many in every row.
        patch_size: lengths of a patch.

    Returns:
        [B, M, V] of the images' dtype.

    Raises:
        ValueError: the mask does not fit the images, or its rows hide different numbers of patches.
    """
    return pick_masked(patchify(images, patch_size), mask)


def apply_statistics(normalised: Tensor, true_patches: Tensor) -> Tensor:
    """Give patches of normalised pixels the mean and deviation of the true hidden patches.

    A model of normalised pixels (MAE, section 3, `norm_pix_loss`) does not predict these two
    numbers. A picture of what it predicts borrows them from the truth, and has to say so.

    Args:
        normalised: [B, M, V], such a model's `pred`.
        true_patches: [B, M, V], the same patches of the image, in the space in which the
            model's targets were normalised, its input.

    Returns:
        [B, M, V] in the space of `true_patches`.
    """
    mean, std = patch_statistics(true_patches)
    return normalised * std + mean


def put_masked(x: Tensor, mask: Tensor, patches_masked: Tensor, patch_size: Shape) -> Tensor:
    """Images with their masked patches replaced.

    Args:
        x: [B, C, *size].
        mask: bool [B, L], True = masked.
        patches_masked: [B, M, V], masked patches in raster order.
        patch_size: lengths of a patch.

    Returns:
        floating point [B, C, *size], new.

    Raises:
        ValueError: mask or patches do not fit the images.
    """
    if not patches_masked.is_floating_point():
        raise ValueError(f"patches are expected in floating point, not {patches_masked.dtype}")
    dtype = torch.promote_types(x.dtype, patches_masked.dtype)
    patches = patchify(x.to(dtype), patch_size)
    expected = (len(patches), count_masked(patches, mask, need_visible=False), patches.shape[-1])
    if tuple(patches_masked.shape) != expected:
        raise ValueError(f"patches of shape {tuple(patches_masked.shape)}, expected {expected}")
    values = patches_masked.to(dtype).reshape(-1)
    patches = patches.masked_scatter(mask.unsqueeze(-1), values)  # a copy: images stay as they are
    grid = tuple(side // patch for side, patch in zip(x.shape[2:], patch_size, strict=True))
    return unpatchify(patches, patch_size, grid)


def count_masked(patches: Tensor, mask: Tensor, need_visible: bool = True) -> int:
    """How many patches each row hides; an error if the rows differ or the mask does not fit."""
    if mask.dtype != torch.bool or mask.shape != patches.shape[:2]:
        given = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask is {given}, expected torch.bool {tuple(patches.shape[:2])}")
    counts = mask.sum(dim=1).unique().tolist()
    if len(counts) != 1:
        raise ValueError(f"every image must hide as many patches as the others, not {counts}")
    if need_visible and counts[0] == mask.shape[1]:
        raise ValueError("a fill needs a visible patch; this mask hides them all")
    return counts[0]


def pick_masked(patches: Tensor, mask: Tensor) -> Tensor:
    """The masked ones of [B, L, values], in raster order, as [B, M, values]."""
    hidden = count_masked(patches, mask, need_visible=False)
    return patches[mask].reshape(len(patches), hidden, patches.shape[-1])
