"""Segmentation: the loss of a batch, exact evaluation, and label maps of images."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util.data.images import BadImage
from util.data.label_maps import IGNORE, overlay, palette, save_label_map
from util.data.loading import say_conversions
from util.data.randomness import EvalSampler, derive_seed, seeded
from util.data.replace import refuse_bad
from util.data.samples import Samples, build_loader, default_workers
from util.data.segmentation_sets import UnlabelledSource
from util.data.segmentation_transforms import SegmentEvalTransform
from util.data.source import Source
from util.data.transforms import normalize
from util.errors import BadInput, RunFailed
from util.files import save_png, write_text
from util.float64 import to_float64
from util.measure.confusion import ConfusionMeter, Segmentation
from util.measure.predictions import find_images
from util.measure.visualize import to_picture
from util.measure.windows import multi_scale, resize, slide, whole
from util.progress import say
from util.train.dist import Processes
from util.train.logger import prepare_folder

Stats = Sequence[float]
Size = tuple[int, int]
CLASSES_AT_ONCE = 16
EVAL_SEED = 0


@dataclass(frozen=True)
class PixelLoss:
    """Cross-entropy of every pixel, of the logits and, with a weight, of the auxiliary ones.

    Logits are enlarged to the label's size first. Ignored pixels have no loss. What the sum is
    divided by is `mean`:

    - all: every pixel of the batch, ignored and padded ones too. mmsegmentation's default
      (`avg_non_ignore=False`), and so the published runs'.
    - valid: the pixels that are not ignored, of the whole step: all processes and micro-steps
      together, so that a pixel weighs the same wherever it was computed.

    Either way the mean does not depend on how a step's images are dealt out.

    Attributes:
        aux_weight: of the auxiliary loss.
        mean: all | valid.
    """

    aux_weight: float = 0.4
    mean: str = "all"

    def pixels(self, label: Tensor) -> Tensor:
        """How many pixels of a label the mean is over: float64 []."""
        if self.mean == "all":
            return torch.tensor(float(label.numel()), dtype=torch.float64)
        return to_float64((label != IGNORE).sum())

    def __call__(self, output: dict[str, Tensor], label: Tensor, pixels: Tensor) -> Tensor:
        """The loss, in float32.

        Args:
            output: logits [B, K, h, w] and, where the model trains one, aux [B, K, h', w'].
            label: uint8 [B, H, W].
            pixels: what the sum over the batch is divided by.
        """
        target = torch.where(label == IGNORE, -1, label.long())
        shape = (label.shape[1], label.shape[2])

        def cross_entropy(logits: Tensor) -> Tensor:
            enlarged = resize(logits.float(), shape)
            return F.cross_entropy(enlarged, target, ignore_index=-1, reduction="sum") / pixels

        loss = cross_entropy(output["logits"])
        return loss + self.aux_weight * cross_entropy(output["aux"]) if "aux" in output else loss


def prepare(batch: dict[str, Any], mean: Stats, std: Stats, device: torch.device) -> Tensor:
    """Normalised images, float32 [B, 3, h, w], with 0 in their padding."""
    images = normalize(batch["x"].to(device, non_blocking=True), mean, std)
    if "extent" not in batch:
        return images
    extent = batch["extent"].to(device, non_blocking=True)
    inside = [
        torch.arange(side, device=device) < extent[:, axis : axis + 1]  # [B, side]
        for axis, side in enumerate(images.shape[2:])
    ]
    return images * (inside[0][:, None, :, None] & inside[1][:, None, None, :])


@dataclass
class SegmentLoss:
    """The loss of a micro-batch, for `engine_train.train_steps`; with what comes before a step.

    Attributes:
        loss: of the pixels.
        mean, std: per channel, in 0..1 units.
        device: where the model is.
        seed, rank: with step and micro-step they decide drop path and dropout.
        world_size: processes.
        sum_over_ranks: adds a tensor over all processes, on their devices.
        pixels: what the loss of a micro-batch of this step is divided by, see `before_step`.
    """

    loss: PixelLoss
    mean: Stats
    std: Stats
    device: torch.device
    seed: int
    rank: int
    world_size: int
    sum_over_ranks: Callable[[Tensor], Tensor]
    pixels: Tensor = field(init=False)

    def before_step(self, micro_batches: list[dict[str, Any]]) -> None:
        """Count the pixels that a step's loss is the mean over. A collective.

        The step averages over processes and micro-steps: each divides by its share of all pixels.
        """
        counts = torch.stack([self.loss.pixels(batch["y"]) for batch in micro_batches]).sum()
        total = self.sum_over_ranks(counts.float().to(self.device, non_blocking=True))
        self.pixels = (total / (self.world_size * len(micro_batches))).clamp(min=1)

    def __call__(self, model: nn.Module, batch: dict[str, Any], step: int, number: int) -> Tensor:
        """Of a batch of `Samples`, a scalar."""
        label = batch["y"].to(self.device, non_blocking=True)
        with seeded(derive_seed(self.seed, "model", step, number, self.rank), self.device):
            images = prepare(batch, self.mean, self.std, self.device)
            return self.loss(model(images), label, self.pixels)


@dataclass(frozen=True)
class Inference:
    """How the label map of an image is made of a model's logits.

    Attributes:
        slide: windows instead of the image at once.
        window, stride: (down, right) pixels, of windows.
        scales: of multi-scale inference; none: the image as it is.
        flip: mean with the mirror image, also at a single scale.
        short_side: of a scaled image, at least.

    Raises:
        BadInput: windows that leave pixels out.
    """

    slide: bool = False
    window: Size = (512, 512)
    stride: Size = (341, 341)
    scales: tuple[float, ...] = ()
    flip: bool = False
    short_side: int = 0

    def __post_init__(self) -> None:
        # Found now, not when the first evaluation comes.
        if self.slide and any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise BadInput(
                f"--stride {self.stride} must be at most --window {self.window} (down, right), or "
                "pixels are left out"
            )

    def __call__(self, model: nn.Module, image: Tensor, size: Size) -> Tensor:
        """Classes of every pixel, uint8 [h, w] at `size`, of float [1, 3, H, W].

        The model has `predict(images) -> logits` at the images' resolution.

        At one scale the logits are resized to `size` before the most likely class is taken, with
        several the probabilities are: mmsegmentation's ways.
        """

        logits_of = cast(Any, model).predict
        predict = partial(whole, logits_of)
        if self.slide:
            predict = partial(slide, logits_of, window=self.window, stride=self.stride)
        if not self.scales and not self.flip:
            return resized_argmax(predict(image), size)
        shares = multi_scale(predict, image, self.scales or (1.0,), self.flip, self.short_side)
        return resized_argmax(shares, size)


def resized_argmax(scores: Tensor, size: Size) -> Tensor:
    """The class of highest score at another size: uint8 [h, w] of float [1, K, H, W].

    Of equal scores the first class counts; where none is a number the result is 255. Few classes
    at once are enlarged: 150 of a photograph of 12 megapixels would be 7 GB.
    """
    best = torch.full(size, -torch.inf, device=scores.device)
    classes = torch.full(size, IGNORE, dtype=torch.uint8, device=scores.device)
    for first in range(0, scores.shape[1], CLASSES_AT_ONCE):
        part = resize(scores[:, first : first + CLASSES_AT_ONCE], size)[0]
        highest = part.amax(dim=0)
        index = (part == highest).int().argmax(dim=0)
        better = highest > best
        best = torch.where(better, highest, best)
        classes = torch.where(better, (first + index).to(torch.uint8), classes)
    return classes


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    inference: Inference,
    *,
    mean: Stats,
    std: Stats,
    device: torch.device,
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Label maps of images, in float32, one after the other.

    Args:
        model: not wrapped.
        loader: batches of one; images may differ in size.

    Yields:
        the batch, and classes uint8 [H, W] at the size of its label, on the device.
    """
    model.eval()
    for batch in loader:
        shape = (batch["y"].shape[1], batch["y"].shape[2])
        yield batch, inference(model, prepare(batch, mean, std, device), shape)


