"""How good a reconstruction is, over the masked pixels alone, beside fills that learn nothing."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from util.errors import BadInput, needs
from util.mask.patches import (
    apply_statistics,
    count_masked,
    patch_statistics,
    patchify,
    pick_masked,
    put_masked,
    unpatchify,
)
from util.spec import Shape

WHITE = 255.0
SSIM_WINDOW = 11
SIGMA_PER_RADIUS = 0.3  # 1.5 at the radius 5 of an 11 x 11 window


def fill_mean(images: Tensor, mask: Tensor, patch_size: Shape) -> Tensor:
    """Every hidden patch in one colour, the per-channel mean of all visible pixels of its image.

    "The mean of the visible patches" could also be one patch averaged position by position. That
    one has a pattern left over from a few patches; the colour is the stronger rival.

    Args:
        images: [B, C, *size], any unit and dtype.
        mask: bool [B, L], True = masked.
        patch_size: lengths of a patch, (ph, pw) pixels of images.

    Returns:
        float64 [B, M, V] in the unit of the images, masked patches in raster order.

    Raises:
        ValueError: the mask does not fit the images, or leaves nothing visible.
    """
    patches = patchify(images.double(), patch_size)
    hidden = count_masked(patches, mask)
    visible = patches.masked_fill(mask.unsqueeze(-1), 0.0).sum(dim=1)  # [B, V]
    pixels = math.prod(patch_size)
    sums = visible.unflatten(-1, (pixels, images.shape[1])).sum(dim=1)  # [B, C]
    colour = sums / ((mask.shape[1] - hidden) * pixels)
    return colour.repeat(1, pixels).unsqueeze(1).repeat(1, hidden, 1)


def fill_nearest(images: Tensor, mask: Tensor, patch_size: Shape) -> Tensor:
    """Every hidden patch copies the nearest visible one of its image.

    Nearest by Euclidean distance on the patch grid; of equally near ones the first in raster order.
    Arguments, result and errors as `fill_mean`.
    """
    patches = patchify(images.double(), patch_size)
    count_masked(patches, mask)
    index = torch.arange(mask.shape[1], device=mask.device)
    places = index.reshape(patch_grid(images, patch_size))
    squared = torch.zeros(len(index), len(index), dtype=torch.int64, device=mask.device)
    for axis, side in enumerate(places.shape):
        i = index // math.prod(places.shape[axis + 1 :]) % side
        squared += (i[:, None] - i).square()  # [L, L]
    # The index as the last digit makes every key unique, so that ties break alike on every device.
    key = (squared * len(index) + index).expand(len(mask), -1, -1)
    key = key.masked_fill(mask.unsqueeze(1), torch.iinfo(torch.int64).max)
    source = key.min(dim=-1).values % len(index)  # [B, L]
    return pick_masked(patches.gather(1, source.unsqueeze(-1).expand_as(patches)), mask)


FILLS: dict[str, Callable[[Tensor, Tensor, Shape], Tensor]] = {
    "mean": fill_mean,
    "nearest": fill_nearest,
}


def fill(
    name: str, images: Tensor, mask: Tensor, patch_size: Shape, norm_pix_loss: bool = False
) -> Tensor:
    """A trivial fill, on the terms on which the model beside it is shown.

    Beside a model of normalised pixels the fill is computed from the visible patches' own targets
    (each normalised by its own statistics) and then given the same true mean and deviation by the
    same function, `apply_statistics`. Filling first and normalising the result would be the same
    for `nearest`, but would blow the faint tint of the mean colour up to full contrast: a rival
    1.6 to 1.8 dB weaker (six photographs, 96 pixels, patches of 8 and 16, 75 % random).

    Args:
        name: one of `FILLS`.
        images: [B, C, *size]; with norm_pix_loss in the space of the model's input, because the
            statistics over channels depend on the space. Otherwise any affine space does.
        mask: bool [B, L], True = masked.
        patch_size: lengths of a patch, (ph, pw) pixels of images.
        norm_pix_loss: whether the model beside it predicts normalised pixels.

    Returns:
        float64 [B, M, V] in the space of the images.

    Raises:
        BadInput: no such fill.
        ValueError: the mask does not fit the images, or leaves nothing visible.
    """
    if name not in FILLS:
        raise BadInput(f"no fill is called {name!r}; choose from {', '.join(FILLS)}")
    if not norm_pix_loss:
        return FILLS[name](images, mask, patch_size)
    patches = patchify(images.double(), patch_size)
    mean, std = patch_statistics(patches)
    targets = unpatchify((patches - mean) / std, patch_size, patch_grid(images, patch_size))
    return apply_statistics(FILLS[name](targets, mask, patch_size), pick_masked(patches, mask))


def compose(images: Tensor, mask: Tensor, patches_masked: Tensor, patch_size: Shape) -> Tensor:
    """Visible pixels from the images, hidden ones from the patches, clipped to 0..255.

    Args:
        images: [B, C, *size], gray levels 0..255.
        mask: bool [B, L], True = masked.
        patches_masked: [B, M, V], gray levels, masked patches in raster order.
        patch_size: lengths of a patch.

    Returns:
        floating point [B, C, *size], not rounded to whole gray levels.

    Raises:
        ValueError: mask or patches do not fit the images.
    """
    return put_masked(images, mask, patches_masked, patch_size).clamp(0.0, WHITE)


def patch_grid(images: Tensor, patch_size: Shape) -> Shape:
    """Patches along each axis of [B, C, *size]."""
    return tuple(side // patch for side, patch in zip(images.shape[2:], patch_size, strict=True))


def mask_pixels(mask: Tensor, image_size: Shape, patch_size: Shape) -> Tensor:
    """A mask of patches, bool [B, L], as a mask of pixels, bool [B, 1, *size]."""
    patches = mask.unsqueeze(-1).expand(-1, -1, math.prod(patch_size))
    grid = tuple(side // patch for side, patch in zip(image_size, patch_size, strict=True))
    return unpatchify(patches, patch_size, grid)


def ssim_map(original: Tensor, composite: Tensor) -> Tensor:
    """SSIM at every pixel and channel (Wang et al. 2004): scikit-image's, Gaussian window.

    The window is 11 x 11 with sigma 1.5. An image with a side below 11 gets the largest odd window
    that fits, its sigma in proportion (0.3 x radius). Borders are mirrored, and count.

    Args:
        original: [B, C, *size], gray levels 0..255.
        composite: as original.

    Returns:
        float64 [B, C, *size] on the CPU; of clips each frame alone.

    Raises:
        BadInput: scikit-image is not installed, or a side is below 3 pixels.
    """
    measure = needs("skimage.metrics", "scikit-image").structural_similarity
    H, W = original.shape[-2:]
    radius = (min(SSIM_WINDOW, H, W) - 1) // 2
    if radius < 1:
        raise BadInput(f"SSIM needs images of at least 3 x 3 pixels, not {H} x {W}")
    # Images, channels and frames are all planes to scikit-image, which treats each alone.
    planes = [x.detach().cpu().double().reshape(-1, H, W).numpy() for x in (original, composite)]
    _, full = measure(
        *planes,
        channel_axis=0,
        full=True,
        gaussian_weights=True,
        sigma=SIGMA_PER_RADIUS * radius,
        use_sample_covariance=False,
        data_range=WHITE,
    )
    return torch.from_numpy(full).reshape(original.shape)


def masked_psnr(original: Tensor, composite: Tensor, mask: Tensor, patch_size: Shape) -> Tensor:
    """PSNR of each image over its masked pixels alone.

    Args:
        original: [B, C, *size], gray levels 0..255.
        composite: as original.
        mask: bool [B, L], True = masked.

    Returns:
        float64 [B], dB; inf where nothing differs.
    """
    hidden = mask_pixels(mask, tuple(original.shape[2:]), patch_size).expand_as(original)
    error = (original.double() - composite.double()).square() * hidden
    mse = error.flatten(1).sum(dim=1) / hidden.flatten(1).sum(dim=1)
    return 10 * torch.log10(WHITE**2 / mse)


class ReconstructionMeter:
    """PSNR and SSIM over all masked pixels of a set, for several ways to fill them in.

    Both are pooled: one mean over every masked pixel and channel of the set, never a mean of
    images' or batches' means, so they do not depend on how the set is cut up. An SSIM window
    around a masked pixel may reach into visible ones: SSIM depends on the mask, and is only
    comparable between arms on the same masks.

    Args:
        arms: what is compared, for example ("model", "mean", "nearest"), the same on every rank.

    Raises:
        BadInput: scikit-image is not installed (here, before any work is done).
    """

    def __init__(self, arms: Sequence[str]) -> None:
        needs("skimage.metrics", "scikit-image")
        self.arms = tuple(arms)
        self._sums = torch.zeros(len(self.arms), 3, dtype=torch.float64)

    def update(
        self, arm: str, original: Tensor, composite: Tensor, mask: Tensor, patch_size: Shape
    ) -> None:
        """Add a batch.

        Args:
            arm: one of the meter's arms.
            original: [B, C, *size], gray levels 0..255.
            composite: as original, masked pixels filled in (`compose`).
            mask: bool [B, L], True = masked.
            patch_size: lengths of a patch, (ph, pw) pixels of images.

        Raises:
            ValueError: no such arm, or shapes that do not fit each other.
        """
        if arm not in self.arms:
            raise ValueError(f"no arm {arm!r} in this meter; it has {', '.join(self.arms)}")
        if original.shape != composite.shape:
            shapes = f"{tuple(original.shape)} and {tuple(composite.shape)}"
            raise ValueError(f"original and composite differ in shape: {shapes}")
        original, composite = original.detach().cpu().double(), composite.detach().cpu().double()
        hidden = mask_pixels(mask.cpu(), tuple(original.shape[2:]), patch_size).expand_as(original)
        error = (original - composite)[hidden].square().sum()
        ssim = ssim_map(original, composite)[hidden].sum()
        self._sums[self.arms.index(arm)] += torch.stack([error, ssim, hidden.sum().double()])

    def state(self) -> Tensor:
        """float64 [arms, 3], a copy: sums of squared error and of SSIM, and their count.

        States add: all-reduce this one over the ranks, and `merge` the sum into a new meter.
        """
        return self._sums.clone()

    def merge(self, state: Tensor) -> None:
        """Add another meter's `state`, of the same arms in the same order."""
        if state.shape != self._sums.shape:
            shapes = f"{tuple(state.shape)}, expected {tuple(self._sums.shape)}"
            raise ValueError(f"this state is of other arms: {shapes}")
        self._sums += state.cpu()

    def result(self) -> dict[str, dict[str, float]]:
        """{arm: {"psnr": dB, "ssim": at most 1}}; psnr is inf where nothing differs.

        Raises:
            ValueError: an arm has no masked pixel yet.
        """
        table = {}
        for arm, (error, ssim, count) in zip(self.arms, self._sums.tolist(), strict=True):
            if count == 0:
                raise ValueError(f"arm {arm!r} has seen no masked pixel; nothing to average")
            mse = error / count
            psnr = math.inf if mse == 0 else 10 * math.log10(WHITE**2 / mse)
            table[arm] = {"psnr": psnr, "ssim": ssim / count}
        return table
