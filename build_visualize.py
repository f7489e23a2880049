"""What pictures of reconstructions are made of, from the flags: model, images, masks."""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import models_zoo
from engine_pretrain import Masker, build_masker
from util.config.weights_flags import autoencoder_options
from util.console import print_text
from util.data.datasets import build_dataset
from util.data.folders import image_files
from util.data.images import read_image
from util.data.randomness import evenly
from util.data.source import Source
from util.data.splits import read_hold_out
from util.data.transforms import EvalTransform
from util.errors import BadInput
from util.mask.strategies import STANDARD
from util.mask.strategies import mask_settings as all_mask_settings
from util.weights.load_table import describe_reading


def open_model(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model of --checkpoint with its decoder, on the CPU, and what else the file holds.

    Raises:
        BadInput: no such file, or none of a model that reconstructs.
    """
    return models_zoo.load_pretrained(
        args.checkpoint, weights_key=args.weights_key, **autoencoder_options(args)
    )


def say_reading(args: argparse.Namespace, state: Mapping[str, Any]) -> None:
    """Say what was read of the checkpoint, and what was assumed of its model."""
    for line in describe_reading(state, args.checkpoint, "ImageNet's mean and deviation"):
        print_text(line)


def open_set(args: argparse.Namespace, channels: int) -> Source:
    """The held-out images of the data set that the flags name."""
    return build_dataset(
        args.dataset,
        "val",
        args.data_path,
        channels=channels,
        max_pixels=args.max_pixels,
        hold_out=read_hold_out(vars(args)),
    )


def gather_images(args: argparse.Namespace, model: Any) -> tuple[list[str], list[Tensor]]:
    """Names and uint8 [C, H, W] images at the model's size.

    Raises:
        BadInput: not one place of images alone, none there, or of other channels than the model's.
    """
    if bool(args.images) == bool(args.dataset):
        raise BadInput("give either --images FILES, or --dataset NAME or --data_path DATA")
    if args.dataset:
        source = open_set(args, model.input.channels)
        transform = EvalTransform(model.input.image_size, margin=source.eval_margin)
        indices = evenly(len(source), args.num_images)
        return [source.file_name(i) for i in indices], [transform(source[i][0]) for i in indices]
    paths = [path for name in args.images for path in image_files(Path(name), "--images")]
    if model.input.channels not in (1, 3):
        raise BadInput(
            f"image files are gray or RGB, the model takes {model.input.channels} channels"
        )
    if len(paths) > args.num_images:
        print_text(f"{args.num_images} of {len(paths):,} images, evenly spaced (--num_images)")
    paths = [paths[i] for i in evenly(len(paths), args.num_images)]
    transform = EvalTransform(model.input.image_size, margin=False)  # show as much as fits
    read = partial(read_image, channels=model.input.channels, max_pixels=args.max_pixels)
    return [str(p) for p in paths], [transform(read(p)) for p in paths]


def mask_settings(
    args: argparse.Namespace, state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the flags say of the masks, and the checkpoint's run had; names as in `STANDARD`."""
    trained = state.get("arithmetic", {})  # weights of other programs have none
    names = all_mask_settings()
    own = {name: trained[name] for name in names if trained.get(name) is not None}
    given = {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}
    return given, STANDARD | own


def choose_maskers(
    args: argparse.Namespace, model: Any, state: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Masker]]:
    """The masks to measure under, and where nobody chose them the run's own as well.

    Returns:
        the settings of the first, with the names of `STANDARD`; one or two maskers.
    """
    given, own = mask_settings(args, state)
    settings = STANDARD | given
    maskers = [build_masker(settings, model)]
    if not given and build_masker(own, model).differs_from(maskers[0]):
        maskers.append(build_masker(own, model))
    return settings, maskers
