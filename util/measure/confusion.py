"""Segmentation measured exactly: counts of pixels by true and predicted class."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = 255


@dataclass(frozen=True)
class Segmentation:
    """How well maps of classes agree with their labels, over a whole set.

    Attributes:
        miou: mean of the classes' intersection over union, percent; a class without a pixel in
            labels and predictions alike is left out, one that is only predicted counts as 0.
        pixel_accuracy: pixels of the right class, percent.
        class_accuracy: mean over the classes in the labels of their pixels' accuracy, percent.
        pixels: how many were counted; ignored: how many were not.
        classes: for each class iou and accuracy, percent, and the pixels of its label and of its
            predictions; None where that is 0 of 0.

    The three are NaN where nothing was counted. Definitions as in mmsegmentation's `IoUMetric`.
    """

    miou: float
    pixel_accuracy: float
    class_accuracy: float
    pixels: int
    ignored: int
    classes: list[dict[str, float | int | None]]

    def summary(self) -> dict[str, float | int]:
        """The four numbers of the whole set."""
        return {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "class_accuracy": self.class_accuracy,
            "pixels": self.pixels,
        }

    def table(self, names: Sequence[str]) -> str:
        """The classes as lines of text: name, IoU, accuracy, pixels.

        Args:
            names: of the classes, in order.
        """
        wide = max(5, *(len(name) for name in names))
        lines = [f"{'class':<{wide}}     IoU     Acc       pixels"]
        for name, row in zip(names, self.classes, strict=True):
            iou, accuracy = (
                "-" if row[key] is None else f"{row[key]:.2f}" for key in ("iou", "accuracy")
            )
            lines.append(f"{name:<{wide}}  {iou:>6}  {accuracy:>6}  {row['pixels']:>11}")
        return "\n".join(lines)


class ConfusionMeter:
    """Counts pixels by true and predicted class; integers, so that sums are exact in any order.

    Args:
        num_classes: K, classes 0 to K - 1.
        ignore: label of the pixels that do not count, whatever is predicted there.
        device: where the counts are kept.

    Attributes:
        matrix: int64 [K, K], pixels of class (row) taken for class (column).
    """

    def __init__(
        self, num_classes: int, ignore: int = IGNORE, device: torch.device | str = "cpu"
    ) -> None:
        if num_classes < 1 or 0 <= ignore < num_classes:
            raise ValueError(
                f"{num_classes} classes with the label {ignore} ignored: there must be a class, "
                "and the ignored label must be none"
            )
        self.num_classes, self.ignore = num_classes, ignore
        # The cells of the matrix, then pixels that are ignored, and those that are no class.
        self._counts = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=device)

    @property
    def matrix(self) -> Tensor:
        """A copy of the counts, int64 [K, K]."""
        return self._counts[:-2].reshape(self.num_classes, self.num_classes).clone()

    def update(self, pred: Tensor, label: Tensor) -> None:
        """Count some pixels.

        Args:
            pred: classes, any integer dtype and shape; ignored pixels may hold anything.
            label: the same shape; classes, or `ignore`.

        Raises:
            ValueError: shapes that differ, or values that are no integers.
        """
        if pred.shape != label.shape:
            raise ValueError(
                f"predictions {tuple(pred.shape)} and labels {tuple(label.shape)} differ in shape"
            )
        if any(x.is_floating_point() or x.is_complex() for x in (pred, label)):
            raise ValueError(f"expected classes as integers, not {pred.dtype} and {label.dtype}")
        K, device = self.num_classes, self._counts.device
        pred, label = pred.to(device, torch.int64), label.to(device, torch.int64)
        known = (pred >= 0) & (pred < K) & (label >= 0) & (label < K)
        cells = torch.where(known, label * K + pred, K * K + 1)
        cells = torch.where(label == self.ignore, K * K, cells)
        self._counts += torch.bincount(cells.flatten(), minlength=K * K + 2)

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Take over the sum of all processes' counts; once, after the last update. A collective."""
        self._counts = sum_over_ranks(self._counts).to(self._counts.device)

    def result(self) -> Segmentation:
        """What the counts say.

        Raises:
            ValueError: some pixels were no class, in a label that is not ignored or a prediction.
        """
        ignored, wrong = self._counts[-2:].tolist()
        if wrong:
            raise ValueError(
                f"{wrong} pixels have a label or a prediction that is none of the "
                f"{self.num_classes} classes, nor the ignored {self.ignore}"
            )
        matrix = self.matrix.cpu()
        right = matrix.diagonal().tolist()
        labelled, taken = matrix.sum(dim=1).tolist(), matrix.sum(dim=0).tolist()
        rows: list[dict[str, float | int | None]] = []
        for r, n, m in zip(right, labelled, taken, strict=True):
            union = n + m - r
            rows.append(
                {
                    "iou": 100 * r / union if union else None,
                    "accuracy": 100 * r / n if n else None,
                    "pixels": n,
                    "predicted": m,
                }
            )
        total = sum(labelled)
        return Segmentation(
            miou=_mean([row["iou"] for row in rows]),
            pixel_accuracy=100 * sum(right) / total if total else math.nan,
            class_accuracy=_mean([row["accuracy"] for row in rows]),
            pixels=total,
            ignored=ignored,
            classes=rows,
        )


def _mean(values: Sequence[float | int | None]) -> float:
    """The mean of those that there are; NaN of none."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else math.nan
