"""How good a reconstruction is, over the masked pixels alone, beside fills that learn nothing."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from util.errors import BadInput, needs
from util.mask.patches import patch_statistics, patchify, unpatchify
from util.spec import Pair

WHITE = 255.0
SSIM_WINDOW = 11
SIGMA_PER_RADIUS = 0.3  # 1.5 at the radius 5 of an 11 x 11 window


def masked_patches(images: Tensor, mask: Tensor, patch_size: Pair) -> Tensor:
    """The hidden patches of images, in raster order, as a model's `pred` has them.

    Args:
        images: [B, C, H, W].
        mask: bool [B, L], True = masked, as many in every row.
        patch_size: (ph, pw) pixels.

    Returns:
        [B, M, ph*pw*C] of the images' dtype.

    Raises:
        ValueError: the mask does not fit the images, or its rows hide different numbers of patches.
    """
    return _pick(patchify(images, patch_size), mask)


def fill_mean(images: Tensor, mask: Tensor, patch_size: Pair) -> Tensor:
    """Every hidden patch in one colour, the per-channel mean of all visible pixels of its image.

    "The mean of the visible patches" could also be one patch averaged position by position. That
    one has a pattern left over from a few patches; the colour is the stronger rival.

    Args:
        images: [B, C, H, W], any unit and dtype.
        mask: bool [B, L], True = masked.
        patch_size: (ph, pw) pixels.

    Returns:
        float64 [B, M, ph*pw*C] in the unit of the images, masked patches in raster order.

    Raises:
        ValueError: the mask does not fit the images, or leaves nothing visible.
    """
    patches = patchify(images.double(), patch_size)
    hidden = _num_masked(patches, mask)
    visible = patches.masked_fill(mask.unsqueeze(-1), 0.0).sum(dim=1)  # [B, ph*pw*C]
    pixels = patch_size[0] * patch_size[1]
    sums = visible.unflatten(-1, (pixels, images.shape[1])).sum(dim=1)  # [B, C]
    colour = sums / ((mask.shape[1] - hidden) * pixels)
    return colour.repeat(1, pixels).unsqueeze(1).repeat(1, hidden, 1)


def fill_nearest(images: Tensor, mask: Tensor, patch_size: Pair) -> Tensor:
    """Every hidden patch copies the nearest visible one of its image.

    Nearest by Euclidean distance on the patch grid; of equally near ones the first in raster order.
    Arguments, result and errors as `fill_mean`.
    """
    patches = patchify(images.double(), patch_size)
    _num_masked(patches, mask)
    gw = images.shape[3] // patch_size[1]
    index = torch.arange(mask.shape[1], device=mask.device)
    rows, columns = index // gw, index % gw
    squared = (rows[:, None] - rows).square() + (columns[:, None] - columns).square()  # [L, L]
    # The index as the last digit makes every key unique, so that ties break alike on every device.
    key = (squared * len(index) + index).expand(len(mask), -1, -1)
    key = key.masked_fill(mask.unsqueeze(1), torch.iinfo(torch.int64).max)
    source = key.min(dim=-1).values % len(index)  # [B, L]
    return _pick(patches.gather(1, source.unsqueeze(-1).expand_as(patches)), mask)


FILLS: dict[str, Callable[[Tensor, Tensor, Pair], Tensor]] = {
    "mean": fill_mean,
    "nearest": fill_nearest,
}


def apply_statistics(normalised: Tensor, true_patches: Tensor) -> Tensor:
    """Give patches of normalised pixels the mean and deviation of the true hidden patches.

    A model of normalised pixels (MAE, section 3, `norm_pix_loss`) does not predict these two
    numbers. A picture of what it predicts borrows them from the truth, and has to say so.

    Args:
        normalised: [B, M, ph*pw*C], such a model's `pred`.
        true_patches: [B, M, ph*pw*C], the same patches of the image, in the space in which the
            model's targets were normalised, its input.

    Returns:
        [B, M, ph*pw*C] in the space of `true_patches`.
    """
    mean, std = patch_statistics(true_patches)
    return normalised * std + mean


def fill(
    name: str, images: Tensor, mask: Tensor, patch_size: Pair, norm_pix_loss: bool = False
) -> Tensor:
    """A trivial fill, on the terms on which the model beside it is shown.

    Beside a model of normalised pixels the fill is computed from the visible patches' own targets
    (each normalised by its own statistics) and then given the same true mean and deviation by the
    same function, `apply_statistics`. Filling first and normalising the result would be the same
    for `nearest`, but would blow the faint tint of the mean colour up to full contrast: a rival
    1.6 to 1.8 dB weaker (six photographs, 96 pixels, patches of 8 and 16, 75 % random).

    Args:
        name: one of `FILLS`.
        images: [B, C, H, W]; with norm_pix_loss in the space of the model's input, because the
            statistics over channels depend on the space. Otherwise any affine space does.
        mask: bool [B, L], True = masked.
        patch_size: (ph, pw) pixels.
        norm_pix_loss: whether the model beside it predicts normalised pixels.

    Returns:
        float64 [B, M, ph*pw*C] in the space of the images.

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
    grid = images.shape[2] // patch_size[0], images.shape[3] // patch_size[1]
    targets = unpatchify((patches - mean) / std, patch_size, grid)
    return apply_statistics(FILLS[name](targets, mask, patch_size), _pick(patches, mask))


