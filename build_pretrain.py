"""What a pretraining is made of, from its flags: data, model, optimiser."""

import argparse
from typing import Any

from torch.optim import AdamW

import models_zoo
from engine_pretrain import Masker
from util.data.datasets import build_dataset
from util.data.randomness import EvalSampler, evenly
from util.data.samples import Drawn, Samples, build_loader
from util.data.source import Source, Subset
from util.data.splits import read_hold_out
from util.data.transforms import normalize, pretrain_transform
from util.progress import say
from util.train.advice import Published
from util.train.dist import Processes
from util.train.memory import create_in_memory
from util.train.optim import create_adamw, parameter_groups
from util.train.schedule import scaled_lr

TASK = "pretrain"


def open_set(
    args: argparse.Namespace, split: str, channels: int | None, decoder: str = "pil"
) -> Source:
    """A split of the data set that the flags name, or as much of train as they ask for."""
    source = build_dataset(
        args.dataset,
        split,
        args.data_path,
        channels=channels,
        mean=args.mean,
        std=args.std,
        max_pixels=args.max_pixels,
        hold_out=read_hold_out(vars(args)),
    ).with_decoder(decoder)
    limit = args.train_images if split == "train" else None
    return source if limit is None else Subset(source, evenly(len(source), limit))


def build_model(
    args: argparse.Namespace, in_chans: int
) -> tuple[models_zoo.PretrainModel, dict[str, Any]]:
    """The model that the flags describe, and its arguments in plain types for the checkpoint."""
    kind, _ = models_zoo.find_class(args.model, None)
    arguments = models_zoo.model_arguments(args.model) | {"in_chans": in_chans}
    arguments |= kind.from_args(vars(args))
    if args.input_size is not None:
        arguments["img_size"] = args.input_size
    arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    model = create_in_memory(lambda: models_zoo.create_model(args.model, **arguments))
    return model, arguments


def build_samples(
    args: argparse.Namespace,
    source: Source,
    model: models_zoo.PretrainModel,
    masker: Masker,
) -> Samples:
    """Augmented training images with the noise of their masks and what the model draws."""
    transform = pretrain_transform(
        args.augment,
        args.decode,
        model.input.image_size,
        tuple(args.crop_scale),
        flip=not args.no_flip,
        channels=source.channels,
        margin=source.eval_margin,
        interpolation=args.interpolation,
    )
    drawn = Drawn(masker.strategy, masker.cells.grid, model.draws)
    return Samples(source, transform, args.seed, drawn)


def fit_model(
    args: argparse.Namespace,
    model: models_zoo.PretrainModel,
    source: Source,
    samples: Samples,
    workers: int,
    procs: Processes,
) -> None:
    """Fit what the model does not train by gradients, on views of evenly spaced training images.

    The same on every process, and a function of the flags: the views are those of epoch 0.
    """
    wanted = model.fit_images(vars(args))
    if not wanted:
        return
    indices = evenly(len(source), wanted)
    sampler = EvalSampler(indices, args.batch_size, world_size=procs.world_size, rank=procs.rank)
    loader = build_loader(samples, sampler, num_workers=workers, pin_memory=False)
    batches = (
        (normalize(b["x"], source.mean, source.std), {name: b[name] for name in model.draws})
        for b in loader
    )
    text = model.fit(batches, len(indices), vars(args), procs.sum)
    if procs.main:
        say(text)


def peak_lr(args: argparse.Namespace, model: Any, num_visible: int, global_batch: int) -> float:
    """The learning rate after the warm-up."""
    if args.lr is not None:
        return args.lr
    return model.adjust_lr(scaled_lr(args.blr, global_batch, args.lr_batch), num_visible)


def published_for(model: models_zoo.PretrainModel) -> Published:
    """The recipe that a run is held to, for what is warned of."""
    blr, batch = model.published
    return Published(blr, batch)


def build_optimizer(args: argparse.Namespace, model: models_zoo.PretrainModel, lr: float) -> AdamW:
    """AdamW; biases and norms do not decay."""
    groups = parameter_groups(model, args.weight_decay)
    return create_adamw(groups, lr, betas=(args.betas[0], args.betas[1]))
