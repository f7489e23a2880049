"""Pretraining: the loss of a batch, and reconstruction measured on held-out images."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from models_protocols import PretrainModel
from util.data.images import IMAGENET_MEAN, IMAGENET_STD, as_channels, read_image
from util.data.randomness import make_generator
from util.data.transforms import EvalTransform, denormalize, normalize
from util.errors import RunFailed
from util.float64 import float64_home
from util.mask.cells import Cells, make_cells
from util.mask.patches import patch_averages
from util.mask.strategies import STANDARD, MaskStrategy, build_strategy
from util.measure.metrics import (
    FILLS,
    WHITE,
    ReconstructionMeter,
    compose,
    fill,
    mask_pixels,
)
from util.measure.visualize import panels, picture_grid
from util.spec import Shape

Stats = Sequence[float]


@dataclass(frozen=True)
class Masker:
    """Turns the noise of a batch into masks, on the device.

    Attributes:
        strategy: which cells to mask.
        cells: of the model's mask grid.
        visible_cells: that stay visible in each image.
        place_size: lengths of a place of the mask grid, in pixels.
        words: what the reader is told of these masks: 75% random.
    """

    strategy: MaskStrategy
    cells: Cells
    visible_cells: int
    place_size: Shape
    words: str = ""

    @property
    def num_visible(self) -> int:
        """Places of the mask grid that stay visible in each image."""
        return self.visible_cells * self.cells.patches_each

    def differs_from(self, other: "Masker") -> bool:
        """Whether the masks are others, by name or by count."""
        return (self.words, self.num_visible) != (other.words, other.num_visible)

    def __call__(self, images: Tensor, noise: Tensor) -> Tensor:
        """uint8 [B, C, *size] and float32 [B, S, cells] to bool [B, L], True = masked."""
        averages = None
        if self.strategy.uses_averages:
            # Of whole cells: a sum of integers, where a mean of patches' means would be rounded.
            sides = zip(self.place_size, self.cells.size, strict=True)
            averages = patch_averages(images, tuple(n * m for n, m in sides))
        # On the CPU where the device has no float64, and for every strategy alike.
        noise = noise.to(float64_home(noise.device))
        mask = self.strategy.mask(noise, averages, self.visible_cells)
        return self.cells.to_patches(mask).to(images.device)


def build_masker(settings: Mapping[str, Any], model: Any) -> Masker:
    """Masks of a model's grid.

    Args:
        settings: with the names of `util.mask.strategies.STANDARD`.
        model: see `models_protocols.PretrainModel`.

    Raises:
        BadInput: no such strategy, cells that do not fit, or nothing would be visible or masked.
    """
    cells = make_cells(model.mask_grid, settings.get("mask_cell", (1,)))
    count = math.prod(cells.grid)
    visible = model.num_visible(count, settings["mask_ratio"])
    words = f"{1 - visible / count:.0%} {settings['mask']}"
    if cells.patches_each > 1:
        words += f" cells of {' x '.join(map(str, cells.size))}"
    places = tuple(n // m for n, m in zip(model.input.size, model.mask_grid, strict=True))
    return Masker(build_strategy(settings), cells, visible, places, words)


OWN = "own_mask_"  # before the names of what was measured under a run's own masks


def flat(table: Mapping[str, Mapping[str, float]], prefix: str = "") -> dict[str, float]:
    """A table of `evaluate` as records hold it: model_psnr, mean_ssim ..."""
    return {f"{prefix}{arm}_{name}": v for arm, row in table.items() for name, v in row.items()}


def format_table(table: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The same for the reader."""
    return [
        f"{arm:8s} PSNR {row['psnr']:6.2f} dB   SSIM {row['ssim']:.4f}"
        for arm, row in table.items()
    ]


@dataclass(frozen=True)
class PretrainLoss:
    """The loss of a micro-batch, for `engine_train.train_steps`.

    Attributes:
        masker: of the run.
        mean, std: per channel, in 0..1 units.
        device: where the model is.
        draws: names of what the samples draw for the model, which gets it.
    """

    masker: Masker
    mean: Stats
    std: Stats
    device: torch.device
    draws: Collection[str] = ()

    def __call__(self, model: nn.Module, batch: dict[str, Any], step: int, number: int) -> Tensor:
        """Of a batch of `Samples`, a scalar; what is random in it is in the batch."""
        # Channels may come innermost, which is how they are decoded; the model has its own order.
        images = batch["x"].to(self.device, non_blocking=True).contiguous()
        mask = self.masker(images, batch["noise"].to(self.device, non_blocking=True))
        drawn = {name: batch[name].to(self.device, non_blocking=True) for name in self.draws}
        # Normalisation in float32, outside autocast's reach: it only touches matrix products.
        x = normalize(images, self.mean, self.std)
        return model(x, mask, self.masker.num_visible, **drawn)["loss"]


@torch.inference_mode()
def reconstruct(
    model: PretrainModel, images: Tensor, mask: Tensor, masker: Masker, mean: Stats, std: Stats
) -> Tensor:
    """Images with their masked places as the model predicts them.

    A model may give each hidden patch what it does not predict, such as its true mean and
    deviation: whoever shows the picture has to add the model's `note`.

    Args:
        images: uint8 [B, C, *size]; mask: bool [B, L].
        masker: that the mask is of.

    Returns:
        float32 [B, C, *size], gray levels, clipped to 0..255; visible places are the image's own;
        on the CPU if the device has no float64.
    """
    x = normalize(images, mean, std)
    predicted = model.reconstruct(x, mask, masker.num_visible)
    images, mask, predicted = at_home(images, mask, predicted)
    hidden = mask_pixels(mask, tuple(images.shape[2:]), masker.place_size)
    levels = denormalize(predicted.float(), mean, std).clamp(0.0, WHITE)
    return torch.where(hidden, levels, images.to(levels.dtype))


