"""`main_segment.py --dry_run`: what the run would do and cost."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

import models_zoo
from build_segment import POOL, PUBLISHED, TASK, build_optimizer, new_model, open_set, peak_lr
from engine_segment import PixelLoss
from util.data.splits import read_hold_out
from util.dry_run.cost import COUNTED, count_step
from util.dry_run.training import (
    DryRun,
    PlannedData,
    estimate_rate,
    look_at_data,
    measure_rate,
    parameters_by_part,
    start_of_plan,
)
from util.errors import BadInput
from util.progress import say
from util.train.advice import need_two, warn_of_shards, warn_of_start
from util.train.dist import choose_device
from util.train.step import OptimizerStep


def plan_run(args: argparse.Namespace, count: int, warnings: Sequence[str] = ()) -> DryRun:
    """What the run would do and cost on `count` processes, see `util.dry_run.training`."""
    if args.eval or args.predict:
        raise BadInput("--dry_run plans a training; --eval and --predict have no plan")
    need_two(args.batch_size * count, POOL)
    everything = argparse.Namespace(**vars(args) | {"train_images": None})
    data = look_at_data(
        args.dataset,
        args.data_path,
        args.dry_run_images,
        lambda: open_set(everything, "train"),
        read_hold_out(vars(args)),
        args.train_images,
    )
    model, start = planned_model(args, data)
    arguments = model.arguments
    (h, w), (ph, pw) = arguments["img_size"], model.patch_size
    global_batch = args.batch_size * count * args.accum_iter
    rate, rate_note = estimate_rate(
        args.images_per_second,
        (lambda: rate_here(args, arguments)) if args.dry_run_measure else None,
        count,
    )
    return DryRun(
        task=TASK,
        what=f"UPerNet on {args.model or 'the encoder'} {start}, crops of {model.in_chans} x {h} x "
        f"{w}, patches {ph} x {pw}, {model.num_classes} classes",
        data=data,
        dataset=args.dataset,
        batch_size=args.batch_size,
        processes=count,
        accum_iter=args.accum_iter,
        epochs=0,
        warmup_epochs=0,
        iterations=args.iterations,
        warmup_iterations=args.warmup_iterations,
        lr=peak_lr(args, global_batch),
        min_lr=args.min_lr,
        decay="linear",
        published=PUBLISHED,
        warnings=[
            *warn_of_start(args.finetune, "full", args.layer_decay),
            *warnings,
            *warn_of_shards(args.shard, count),
        ],
        parameters=parameters_by_part(model),
        count_cost=partial(
            count_step,
            model,
            partial(drawn_loss, size=(h, w), loss=PixelLoss(args.aux_weight, args.loss_mean)),
            batch_size=args.batch_size,
            precision=args.precision,
            grad_checkpointing=args.grad_checkpointing,
        ),
        counted=f"{COUNTED}, both passes; evaluation is not counted",
        precision=args.precision,
        grad_checkpointing=args.grad_checkpointing,
        optimizer="adamw",
        averages=False,
        image_values=model.in_chans * h * w,
        save_every=args.save_every,
        keep=args.keep,
        output_dir=args.output_dir,
        images_per_second=rate,
        rate_note=rate_note,
    )


def planned_model(args: argparse.Namespace, data: PlannedData) -> tuple[Any, str]:
    """The model of a plan, and where it starts; see `start_of_plan`."""
    there, start = start_of_plan(args.finetune, args.model)
    num_classes = args.nb_classes or data.classes
    if there:
        model, lines = new_model(args, num_classes)
        for line in lines:
            say(line)
        return model, start
    args = argparse.Namespace(
        **vars(args) | {"finetune": None, "num_heads": None, "weights_key": None}
    )
    with torch.device("meta"):  # no memory and no time, whatever the size
        return new_model(args, num_classes)[0], start


def drawn_loss(model: Any, batch_size: int, size: tuple[int, int], loss: PixelLoss) -> torch.Tensor:
    """The loss of so many drawn crops (height, width), as a training step computes it."""
    label = torch.zeros(batch_size, *size, dtype=torch.uint8)
    output = model(torch.rand(batch_size, model.in_chans, *size))
    return loss(output, label, loss.pixels(label))


def rate_here(args: argparse.Namespace, arguments: dict[str, Any]) -> float:
    """Images/s of this process on drawn images: forward, backward, update; no loading."""
    device = choose_device(args.device, 0)
    need_two(args.batch_size, POOL)  # the other processes are not there
    model = models_zoo.segmenter_from(arguments)
    model.to(device).train()
    model.set_grad_checkpointing(args.grad_checkpointing)
    (h, w), B = arguments["img_size"], args.batch_size
    images = torch.randn(B, model.in_chans, h, w, device=device)
    label = torch.zeros(B, h, w, dtype=torch.uint8, device=device)
    loss = PixelLoss(args.aux_weight, args.loss_mean)
    pixels = loss.pixels(label).to(device)
    optimizer = build_optimizer(args, model, 0.0)
    step = OptimizerStep(model, optimizer, device=device, precision=args.precision)
    return measure_rate(
        lambda: step(lambda x: loss(model(x), label, pixels), [images], 0.0),
        B,
        args.dry_run_measure,
        device,
    )
