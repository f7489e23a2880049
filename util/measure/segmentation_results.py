"""What a segmentation run writes for people: its numbers, its tables, and pictures of its maps."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data.label_maps import IGNORE, overlay
from util.files import write_text
from util.measure.confusion import Segmentation
from util.measure.visualize import picture_grid

LONGEST_PANEL = 384  # pixels; what is larger is reduced in sheets, not in files of its own
NAMED_CLASSES = 6


# What a run writes of itself, and what an evaluation (--eval) writes beside it.
RUN_FILES = ("result.json", "per_class.txt")
EVAL_FILES = ("result-eval.json", "per_class-eval.txt", "pictures/eval.png")


def save_segmentation(
    folder: Path,
    result: Segmentation,
    classes: Sequence[str],
    more: dict[str, object],
    names: Sequence[str] = RUN_FILES,
) -> None:
    """Write the result (with the classes) and a table of the classes into a folder.

    Args:
        classes: names, by label.
        more: what else the result is to say: checkpoint, data set ...
        names: of the two files.
    """
    # JSON has no NaN, which a mean over nothing is.
    summary = {k: None if math.isnan(v) else v for k, v in result.summary().items()}
    rows = [{"class": n, **row} for n, row in zip(classes, result.classes, strict=True)]
    content = {**summary, "ignored": result.ignored, **more, "per_class": rows}
    write_text(folder / names[0], json.dumps(content, indent=1) + "\n")
    write_text(folder / names[1], result.table(classes) + "\n")


def sheet(
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    names: Sequence[str],
    classes: Sequence[str],
    colours: np.ndarray,
    title: str,
) -> Image.Image:
    """Image, labels and prediction beside each other; both laid over the image in colours.

    Args:
        images: uint8 [H, W, 3] each.
        labels, predictions: uint8 [H, W] each; predictions also where the label is ignored.
        names: of the images.
        classes, colours: names and uint8 [K, 3].
    """
    rows, captions = [], []
    for image, label, prediction, name in zip(images, labels, predictions, names, strict=True):
        pictures = (image, overlay(image, label, colours), overlay(image, prediction, colours))
        rows.append([panel(picture) for picture in pictures])
        counted = label != IGNORE
        right = (prediction == label)[counted].mean() if counted.any() else math.nan
        there = [classes[c] for c in np.unique(label[counted])]
        more = f" and {len(there) - NAMED_CLASSES} more" if len(there) > NAMED_CLASSES else ""
        listed = ", ".join(there[:NAMED_CLASSES]) + more
        captions.append(f"{Path(name).name}: {right:.1%} of pixels right; {listed}")
    footer = "Labels and predictions over the image, half and half; white: ignored."
    headers = ("image", "labels", "prediction")
    return picture_grid(rows, captions, headers=headers, title=title, footer=footer)


def panel(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] to [3, h, w], reduced to at most `LONGEST_PANEL`."""
    image = Image.fromarray(picture)
    image.thumbnail((LONGEST_PANEL, LONGEST_PANEL))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