def eval_loader(source: Source, scale: Sequence[int], workers: int, procs: Processes) -> DataLoader:
    """Every image once, alone in its batch, dealt out to the processes."""
    transform = SegmentEvalTransform((scale[0], scale[1]))
    sampler = EvalSampler(range(len(source)), 1, world_size=procs.world_size, rank=procs.rank)
    return build_loader(
        Samples(source, transform, EVAL_SEED),
        sampler,
        num_workers=workers,
        pin_memory=procs.device.type == "cuda",
    )


def name_maps(places: Sequence[Path], flag: str) -> tuple[list[Path], list[Path]]:
    """The images of files and folders, and the names of their label maps.

    Raises:
        BadInput: no images, or two of one name.
    """
    named = []
    for place in places:
        root, files = find_images(place, flag)
        # A single image has no folder to tell it apart.
        named += [(place if place == root / name else root, root / name) for name in files]
    # Sub-folders stay apart; endings are dropped, so two files may still meet in one name.
    names = [
        (Path(file.name) if file == root else file.relative_to(root)).with_suffix(".png")
        for root, file in named
    ]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise BadInput(f"{flag}: two images would both be written to {twice}; rename one")
    return [file for _, file in named], names


def write_label_maps(
    model: Any,
    places: Sequence[Path],
    folder: Path,
    classes: Sequence[str] | None,
    inference: "Inference",
    procs: Processes,
    *,
    flag: str,
    scale: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    num_workers: int | None,
    max_pixels: int | None,
    strict: bool = True,
) -> None:
    """Write the label map of each image, and its colours over the image. A collective.

    Args:
        places: images and folders of them. flag: that named them, for messages.
        folder: takes maps, overlays and classes.txt.
        classes: names, None: numbers.
        scale: bounds of an image's sides, (long, short).
        mean, std: of the set that the model learnt from; None: ImageNet's.
        strict: an image that cannot be decoded ends it; else it is left out, and said.

    Raises:
        BadInput: no images, two of one name, or one that cannot be decoded.
    """
    for place in places:
        if place.is_dir() and folder.resolve().is_relative_to(place.resolve()):
            raise BadInput(
                f"--output_dir {folder} lies in {flag} {place}: the maps would be images of the "
                "next start; choose another"
            )
    files, names = name_maps(places, flag)
    classes = classes or [f"class {i}" for i in range(model.num_classes)]
    stats = [tuple(v) if v else None for v in (mean, std)]
    source = UnlabelledSource(files, classes, mean=stats[0], std=stats[1], strict=strict)
    source.max_pixels = max_pixels
    workers = default_workers(procs.local_size) if num_workers is None else num_workers
    loader = eval_loader(source, scale, workers, procs)
    prepare_folder(folder)
    found = predict(model, loader, inference, mean=source.mean, std=source.std, device=procs.device)
    colours = palette(len(source.classes))
    bad: list[tuple[int, str]] = []
    for batch, label in found:
        index = int(batch["index"])
        try:
            image = np.asarray(source.read(index))
        except BadImage as error:
            bad.append((index, error.reason))
            continue
        label_map = label.cpu().numpy()
        save_label_map(folder / "maps" / names[index], label_map, colours)
        mixed = torch.from_numpy(overlay(image, label_map, colours)).permute(2, 0, 1)
        save_png(folder / "overlays" / names[index], to_picture(mixed))
    say_conversions(loader, procs.gather)
    bad = sorted(one for part in procs.gather(bad) for one in part)
    if procs.main:
        write_text(folder / "classes.txt", "".join(f"{name}\n" for name in source.classes))
        for index, reason in bad:
            say(f"cannot decode {source.file_name(index)}: {reason}")
        rest = f", {len(bad)} of them cannot be decoded and have no map" if bad else ""
        say(f"{len(source)} images{rest}: {folder}/maps (class indices), overlays; classes.txt")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    num_classes: int,
    inference: Inference,
    *,
    mean: Stats,
    std: Stats,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor],
    gather: Callable[[Any], list[Any]],
) -> Segmentation:
    """Segment every image once, and compare with its labels at their own size.

    Args:
        model: not wrapped.
        loader: batches of one, the whole set over all ranks.
        sum_over_ranks: adds a tensor over all processes.
        gather: a thing of every process, for all of them.

    Raises:
        BadInput: an image could not be decoded, on all processes.
        RunFailed: the model's logits are not numbers.
    """
    meter = ConfusionMeter(num_classes, IGNORE, device)
    bad: list[int] = []
    broken = torch.zeros((), dtype=torch.int64, device=device)
    for batch, classes in predict(model, loader, inference, mean=mean, std=std, device=device):
        label = batch["y"][0].to(device)
        no_class = (classes == IGNORE) & (label != IGNORE)
        broken += no_class.sum()
        meter.update(classes.masked_fill(no_class, 0), label)
        bad += batch["bad"].flatten().tolist()
    refuse_bad(bad, gather)
    say_conversions(loader, gather)
    if pixels := int(sum_over_ranks(broken)):
        raise RunFailed(f"the logits of {pixels} pixels are not finite numbers")
    meter.reduce(sum_over_ranks)
    return meter.result()
