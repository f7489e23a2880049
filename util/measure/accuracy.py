"""Classification measured exactly: sums of counts and of float64 losses over all processes."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from util.files import write_text
from util.float64 import float64_home, to_float64

TOP = 5


@dataclass(frozen=True)
class Accuracy:
    """What a classifier got right on a whole set.

    Attributes:
        confusion: int64 [C, C], images of class (row) taken for class (column).
        top5: images whose class is among the five of highest logit; ties go to the lower class.
        loss: cross-entropy, mean over the images.
        images: how many.
        broken: images with a logit that was not finite; they count as wrong.
    """

    confusion: Tensor
    top5: int
    loss: float
    images: int
    broken: int

    @property
    def top1(self) -> int:
        """Images whose class has the highest logit."""
        return int(self.confusion.diagonal().sum())

    def summary(self) -> dict[str, float | int]:
        """Top-1 and top-5 in percent, loss, and the count of images."""
        return {
            "top1": 100 * self.top1 / self.images,
            "top5": 100 * self.top5 / self.images,
            "loss": self.loss,
            "images": self.images,
        }

    def per_class(self) -> list[dict[str, float | int]]:
        """By class: images, recall (its accuracy) and precision, percent; 0 of 0 is 0."""
        rows = self.confusion.sum(dim=1).tolist()
        columns = self.confusion.sum(dim=0).tolist()
        right = self.confusion.diagonal().tolist()
        return [
            {
                "images": n,
                "recall": 100 * r / n if n else 0.0,
                "precision": 100 * r / taken if taken else 0.0,
            }
            for n, taken, r in zip(rows, columns, right, strict=True)
        ]


class AccuracyMeter:
    """Counts of this process; `total` adds those of all.

    Args:
        num_classes: C, outputs of the classifier.
        device: where the counts are kept, so that no batch waits for the host; on the CPU if it
            has no float64.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        device = float64_home(device)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        # Images, right among five, with a logit that is not finite.
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in logits [B, C] and labels int64 [B]."""
        logits = to_float64(logits)
        labels = labels.to(logits.device)
        classes = logits.shape[1]
        fine = logits.isfinite().all(dim=1)
        own = logits.gather(1, labels.unsqueeze(1))
        earlier = torch.arange(classes, device=labels.device) < labels.unsqueeze(1)
        before = (logits > own) | ((logits == own) & earlier)
        rank = before.sum(dim=1)
        # The first of the highest; argmax leaves open which of equals it takes.
        highest = logits == logits.amax(dim=1, keepdim=True)
        taken = highest.int().argmax(dim=1)
        # What is not finite is no answer: any class but the right one.
        taken = torch.where(fine, taken, (labels + 1) % classes)
        cells = torch.bincount(labels * classes + taken, minlength=classes * classes)
        self.confusion += cells.reshape(classes, classes)
        right = ((rank < TOP) & fine).sum()
        images = torch.full_like(right, len(labels))
        self.counts += torch.stack([images, right, (~fine).sum()])
        self.loss += F.cross_entropy(logits, labels, reduction="sum")

    def total(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> Accuracy:
        """The counts of all processes. A collective."""
        images, top5, broken = sum_over_ranks(self.counts).tolist()
        loss = float(sum_over_ranks(self.loss))
        confusion = sum_over_ranks(self.confusion).cpu()
        return Accuracy(confusion, top5, loss / max(images, 1), images, broken)


# What a run writes of itself, and what an evaluation (--eval) writes beside it.
RUN_FILES = ("result.json", "confusion.csv", "per_class.csv")
EVAL_FILES = ("result-eval.json", "confusion-eval.csv", "per_class-eval.csv")


def save_accuracy(
    folder: Path,
    result: Accuracy,
    classes: Sequence[str],
    more: dict[str, object],
    names: Sequence[str] = RUN_FILES,
) -> None:
    """Write the result, the confusion and the accuracy by class into a folder.

    Args:
        classes: names, by label; fewer than the outputs of the head where that has spare ones.
        more: what else the result is to say: checkpoint, data set ...
        names: of the three files.
    """
    numbers, confusion, per_class = (folder / name for name in names)
    spare = (f"class {i}" for i in range(len(classes), len(result.confusion)))
    labels = [*classes, *spare]
    write_text(numbers, json.dumps({**result.summary(), **more}, indent=1) + "\n")
    counts = [[name, *row] for name, row in zip(labels, result.confusion.tolist(), strict=True)]
    write_table(confusion, [["true \\ taken for", *labels], *counts])
    rows = [
        # Of a class without images there is no recall, which 0 would not say.
        [
            name,
            row["images"],
            f"{row['recall']:.4f}" if row["images"] else "",
            f"{row['precision']:.4f}",
        ]
        for name, row in zip(labels, result.per_class(), strict=True)
    ]
    write_table(per_class, [["class", "images", "recall", "precision"], *rows])


def write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV file, whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())
