"""What a kNN measurement is made of, from its flags: labelled sets, an encoder, what is said."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import models_zoo
from util.config.knn_flags import RESULT
from util.config.weights_flags import encoder_options
from util.console import counted
from util.data.class_names import check_splits
from util.data.datasets import SPLITS, build_dataset
from util.data.randomness import evenly
from util.data.replace import find_fault
from util.data.source import Source, Subset
from util.data.splits import read_hold_out
from util.errors import BadInput
from util.progress import say
from util.weights.assumed import set_statistics
from util.weights.load_table import describe_reading

# Images whose labels no file lists are few and quickly drawn: up to so many are read beforehand.
FEW = 4096
NAMED = 10  # broken images that are named on the screen; the result names all


def open_sets(args: argparse.Namespace) -> tuple[dict[str, Source], str | None]:
    """The splits, and why there can be no vote; None: there can.

    Features alone need no labels and no second split: with --save_features those of what is there
    are of use.

    Raises:
        BadInput: no split, or without --save_features a vote that cannot be.
    """
    sources: dict[str, Source] = {}
    absent: list[BadInput] = []
    limits = dict(zip(SPLITS, (args.train_images, args.val_images), strict=True))
    for split in SPLITS:
        try:
            source = build_dataset(
                args.dataset,
                split,
                args.data_path,
                max_pixels=args.max_pixels,
                hold_out=read_hold_out(vars(args)),
            )
        except BadInput as error:
            absent.append(error)
            continue
        limit = limits[split]
        sources[split] = source if limit is None else Subset(source, evenly(len(source), limit))
    try:
        if absent:
            raise absent[0]
        check_labels(sources)
    except BadInput as error:
        if not sources:
            raise
        if not args.save_features:
            raise BadInput(f"{error}; or take the features alone with --save_features") from error
        return sources, str(error)
    return sources, None


def check_labels(sources: dict[str, Source]) -> None:
    """See that both splits have labels, and the same classes, before hours of features.

    Raises:
        BadInput: they do not.
    """
    train, val = (sources[split] for split in SPLITS)
    known = [list_labels(source) for source in (train, val)]
    for source, labels in zip((train, val), known, strict=True):
        if not source.labelled or (labels is not None and labels.min() < 0):
            raise BadInput(
                f"{source.name} has no labels in {source.split}, and neighbours vote with theirs; "
                "choose another --dataset, or images in class folders"
            )
    check_splits(train.classes, val.classes, train.name)
    of_train, of_val = known
    if of_train is not None and of_val is not None and not np.isin(of_val, of_train).any():
        raise BadInput(
            f"no image in val of {val.name} is of a class that train has, so no neighbour can be "
            "right; choose another --dataset"
        )


def list_labels(source: Source) -> np.ndarray | None:
    """All labels of a set that lists them, or is small: int [N]. None: only its images say."""
    if hasattr(source, "labels"):
        return np.asarray(source.labels)
    if len(source) > FEW:
        return None
    return np.array([source[i][1] for i in range(len(source))])


def open_encoder(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The encoder of --checkpoint without its head, on the CPU, and what else the file holds.

    Raises:
        BadInput: no such file, or none of an encoder that the flags fit.
    """
    return models_zoo.load_encoder(
        args.checkpoint, weights_key=args.weights_key, **encoder_options(args)
    )


def describe_encoder(args: argparse.Namespace, state: Mapping[str, Any]) -> list[str]:
    """What was read of the encoder's file, and what was assumed: lines for the reader."""
    return describe_reading(state, args.checkpoint, set_statistics(args.mean))


# ---- What the reader is told -------------------------------------------------------------------


def say_other_statistics(state: Mapping[str, Any], source: Source) -> None:
    """Note that the images are normalised otherwise than those that the checkpoint learned from.

    Args:
        state: what the checkpoint holds. source: one of the sets; both have the same statistics.
    """
    stats = [tuple(state.get("data", {}).get(name, ())) for name in ("mean", "std")]
    if all(stats) and stats != [source.mean, source.std]:
        say(
            f"note: the checkpoint learned with --mean {numbers(stats[0])} --std "
            f"{numbers(stats[1])}; these images get {numbers(source.mean)} and "
            f"{numbers(source.std)}"
        )


def numbers(values: Sequence[float]) -> str:
    """As they would be given to a flag."""
    return " ".join(f"{value:.4g}" for value in values)


def report_broken(source: Source, broken: Sequence[int], *, votes: bool, speaks: bool) -> None:
    """Say which images of a split could not be decoded.

    Args:
        broken: their indices.
        votes: whether neighbours will vote; the result then names all of the training images.
        speaks: whether this process tells the reader.

    Raises:
        BadInput: some of those that are to be classified.
    """
    named = broken[:NAMED] if votes else broken
    names = [f"{source.file_name(i)}: {find_fault(source, i)}" for i in named]
    if broken and votes and source.split == "val":
        raise BadInput(
            f"{len(broken)} of {counted(len(source), 'image')} to classify cannot be decoded, and "
            f"an accuracy without them would be another; replace them: {'; '.join(names)}"
        )
    if broken and speaks:
        kind = "training" if source.split == "train" else source.split
        whole = counted(len(source), f"{kind} image")
        say(f"{len(broken)} of {whole} cannot be decoded, left out:")
        say("\n".join(f"  {name}" for name in names))
        if len(broken) > len(named):
            say(f"  and {len(broken) - len(named)} more, which the result will name")


def say_saved(folder: Path, splits: Sequence[str], *, votes: bool) -> None:
    """Say where the features are, and which files beside them are of an earlier start.

    Args:
        splits: whose features were written. votes: whether a result follows.
    """
    say(f"features    {folder}/features-*.npy, labels-*.npy, files-*.txt")
    others = [f"features-{split}.npy" for split in SPLITS if split not in splits]
    others += [] if votes else [RESULT]
    if stale := [name for name in others if (folder / name).exists()]:
        say(f"note: {', '.join(stale)} in {folder}: of an earlier start, of other images")
