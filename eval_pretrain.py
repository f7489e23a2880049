"""What a pretraining shows of itself: measurements and pictures of held-out images."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models_zoo
from build_pretrain import open_set
from engine_pretrain import OWN, Masker, build_masker, evaluate, flat, format_table, reconstruct
from util.data.loading import say_conversions
from util.data.randomness import EvalSampler, evenly
from util.data.samples import Drawn, Samples, build_loader
from util.data.source import Source
from util.data.transforms import EvalTransform
from util.errors import BadInput
from util.files import save_png
from util.mask.strategies import STANDARD
from util.measure.visualize import panels, picture_grid
from util.progress import say, say_once
from util.train.dist import Processes
from util.train.logger import RunLogger

# Held-out images are measured under masks that no flag changes (STANDARD), so that runs compare;
# and under the run's own where these are others. Pictures show the run's own.
EVAL_SEED, PICTURES = 0, 8
FOLDER = "pictures"


@dataclass(frozen=True)
class HeldOut:
    """The images to measure or to show on, and their masks."""

    source: Source
    samples: Samples
    sampler: EvalSampler
    loader: Iterable[dict[str, Any]]
    masker: Masker


def held_out_source(args: argparse.Namespace, train: Source) -> Source | None:
    """The held-out split; None where it is not asked for.

    Pictures alone fall back to the training images where nothing is held out.
    """
    if not (args.eval_every or args.picture_every):
        return None
    try:
        return open_set(args, "val", train.channels)
    except BadInput as error:
        if args.eval_every:
            raise
        say_once(f"pictures show training images: {error}")
        return train


def held_out_parts(
    args: argparse.Namespace,
    source: Source | None,
    model: models_zoo.PretrainModel,
    masker: Masker,
    procs: Processes,
) -> list[HeldOut]:
    """Under the standard masks, and under the run's own where these are others; [] of no source."""
    if source is None:
        return []
    standard = build_masker(STANDARD, model)
    maskers = [standard, masker] if masker.differs_from(standard) else [standard]
    size = args.eval_images, args.batch_size, procs
    return [held_out_set(source, model, m, *size) for m in maskers]


def held_out_set(
    source: Source,
    model: models_zoo.PretrainModel,
    masker: Masker,
    limit: int,
    batch_size: int,
    procs: Processes,
) -> HeldOut:
    """At most `limit` held-out images under these masks, dealt out to the processes."""
    transform = EvalTransform(model.input.image_size, margin=source.eval_margin)
    samples = Samples(source, transform, EVAL_SEED, Drawn(masker.strategy, masker.cells.grid))
    sampler = EvalSampler(
        evenly(len(source), limit), batch_size, world_size=procs.world_size, rank=procs.rank
    )
    loader = build_loader(samples, sampler, num_workers=0, pin_memory=False)
    return HeldOut(source, samples, sampler, loader, masker)


def measure(
    model: Any, parts: Sequence[HeldOut], logger: RunLogger, step: int, epoch: int, procs: Processes
) -> None:
    """Measure on all processes, for the log and the reader."""
    tables = [
        evaluate(
            model,
            part.loader,
            part.masker,
            mean=part.source.mean,
            std=part.source.std,
            device=procs.device,
            sum_over_ranks=procs.sum,
        )
        for part in parts
    ]
    for part in parts:
        say_conversions(part.loader, procs.gather)
    report(logger, parts, tables, step, epoch)


def report(
    logger: RunLogger,
    parts: Sequence[HeldOut],
    tables: Sequence[dict[str, dict[str, float]]],
    step: int,
    epoch: int,
) -> None:
    """A measurement, for the log and the reader.

    Args:
        parts: what was measured: under the standard masks, then under the run's own if others.
        tables: what came out, see `evaluate`.
    """
    values: dict[str, Any] = {}
    for prefix, part, table in zip(("", OWN), parts, tables, strict=False):
        values |= flat(table, prefix) | ({"own_mask": part.masker.words} if prefix else {})
    logger.record("eval", step, epoch=epoch, images=parts[0].sampler.total, **values)
    if logger.file is None:  # the main process tells the reader
        return
    for whose, part, table in zip(("", "the run's own "), parts, tables, strict=False):
        say(f"held-out reconstruction, {whose}{part.masker.words} masks, masked pixels only:")
        for line in format_table(table):
            say(f"  {line}")


def save_picture(
    model: Any,
    held_out: HeldOut,
    logger: RunLogger,
    folder: Path,
    title: str,
    step: int,
    epoch: int,
    device: torch.device,
) -> None:
    """The picture of an epoch, in the run's folder and its log."""
    picture = draw_pictures(model, held_out, device, title)
    save_png(folder / FOLDER / f"epoch-{epoch}.png", picture)
    logger.picture("reconstruction", step, np.asarray(picture))


def draw_pictures(model: Any, held_out: HeldOut, device: torch.device, title: str) -> Any:
    """A grid of held-out images, masked and reconstructed."""
    source, masker = held_out.source, held_out.masker
    keys = next(iter(EvalSampler(evenly(len(source), PICTURES), PICTURES)))
    batch = [held_out.samples[key] for key in keys]
    images = torch.stack([sample["x"] for sample in batch]).to(device)
    mask = masker(images, torch.stack([sample["noise"] for sample in batch]).to(device))
    model.eval()
    picture = reconstruct(model, images, mask, masker, source.mean, source.std)
    return picture_grid(
        panels(images, mask, picture, masker.place_size),
        [Path(source.file_name(key.index)).name for key in keys],
        headers=("original", f"masked {masker.words}", "reconstruction"),
        title=title,
        footer=model.note,
    )


def last_picture(folder: Path) -> Path | None:
    """The picture of a run that was written last, if it can be seen."""
    try:
        found = (folder / FOLDER).glob("epoch-*.png")
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    except OSError:
        return None
