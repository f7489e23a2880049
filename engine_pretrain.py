"""Pretraining: one epoch of training, and reconstruction measured on held-out images."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from util.data.transforms import denormalize, normalize
from util.errors import RunFailed
from util.float64 import float64_home
from util.mask.patches import patch_averages, patchify
from util.mask.pca import PatchFit, PatchMoments
from util.mask.strategies import MaskStrategy, count_visible, strategy_of
from util.measure.metrics import (
    FILLS,
    ReconstructionMeter,
    apply_statistics,
    compose,
    fill,
    masked_patches,
)
from util.train.logger import StepReport
from util.train.step import OptimizerStep, Stopwatch, steps_of

Stats = Sequence[float]


class PretrainModel(Protocol):
    """What this engine asks of a model, M-MAE or another."""

    norm_pix_loss: bool
    pca_components: int | None
    patch_size: tuple[int, int]

    def pixels_of(self, pred: Tensor) -> Tensor:
        """See `MaskedAutoencoderViT.pixels_of`."""
        ...

    def __call__(
        self,
        images: Tensor,
        mask: Tensor,
        num_visible: int | None = None,
        shift: Tensor | None = None,
        order: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See `MaskedAutoencoderViT.forward`."""
        ...

    def eval(self) -> Any:
        """Evaluation mode."""
        ...


@dataclass(frozen=True)
class Masker:
    """Turns the noise of a batch into masks, on the device.

    Attributes:
        strategy: which patches to mask.
        num_visible: patches that stay visible in each image.
        patch_size: (ph, pw) pixels.
        words: what the reader is told of these masks: 75% random.
    """

    strategy: MaskStrategy
    num_visible: int
    patch_size: tuple[int, int]
    words: str = ""

    def differs_from(self, other: "Masker") -> bool:
        """Whether the masks are others, by name or by count."""
        return (self.words, self.num_visible) != (other.words, other.num_visible)

    def __call__(self, images: Tensor, noise: Tensor) -> Tensor:
        """uint8 [B, C, H, W] and float32 [B, S, L] to bool [B, L], True = masked."""
        averages = None
        if self.strategy.uses_averages:
            averages = patch_averages(images, self.patch_size)
        # On the CPU where the device has no float64, and for every strategy alike.
        mask = self.strategy.mask(noise.to(float64_home(noise.device)), averages, self.num_visible)
        return mask.to(images.device)


def masker_of(settings: Mapping[str, Any], model: Any) -> Masker:
    """Masks of a model's grid.

    Args:
        settings: with the names of `util.mask.strategies.STANDARD`.
        model: with a grid and a patch_size.

    Raises:
        BadInput: no such strategy, or nothing would be visible or masked.
    """
    patches = model.grid[0] * model.grid[1]
    visible = count_visible(patches, settings["mask_ratio"])
    words = f"{1 - visible / patches:.0%} {settings['mask']}"
    return Masker(strategy_of(settings), visible, model.patch_size, words)


OWN = "own_mask_"  # before the names of what was measured under a run's own masks


def flat(table: Mapping[str, Mapping[str, float]], prefix: str = "") -> dict[str, float]:
    """A table of `evaluate` as records hold it: model_psnr, mean_ssim ..."""
    return {f"{prefix}{arm}_{name}": v for arm, row in table.items() for name, v in row.items()}


