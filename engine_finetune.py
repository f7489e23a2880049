"""Fine-tuning: the loss of a batch, the exact evaluation of a classifier, and its use."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util.data.loading import say_conversions
from util.data.randomness import EvalSampler, derive_seed, seeded
from util.data.replace import refuse_bad
from util.data.samples import Samples, build_loader
from util.data.source import Source
from util.data.transforms import EvalTransform, normalize
from util.errors import RunFailed
from util.measure.accuracy import Accuracy, AccuracyMeter
from util.measure.predictions import Prediction
from util.progress import say
from util.train.dist import Processes

Stats = Sequence[float]
EVAL_SEED = 0


@dataclass(frozen=True)
class BatchAugmentation:
    """What is done to a batch on the device: random erasing, then mixup or cutmix (timm's).

    Attributes:
        erasing: of single images, with noise of their normalised pixels' size; None: none.
        mixup: mixes images and targets, and smooths them; None: none.
        smoothing: of the targets, where there is no mixup.
    """

    erasing: RandomErasing | None = None
    mixup: Mixup | None = None
    smoothing: float = 0.0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images float [B, C, H, W], changed in place; labels int64 [B] to what `loss` takes."""
        if self.erasing is not None:
            images = self.erasing(images)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        return images, labels

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy with labels [B] or with probabilities [B, C]; mean over images, float32."""
        smoothing = self.smoothing if target.ndim == 1 else 0.0  # mixup has smoothed its own
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


@dataclass(frozen=True)
class FinetuneLoss:
    """The loss of a micro-batch, for `engine_train.train_steps`.

    Attributes:
        augmentation: of batches.
        mean, std: per channel, in 0..1 units.
        device: where the model is.
        seed, rank: with step and micro-step they decide drop path, erasing and mixup.
    """

    augmentation: BatchAugmentation
    mean: Stats
    std: Stats
    device: torch.device
    seed: int
    rank: int

    def __call__(self, model: nn.Module, batch: dict[str, Any], step: int, number: int) -> Tensor:
        """Of a batch of `Samples`, a scalar."""
        images = batch["x"].to(self.device, non_blocking=True)
        labels = batch["y"].to(self.device, non_blocking=True)
        with seeded(derive_seed(self.seed, "model", step, number, self.rank), self.device):
            # Normalisation in float32, outside autocast's reach: it only touches matrix products.
            x, target = self.augmentation(normalize(images, self.mean, self.std), labels)
            return self.augmentation.loss(model(x), target)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    num_classes: int,
    *,
    mean: Stats,
    std: Stats,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor],
    gather: Callable[[Any], list[Any]],
) -> Accuracy:
    """Classify every image once, in float32.

    Args:
        model: not wrapped.
        loader: batches of `Samples`, the whole set over all ranks.
        num_classes: outputs of the model.
        sum_over_ranks: adds a tensor over all processes.
        gather: a thing of every process, for all of them.

    Raises:
        BadInput: an image could not be decoded, on all processes: without it the numbers would be
            another set's.
    """
    model.eval()
    meter = AccuracyMeter(num_classes, device)
    bad: list[int] = []
    for batch in loader:
        images = batch["x"].to(device, non_blocking=True)
        labels = batch["y"].to(device, non_blocking=True)
        meter.update(model(normalize(images, mean, std)), labels)
        bad += batch["bad"].flatten().tolist()
    refuse_bad(bad, gather)
    say_conversions(loader, gather)
    return meter.total(sum_over_ranks)


@torch.inference_mode()
def classify(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    top: int,
    *,
    mean: Stats,
    std: Stats,
    device: torch.device,
) -> Iterator[list[Prediction]]:
    """The most likely classes of each image, in float32, as `evaluate` sees it.

    Args:
        model: not wrapped.
        loader: batches of `util.measure.predictions.FileSamples`.
        top: classes of each image; of equal probabilities the first class comes first.

    Yields:
        the predictions of a batch; the probabilities are NaN where logits are not finite.
    """
    model.eval()
    for batch in loader:
        images = batch["x"].to(device, non_blocking=True)
        logits = model(normalize(images, mean, std)).float()
        shares, order = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
        rows = zip(batch["index"].tolist(), batch["fault"], strict=True)
        best = zip(order[:, :top].tolist(), shares[:, :top].tolist(), strict=True)
        yield [
            Prediction(index, fault, *([], []) if fault else (classes, values))
            for (index, fault), (classes, values) in zip(rows, best, strict=True)
        ]


def eval_loader(
    source: Source, size: tuple[int, int], batch_size: int, workers: int, procs: Processes
) -> DataLoader:
    """Every image once, dealt out to the processes."""
    samples = Samples(source, EvalTransform(size, margin=source.eval_margin), EVAL_SEED)
    sampler = EvalSampler(
        range(len(source)), batch_size, world_size=procs.world_size, rank=procs.rank
    )
    return build_loader(
        samples, sampler, num_workers=workers, pin_memory=procs.device.type == "cuda"
    )


def measurement(
    loader: DataLoader, source: Source, num_classes: int, procs: Processes
) -> Callable[[Any], Accuracy]:
    """A function that measures a model on the held-out set; a collective.

    It raises RunFailed for logits that are not finite numbers.
    """

    def measure(model: Any) -> Accuracy:
        result = evaluate(
            model,
            loader,
            num_classes,
            mean=source.mean,
            std=source.std,
            device=procs.device,
            sum_over_ranks=procs.sum,
            gather=procs.gather,
        )
        if result.broken:
            raise RunFailed(f"the logits of {result.broken} images are not finite numbers")
        return result

    return measure


def say_accuracy(name: str, result: Accuracy) -> None:
    """One line for the reader."""
    values = result.summary()
    say(
        f"{name}: top-1 {values['top1']:.3f}  top-5 {values['top5']:.3f}  "
        f"loss {values['loss']:.4f}  ({result.images:,} images)"
    )
