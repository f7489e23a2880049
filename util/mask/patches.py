"""Images to patches and back, and what MAE computes on patches."""

import torch
from torch import Tensor

from util.float64 import to_float64
from util.spec import Pair


def patchify(images: Tensor, patch_size: Pair) -> Tensor:
    """Cut images into patches, raster order, as MAE lays them out.

    Args:
        images: [B, C, H, W], H and W multiples of the patch size.
        patch_size: (ph, pw) pixels.

    Returns:
        [B, L, ph*pw*C]; within a patch row, then column, then channel.
    """
    B, C, H, W = images.shape
    ph, pw = patch_size
    if H % ph or W % pw:
        raise ValueError(f"image {H}x{W} is not a multiple of the patch size {ph}x{pw}")
    x = images.reshape(B, C, H // ph, ph, W // pw, pw)
    x = x.permute(0, 2, 4, 3, 5, 1)  # [B, gh, gw, ph, pw, C]
    return x.reshape(B, (H // ph) * (W // pw), ph * pw * C)


def unpatchify(patches: Tensor, patch_size: Pair, grid: Pair) -> Tensor:
    """The inverse of `patchify`: [B, L, ph*pw*C] to [B, C, H, W]."""
    B, L, width = patches.shape
    (ph, pw), (gh, gw) = patch_size, grid
    if gh * gw != L or width % (ph * pw):
        raise ValueError(
            f"patches {tuple(patches.shape)} do not fit grid {grid}, patch {patch_size}"
        )
    x = patches.reshape(B, gh, gw, ph, pw, width // (ph * pw))
    x = x.permute(0, 5, 1, 3, 2, 4)  # [B, C, gh, ph, gw, pw]
    return x.reshape(B, -1, gh * ph, gw * pw)


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


def patch_averages(images: Tensor, patch_size: Pair) -> Tensor:
    """Mean of all pixels and channels of each patch of uint8 images, exact on every device.

    The sum of integers below 2^24 is exact in float32 in any order, so the result depends neither
    on the device nor on the batch. Larger patches are summed in float64, exact up to 2^53.

    Args:
        images: uint8 [B, C, H, W].

    Returns:
        float64 [B, L], gray levels 0 to 255; on the CPU if the device has no float64.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"patch averages are defined on uint8 images, not {images.dtype}")
    values = images.shape[1] * patch_size[0] * patch_size[1]
    exact = images.float() if values * 255 < 2**24 else to_float64(images)
    return to_float64(patchify(exact, patch_size).sum(dim=-1)) / values