def compose(images: Tensor, mask: Tensor, patches_masked: Tensor, patch_size: Pair) -> Tensor:
    """Visible pixels from the images, hidden ones from the patches, clipped to 0..255.

    Args:
        images: [B, C, H, W], gray levels 0..255.
        mask: bool [B, L], True = masked.
        patches_masked: [B, M, ph*pw*C], gray levels, masked patches in raster order.
        patch_size: (ph, pw) pixels.

    Returns:
        floating point [B, C, H, W], not rounded to whole gray levels.

    Raises:
        ValueError: mask or patches do not fit the images.
    """
    if not patches_masked.is_floating_point():
        raise ValueError(f"patches are expected in floating point, not {patches_masked.dtype}")
    dtype = torch.promote_types(images.dtype, patches_masked.dtype)
    patches = patchify(images.to(dtype), patch_size)
    expected = (len(patches), _num_masked(patches, mask, need_visible=False), patches.shape[-1])
    if tuple(patches_masked.shape) != expected:
        raise ValueError(f"patches of shape {tuple(patches_masked.shape)}, expected {expected}")
    pixels = patches_masked.to(dtype).reshape(-1)
    patches = patches.masked_scatter(mask.unsqueeze(-1), pixels)  # a copy: images stay as they are
    grid = images.shape[2] // patch_size[0], images.shape[3] // patch_size[1]
    return unpatchify(patches, patch_size, grid).clamp(0.0, WHITE)


def mask_pixels(mask: Tensor, image_size: Pair, patch_size: Pair) -> Tensor:
    """A mask of patches, bool [B, L], as a mask of pixels, bool [B, 1, H, W]."""
    (H, W), (ph, pw) = image_size, patch_size
    patches = mask.unsqueeze(-1).expand(-1, -1, ph * pw)
    return unpatchify(patches, patch_size, (H // ph, W // pw))


def ssim_map(original: Tensor, composite: Tensor) -> Tensor:
    """SSIM at every pixel and channel (Wang et al. 2004): scikit-image's, Gaussian window.

    The window is 11 x 11 with sigma 1.5. An image with a side below 11 gets the largest odd window
    that fits, its sigma in proportion (0.3 x radius). Borders are mirrored, and count.

    Args:
        original: [B, C, H, W], gray levels 0..255.
        composite: as original.

    Returns:
        float64 [B, C, H, W] on the CPU.

    Raises:
        BadInput: scikit-image is not installed, or a side is below 3 pixels.
    """
    measure = needs("skimage.metrics", "scikit-image").structural_similarity
    B, C, H, W = original.shape
    radius = (min(SSIM_WINDOW, H, W) - 1) // 2
    if radius < 1:
        raise BadInput(f"SSIM needs images of at least 3 x 3 pixels, not {H} x {W}")
    # Images and channels are all planes to scikit-image, which treats each alone.
    planes = [x.detach().cpu().double().reshape(B * C, H, W).numpy() for x in (original, composite)]
    _, full = measure(
        *planes,
        channel_axis=0,
        full=True,
        gaussian_weights=True,
        sigma=SIGMA_PER_RADIUS * radius,
        use_sample_covariance=False,
        data_range=WHITE,
    )
    return torch.from_numpy(full).reshape(B, C, H, W)


def masked_psnr(original: Tensor, composite: Tensor, mask: Tensor, patch_size: Pair) -> Tensor:
    """PSNR of each image over its masked pixels alone.

    Args:
        original: [B, C, H, W], gray levels 0..255.
        composite: as original.
        mask: bool [B, L], True = masked.

    Returns:
        float64 [B], dB; inf where nothing differs.
    """
    size = original.shape[2], original.shape[3]
    hidden = mask_pixels(mask, size, patch_size).expand_as(original)
    error = (original.double() - composite.double()).square() * hidden
    mse = error.sum(dim=(1, 2, 3)) / hidden.sum(dim=(1, 2, 3))
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
        self, arm: str, original: Tensor, composite: Tensor, mask: Tensor, patch_size: Pair
    ) -> None:
        """Add a batch.

        Args:
            arm: one of the meter's arms.
            original: [B, C, H, W], gray levels 0..255.
            composite: as original, masked pixels filled in (`compose`).
            mask: bool [B, L], True = masked.
            patch_size: (ph, pw) pixels.

        Raises:
            ValueError: no such arm, or shapes that do not fit each other.
        """
        if arm not in self.arms:
            raise ValueError(f"no arm {arm!r} in this meter; it has {', '.join(self.arms)}")
        if original.shape != composite.shape:
            shapes = f"{tuple(original.shape)} and {tuple(composite.shape)}"
            raise ValueError(f"original and composite differ in shape: {shapes}")
        original, composite = original.detach().cpu().double(), composite.detach().cpu().double()
        size = original.shape[2], original.shape[3]
        hidden = mask_pixels(mask.cpu(), size, patch_size).expand_as(original)
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


def _num_masked(patches: Tensor, mask: Tensor, need_visible: bool = True) -> int:
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


def _pick(patches: Tensor, mask: Tensor) -> Tensor:
    """The masked ones of [B, L, values], in raster order, as [B, M, values]."""
    hidden = _num_masked(patches, mask, need_visible=False)
    return patches[mask].reshape(len(patches), hidden, patches.shape[-1])