def lines_of(table: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The same for the reader."""
    return [
        f"{arm:8s} PSNR {row['psnr']:6.2f} dB   SSIM {row['ssim']:.4f}"
        for arm, row in table.items()
    ]


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer_step: OptimizerStep,
    masker: Masker,
    schedule: Callable[[int], float],
    *,
    mean: Stats,
    std: Stats,
    jitter: bool,
    partial: bool = False,
    first_step: int,
    after_step: Callable[[StepReport], bool],
) -> int:
    """Train on what the loader yields, one optimiser step after another.

    Args:
        model: possibly wrapped for several processes or compiled.
        loader: batches of `PretrainSamples`; `accum_iter` of them are one step.
        schedule: optimiser step, counted from 0 over the run, to learning rate.
        mean, std: per channel, in 0..1 units.
        jitter: hand the samples' shifts to the model (`pos_offset` jitter).
        partial: hand it the samples' last row of noise, which orders what it predicts.
        first_step: optimiser steps done before.
        after_step: takes in each step; where it returns True, the epoch is left there.

    Returns:
        optimiser steps done after.
    """
    model.train()
    device = optimizer_step.device

    def forward(batch: dict[str, Any]) -> Tensor:
        # Channels may come innermost, which is how they are decoded; the model has its own order.
        images = batch["image"].to(device, non_blocking=True).contiguous()
        noise = batch["noise"].to(device, non_blocking=True)
        mask = masker(images, noise)
        order = noise[:, -1] if partial else None
        shift = batch["shift"].to(device, non_blocking=True) if jitter else None
        # Normalisation in float32, outside autocast's reach: it only touches matrix products.
        x = normalize(images, mean, std)
        return model(x, mask, masker.num_visible, shift, order)["loss"]

    step = first_step
    waiting = Stopwatch()
    for micro_batches in steps_of(waiting.around(loader), optimizer_step.accum_iter):
        lr = schedule(step)
        result = optimizer_step(forward, micro_batches, lr)
        step += 1
        indices = [batch["index"] for batch in micro_batches]
        bad = [i for batch in micro_batches for i in batch["bad"].flatten().tolist() if i >= 0]
        if after_step(StepReport(step, result, lr, waiting.lap(), indices, bad)):
            break
    return step


@torch.inference_mode()
def reconstruct(
    model: PretrainModel, images: Tensor, mask: Tensor, num_visible: int, mean: Stats, std: Stats
) -> Tensor:
    """Images with their masked patches as the model predicts them.

    A model of normalised pixels does not predict a patch's mean and deviation: each hidden patch is
    given its true ones, and whoever shows the picture has to say so (`STATISTICS_NOTE`).

    Args:
        images: uint8 [B, C, H, W]; mask: bool [B, L].

    Returns:
        float32 [B, C, H, W], gray levels, clipped to 0..255; visible patches are the image's own;
        on the CPU if the device has no float64.
    """
    x = normalize(images, mean, std)
    pred = model.pixels_of(model(x, mask, num_visible)["pred"].float())
    images, mask, x, pred = at_home(images, mask, x, pred)
    if model.norm_pix_loss:
        pred = apply_statistics(pred, masked_patches(x, mask, model.patch_size))
    return compose(images, mask, to_gray_levels(pred, mean, std), model.patch_size)


def at_home(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device where float64 can be computed with, see `util.float64`."""
    return tuple(tensor.to(float64_home(tensor.device)) for tensor in tensors)


def fills_of(
    model: PretrainModel, images: Tensor, mask: Tensor, mean: Stats, std: Stats
) -> dict[str, Tensor]:
    """The trivial fills by name, on the model's own terms; arguments as `reconstruct`."""
    images, mask = at_home(images, mask)
    x = normalize(images, mean, std)
    pictures = {}
    for name in FILLS:
        patches = fill(name, x, mask, model.patch_size, model.norm_pix_loss)
        patches = to_gray_levels(patches, mean, std)
        pictures[name] = compose(images, mask, patches, model.patch_size)
    return pictures


def to_gray_levels(patches: Tensor, mean: Stats, std: Stats) -> Tensor:
    """Patches [B, M, V] from normalised pixels to gray levels 0..255, channels innermost."""
    B, M, V = patches.shape
    pixels = patches.reshape(B, -1, len(mean)).transpose(1, 2).unsqueeze(-1)  # [B, C, M*ph*pw, 1]
    levels = denormalize(pixels, mean, std)
    return levels.squeeze(-1).transpose(1, 2).reshape(B, M, V)


NOT_NUMBERS = "is not finite numbers: its weights have diverged"

STATISTICS_NOTE = (
    "Model of normalised pixels: each hidden patch is shown with its true mean and deviation, "
    "which the model does not predict; the fills beside it are given the same."
)


def note_of(model: PretrainModel) -> str | None:
    """What a reader of the model's pictures and PSNR has to know; None: nothing."""
    if model.norm_pix_loss:
        return STATISTICS_NOTE
    if model.pca_components is not None:
        return (
            f"Model of PCA coefficients: detail beyond the {model.pca_components} of a patch is in "
            "no prediction of it."
        )
    return None


def fit_pca(
    loader: Iterable[dict[str, Any]],
    components: int,
    *,
    patch_size: tuple[int, int],
    per_image: int,
    mean: Stats,
    std: Stats,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> PatchFit:
    """Principal components of normalised patches, `per_image` random ones of each image.

    Args:
        loader: this process's batches of `PretrainSamples`; the last row of their noise picks.
        sum_over_ranks: adds a float64 tensor over all processes.

    Raises:
        BadInput: more components than values or patches; on every process alike.
    """
    moments = PatchMoments(patch_size[0] * patch_size[1] * len(mean))
    for batch in loader:
        patches = patchify(normalize(batch["image"], mean, std), patch_size)
        ids = batch["noise"][:, -1].argsort(dim=1)[:, :per_image, None]
        picked = patches.gather(1, ids.expand(-1, -1, patches.shape[-1]))
        moments.update(picked.flatten(0, 1))
    moments.sum_over(sum_over_ranks)
    return moments.principal(components)


@torch.inference_mode()
def evaluate(
    model: PretrainModel,
    loader: Iterable[dict[str, Any]],
    masker: Masker,
    *,
    mean: Stats,
    std: Stats,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, dict[str, float]]:
    """PSNR and SSIM over masked pixels: the model's reconstruction beside the trivial fills.

    All arms see the same images under the same masks. With a model of normalised pixels the fills
    get the same true statistics.

    Args:
        model: not wrapped.
        loader: batches of `PretrainSamples`, the whole measured set over all ranks.
        sum_over_ranks: adds a float64 tensor over all processes.

    Returns:
        {"model" | fill's name: {"psnr": dB, "ssim": -1 to 1}}, see `ReconstructionMeter`.

    Raises:
        RunFailed: the model's reconstruction is not numbers; on every process alike.
    """
    model.eval()
    meter = ReconstructionMeter(["model", *FILLS])
    for batch in loader:
        images = batch["image"].to(device)
        mask = masker(images, batch["noise"].to(device))
        original = at_home(images)[0].float()
        pictures = {"model": reconstruct(model, images, mask, masker.num_visible, mean, std)}
        pictures |= fills_of(model, images, mask, mean, std)
        for name, picture in pictures.items():
            meter.update(name, original, picture, at_home(mask)[0], masker.patch_size)
    total = ReconstructionMeter(meter.arms)
    total.merge(sum_over_ranks(meter.state()))
    table = total.result()
    if math.isnan(table["model"]["psnr"]):
        raise RunFailed(f"the model's reconstruction of held-out images {NOT_NUMBERS}")
    return table
