"""Features of a data set by an encoder: each process computes its share, and files hold them all.

Every image is computed once, whatever the number of processes: none is padded in or left out.

Shape legend: B images of a batch, C channels, H x W pixels, N images of a split, D features.
"""

import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from util.console import visible_line
from util.data.loading import say_conversions
from util.data.randomness import EvalSampler
from util.data.samples import Samples, build_loader
from util.data.source import Source
from util.data.transforms import EvalTransform, normalize
from util.errors import BadInput, CannotWrite
from util.files import create_temporary, sync, sync_folder, write_text, writing
from util.measure.knn import Bank, unit
from util.progress import Progress
from util.train.dist import Processes


class FeatureFiles:
    """`features-{split}.npy` and `labels-{split}.npy`, into which each process writes its own rows.

    Written under temporary names, which `close` changes. Rows go by position and not through a
    memory map: maps of one page on two machines would overwrite each other's rows.

    Args:
        folder: takes the files.
        split: train | val.
        shape: (N, D) of the features.

    Raises:
        BadInput: the disk has no room or the folder is not writable.
        CannotWrite: later on.
    """

    def __init__(self, folder: Path, split: str, shape: tuple[int, int], procs: Processes) -> None:
        self.paths = [folder / f"{name}-{split}.npy" for name in ("features", "labels")]
        self.procs, self.row_bytes = procs, (4 * shape[1], 8)
        needed = shape[0] * sum(self.row_bytes)
        free = shutil.disk_usage(folder).free
        procs.barrier()  # all have asked before one takes the space
        if needed > free:
            raise BadInput(
                f"the features of {split} take {needed:,} bytes, and {folder} has {free:,}; choose "
                "another --output_dir, or leave --save_features out"
            )
        try:
            self.created: list[BinaryIO] = []  # open, and so locked: see `util.files.sweep`
            with procs.main_first():
                names = self._create(shape) if procs.main else []
            self.temporary = procs.gather(names)[0]
            self.offsets = [np.lib.format.open_memmap(path, "r").offset for path in self.temporary]
            self.files = [path.open("r+b", buffering=0) for path in self.temporary]
        except OSError as error:
            raise BadInput(f"cannot write {self.paths[0]}: {error.strerror}") from error

    def _create(self, shape: tuple[int, int]) -> list[Path]:
        """Files of the right size, zeros and labels -1; their temporary names."""
        names = []
        for path, dtype, size, fill in zip(
            self.paths, ("<f4", "<i8"), (shape, shape[:1]), (0, -1), strict=True
        ):
            file, temporary = create_temporary(path)
            self.created.append(file)
            names.append(temporary)
            rows = np.lib.format.open_memmap(temporary, "w+", np.dtype(dtype), size)
            if fill:
                rows[:] = fill
            rows.flush()
        return names

    def write(self, index: Tensor, features: Tensor, label: Tensor) -> None:
        """Rows of this process: int64 [B], float32 [B, D], int64 [B]."""
        rows = (features.numpy().astype("<f4"), label.numpy().astype("<i8"))
        for n, values in enumerate(rows):
            for i, row in zip(index.tolist(), values, strict=True):
                try:
                    place = self.offsets[n] + i * self.row_bytes[n]
                    written = os.pwrite(self.files[n].fileno(), row.tobytes(), place)
                except OSError as error:
                    raise CannotWrite(f"cannot write {self.paths[n]}: {error.strerror}") from error
                if written < self.row_bytes[n]:
                    raise CannotWrite(f"cannot write {self.paths[n]}: the disk is full")

    def close(self) -> None:
        """Give the files their names. A collective."""
        with writing(self.paths[0]):
            for file in self.files:
                sync(file.fileno())
                file.close()
            self.procs.barrier()
            if self.procs.main:
                for temporary, path in zip(self.temporary, self.paths, strict=True):
                    os.replace(temporary, path)
                sync_folder(self.paths[0].parent)
            for file in self.created:
                file.close()


def write_file_names(folder: Path, source: Source) -> None:
    """Write `files-{split}.txt`: the images of `FeatureFiles`, one a line, in the same order.

    Raises:
        CannotWrite: the disk is full, or the folder is gone.
    """
    lines = (visible_line(source.file_name(i)) for i in range(len(source)))
    write_text(folder / f"files-{source.split}.txt", "\n".join([*lines, ""]))


def feature_width(model: Any, kind: str) -> int:
    """Numbers in the features of one image; `kind` as in `extract_features`."""
    return model.num_features * (2 if kind == "both" else 1)


@torch.inference_mode()
def compute_features(model: Any, images: Tensor, kind: str, source: Source) -> Tensor:
    """uint8 [B, C, H, W], on the model's device, to float32 [B, D] or [B, 2D] on the CPU."""
    return model.features(normalize(images, source.mean, source.std), kind).float().cpu()


def empty_bank(count: int, width: int) -> Bank:
    """Room for the features of `count` images, D = `width`; the values are whatever was there."""
    number, label = (torch.empty(count, dtype=torch.int64) for _ in range(2))
    return Bank(torch.empty(count, width), number, label)


def extract_features(
    model: Any,
    source: Source,
    kind: str,
    procs: Processes,
    *,
    batch_size: int,
    files: FeatureFiles | None,
    labels_needed: bool,
    **loading: Any,
) -> tuple[Bank, list[int]]:
    """Features of this process's share of a split. A collective.

    Args:
        kind: cls | avg | both.
        batch_size: images per process.
        files: take the features as they are.
        labels_needed: whether images without a label are refused.
        loading: num_workers, pin_memory and prefetch_factor, as `build_loader` takes them.

    Returns:
        unit features of the images that could be decoded; the indices of those of all processes
        that could not.

    Raises:
        BadInput: features that are not finite, or images without a label; on every process alike.
    """
    transform = EvalTransform(model.img_size, margin=source.eval_margin)
    sampler = EvalSampler(
        range(len(source)), batch_size, world_size=procs.world_size, rank=procs.rank
    )
    loader = build_loader(Samples(source, transform, seed=0), sampler, **loading)
    bank = empty_bank(len(sampler.indices), feature_width(model, kind))
    done, bad, finite, labelled = 0, [], True, True
    name = f"features of {source.split}"
    with Progress(len(sampler), show=procs.main, unit="batch", where=lambda _: name) as bar:
        for batch in loader:
            images = batch["x"].to(procs.device, non_blocking=True)
            features = compute_features(model, images, kind, source)
            finite = finite and bool(features.isfinite().all())
            labelled = labelled and bool((batch["y"] >= 0).all())
            # What stands in for an image that cannot be decoded has had, or gets, its own turn.
            good = batch["bad"][:, 0] < 0
            bad += batch["index"][~good].tolist()
            features, index, label = (t[good] for t in (features, batch["index"], batch["y"]))
            if files is not None:
                # Of a set that is no set of classes, the numbers of its labels are nobody's.
                known = label if source.labelled else torch.full_like(label, -1)
                files.write(index, features, known)
            rows = slice(done, done + len(index))
            bank.features[rows], bank.number[rows], bank.label[rows] = unit(features), index, label
            done = rows.stop
            bar.update()
    say_conversions(loader, procs.gather)
    if not all(procs.gather(labelled or not labels_needed)):
        raise BadInput(f"{source.name} has images without a label in {source.split}")
    if not all(procs.gather(finite)):
        raise BadInput(f"the checkpoint's features of {source.split} are not finite (NaN, inf)")
    everyones = sorted(i for part in procs.gather(bad) for i in part)
    return Bank(*(tensor[:done] for tensor in bank)), everyones