def at_home(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device where float64 can be computed with, see `util.float64`."""
    return tuple(tensor.to(float64_home(tensor.device)) for tensor in tensors)


def make_fills(
    model: PretrainModel, images: Tensor, mask: Tensor, masker: Masker, mean: Stats, std: Stats
) -> dict[str, Tensor]:
    """The trivial fills by name, on the model's own terms; arguments as `reconstruct`."""
    images, mask = at_home(images, mask)
    x = normalize(images, mean, std)
    pictures = {}
    for name in FILLS:
        patches = fill(name, x, mask, masker.place_size, model.borrows_statistics)
        patches = to_gray_levels(patches, mean, std)
        pictures[name] = compose(images, mask, patches, masker.place_size)
    return pictures


def to_gray_levels(patches: Tensor, mean: Stats, std: Stats) -> Tensor:
    """Patches [B, M, V] from normalised pixels to gray levels 0..255, channels innermost."""
    B, M, V = patches.shape
    pixels = patches.reshape(B, -1, len(mean)).transpose(1, 2).unsqueeze(-1)  # [B, C, M*ph*pw, 1]
    levels = denormalize(pixels, mean, std)
    return levels.squeeze(-1).transpose(1, 2).reshape(B, M, V)


NOT_NUMBERS = "is not finite numbers: its weights have diverged"


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
        loader: batches of `Samples`, the whole measured set over all ranks.
        sum_over_ranks: adds a float64 tensor over all processes.

    Returns:
        {"model" | fill's name: {"psnr": dB, "ssim": -1 to 1}}, see `ReconstructionMeter`.

    Raises:
        RunFailed: the model's reconstruction is not numbers; on every process alike.
    """
    model.eval()
    meter = ReconstructionMeter(["model", *FILLS])
    for batch in loader:
        images = batch["x"].to(device)
        mask = masker(images, batch["noise"].to(device))
        original = at_home(images)[0].float()
        pictures = {"model": reconstruct(model, images, mask, masker, mean, std)}
        pictures |= make_fills(model, images, mask, masker, mean, std)
        for name, picture in pictures.items():
            meter.update(name, original, picture, at_home(mask)[0], masker.place_size)
    total = ReconstructionMeter(meter.arms)
    total.merge(sum_over_ranks(meter.state()))
    table = total.result()
    if math.isnan(table["model"]["psnr"]):
        raise RunFailed(f"the model's reconstruction of held-out images {NOT_NUMBERS}")
    return table


# ---- Pictures from Python ----------------------------------------------------------------------


def find_statistics(state: Mapping[str, Any], channels: int) -> tuple[Stats, Stats]:
    """Mean and deviation of each channel, in 0..1 units, that a model's images are given by.

    Args:
        state: what its checkpoint holds.
    """
    data = state.get("data", {})
    mean, std = data.get("mean"), data.get("std")
    if mean is None:  # foreign weights do not say; MAE's were trained with ImageNet's
        gray = channels == 1
        mean = [sum(IMAGENET_MEAN) / 3] if gray else IMAGENET_MEAN
        std = [sum(IMAGENET_STD) / 3] if gray else IMAGENET_STD
    return mean, std


def draw_masks(images: Tensor, masker: Masker, seed: int) -> Tensor:
    """Masks of images that come one after the other: uint8 [B, C, *size] to bool [B, L].

    Args:
        seed: of the masks, each a function of it and of the image's place.
    """
    noise = [
        masker.strategy.draw(masker.cells.grid, make_generator(seed, "mask", 0, i, 0))
        for i in range(len(images))
    ]
    return masker(images, torch.stack(noise).to(images.device))


def show_reconstruction(
    model: PretrainModel,
    images: Sequence[str | Path | Image.Image],
    state: Mapping[str, Any],
    *,
    seed: int = 0,
    **masks: Any,
) -> Image.Image:
    """A picture of images as a model sees and completes them: original, masked, reconstruction.

    Args:
        model, state: of `models_zoo.load_pretrained`.
        images: files or pictures; they are scaled and cropped to the model's size.
        seed: of the masks.
        masks: settings of them, with the names and defaults of `util.mask.strategies.STANDARD`.

    Raises:
        BadInput: an unknown mask, or an image that cannot be read.
    """
    mean, std = find_statistics(state, model.input.channels)
    masker = build_masker(STANDARD | masks, model)
    transform = EvalTransform(model.input.image_size, margin=False)
    channels = model.input.channels
    opened = [
        as_channels(i, channels) if isinstance(i, Image.Image) else read_image(i, channels)
        for i in images
    ]
    names = ["" if isinstance(i, Image.Image) else Path(i).name for i in images]
    device = next(iter(model.parameters())).device
    batch = torch.stack([transform(image) for image in opened]).to(device)
    mask = draw_masks(batch, masker, seed)
    composite = reconstruct(model.eval(), batch, mask, masker, mean, std)
    return picture_grid(
        panels(batch, mask, composite, masker.place_size),
        names,
        headers=("original", f"masked {masker.words}", "reconstruction"),
        footer=model.note,
    )
