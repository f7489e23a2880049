"""`main_pretrain.py --dry_run`: what the run would do and cost."""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from build_pretrain import (
    TASK,
    build_model,
    build_optimizer,
    open_set,
    peak_lr,
    published_for,
)
from engine_pretrain import build_masker
from util.config.flags import read_course
from util.data.samples import Drawn
from util.data.splits import read_hold_out
from util.dry_run.cost import COUNTED, count_step
from util.dry_run.training import (
    DryRun,
    estimate_rate,
    look_at_data,
    measure_rate,
    parameters_by_part,
)
from util.train.advice import warn_of_shards
from util.train.dist import choose_device
from util.train.step import OptimizerStep


def plan_run(args: argparse.Namespace, count: int, warnings: Sequence[str] = ()) -> DryRun:
    """What the run would do and cost on `count` processes, see `util.dry_run.training`."""
    everything = argparse.Namespace(**vars(args) | {"train_images": None})
    data = look_at_data(
        args.dataset,
        args.data_path,
        args.dry_run_images,
        lambda: open_set(everything, "train", args.in_chans),
        read_hold_out(vars(args)),
        args.train_images,
    )
    with torch.device("meta"):  # no memory and no time, whatever the size
        model, _ = build_model(args, args.in_chans or data.channels)
    masker = build_masker(vars(args), model)
    Drawn(masker.strategy, masker.cells.grid, model.draws)  # names that the run would refuse
    course, global_batch = read_course(args), args.batch_size * count * args.accum_iter
    lr = peak_lr(args, model, masker.num_visible, global_batch)
    rate, rate_note = estimate_rate(
        args.images_per_second,
        (lambda: rate_here(args, data.channels)) if args.dry_run_measure else None,
        count,
    )
    return DryRun(
        task=TASK,
        what=f"{args.model} ({args.method}), {model.input}, "
        f"{model.describe(masker.num_visible)}; masks {masker.words}",
        data=data,
        dataset=args.dataset,
        batch_size=args.batch_size,
        processes=count,
        accum_iter=args.accum_iter,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        lr=lr,
        min_lr=course.end(lr, args.min_lr, global_batch),
        decay=str(course),
        lr_batch=course.lr_batch,
        published=published_for(model),
        warnings=[*warnings, *warn_of_shards(args.shard, count)],
        parameters=parameters_by_part(model),
        count_cost=partial(
            count_step,
            model,
            partial(drawn_loss, num_visible=masker.num_visible),
            batch_size=args.batch_size,
            precision=args.precision,
            grad_checkpointing=args.grad_checkpointing,
        ),
        counted=f"{COUNTED}, both passes",
        precision=args.precision,
        grad_checkpointing=args.grad_checkpointing,
        optimizer="adamw",
        averages=False,
        image_values=model.input.values,
        save_every=args.save_every,
        keep=args.keep,
        output_dir=args.output_dir,
        images_per_second=rate,
        rate_note=rate_note,
    )


def drawn_loss(model: Any, batch_size: int, num_visible: int) -> torch.Tensor:
    """The loss of so many drawn images, as a training step computes it."""
    return step_on_drawn(model, batch_size, num_visible, torch.device("cpu"))()


def step_on_drawn(
    model: Any, batch_size: int, num_visible: int, device: torch.device
) -> Callable[[], torch.Tensor]:
    """A function that computes the loss of drawn images under drawn masks, always the same."""
    images = torch.rand(batch_size, *model.input.shape, device=device)
    places = torch.rand(batch_size, math.prod(model.mask_grid), device=device)
    mask = places.argsort(dim=1) >= num_visible
    drawn = {
        name: torch.rand(batch_size, *shape, device=device) - 0.5
        for name, shape in model.draws.items()
    }
    return lambda: model(images, mask, num_visible, **drawn)["loss"]


def rate_here(args: argparse.Namespace, channels: int) -> float:
    """Images/s of this process on drawn images: forward, backward, update; no loading."""
    device = choose_device(args.device, 0)
    model, _ = build_model(args, args.in_chans or channels)
    model.to(device).set_grad_checkpointing(args.grad_checkpointing)
    loss = step_on_drawn(
        model, args.batch_size, build_masker(vars(args), model).num_visible, device
    )
    optimizer = build_optimizer(args, model, 0.0)
    step = OptimizerStep(model, optimizer, device=device, precision=args.precision)
    return measure_rate(
        lambda: step(lambda _: loss(), [None], 0.0), args.batch_size, args.dry_run_measure, device
    )
