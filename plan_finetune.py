"""`main_finetune.py --dry_run`: what the run would do and cost."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from build_finetune import (
    TASK,
    build_optimizer,
    check_batch,
    describe_loading,
    new_model,
    open_set,
    published_for,
)
from engine_finetune import BatchAugmentation
from util.config.flags import read_course
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
from util.progress import say
from util.train.advice import warn_of_shards, warn_of_start
from util.train.dist import choose_device
from util.train.schedule import scaled_lr
from util.train.step import OptimizerStep
from util.weights.files import load_state


def plan_run(args: argparse.Namespace, count: int, warnings: Sequence[str] = ()) -> DryRun:
    """What the run would do and cost on `count` processes, see `util.dry_run.training`."""
    check_batch(args, count)
    everything = argparse.Namespace(**vars(args) | {"train_images": None})
    data = look_at_data(
        args.dataset,
        args.data_path,
        args.dry_run_images,
        lambda: open_set(everything, "train", args.in_chans),
        read_hold_out(vars(args)),
        args.train_images,
    )
    model, arguments, start = planned_model(args, data)
    tuned = model.freeze_to(args.tune)
    h, w = model.img_size
    # Not every encoder has patches of one size.
    patch_size = getattr(model, "patch_size", None)
    patches = "" if patch_size is None else f", patches {patch_size[0]} x {patch_size[1]}"
    global_batch = args.batch_size * count * args.accum_iter
    rate, rate_note = estimate_rate(
        args.images_per_second,
        (lambda: rate_here(args, type(model), arguments)) if args.dry_run_measure else None,
        count,
    )
    course = read_course(args)
    lr = scaled_lr(args.blr, global_batch, args.lr_batch) if args.lr is None else args.lr
    warnings = [
        *warn_of_start(args.finetune, args.tune, args.layer_decay),
        *warnings,
        *warn_of_shards(args.shard, count),
    ]
    return DryRun(
        task=TASK,
        what=f"{args.model or 'the model'} {start}, tune {args.tune} ({len(tuned)} tensors), "
        f"{model.in_chans} x {h} x {w}{patches}, {model.num_classes} classes",
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
        published=published_for(args),
        warnings=warnings,
        parameters=parameters_by_part(model),
        count_cost=partial(
            count_step,
            model,
            drawn_loss,
            batch_size=args.batch_size,
            precision=args.precision,
            grad_checkpointing=args.grad_checkpointing,
        ),
        counted=f"{COUNTED}; backward of what learns and of what is after it; evaluation is not "
        "counted",
        precision=args.precision,
        grad_checkpointing=args.grad_checkpointing,
        optimizer="lars" if args.tune == "linear" else "adamw",
        averages=args.ema_decay is not None,
        image_values=model.in_chans * h * w,
        save_every=args.save_every,
        keep=args.keep,
        output_dir=args.output_dir,
        images_per_second=rate,
        rate_note=rate_note,
    )


def planned_model(args: argparse.Namespace, data: PlannedData) -> tuple[Any, dict[str, Any], str]:
    """The model of a plan, its arguments, and where it starts; see `start_of_plan`."""
    num_classes = args.nb_classes or data.classes
    there, start = start_of_plan(args.finetune, args.model)
    if there:
        origin = load_state(args.finetune, args.weights_key)
        model, arguments = new_model(args, origin, data.channels, num_classes)
        for line in describe_loading(args, origin, args.finetune):
            say(line)
        return model, arguments, start
    depth = args.probe_block
    unread = {"finetune": None, "num_heads": None, "weights_key": None, "probe_block": None}
    args = argparse.Namespace(**vars(args) | unread)
    with torch.device("meta"):  # no memory and no time, whatever the size
        channels = args.in_chans or data.channels
        model, arguments = new_model(args, None, channels, num_classes, depth)
    return model, arguments, start


def drawn_loss(model: Any, batch_size: int) -> torch.Tensor:
    """The loss of so many drawn images, as a training step computes it."""
    images = torch.rand(batch_size, model.in_chans, *model.img_size)
    return BatchAugmentation().loss(model(images), torch.zeros(batch_size, dtype=torch.long))


def rate_here(args: argparse.Namespace, kind: type[Any], arguments: dict[str, Any]) -> float:
    """Images/s of this process on drawn images: forward, backward, update; no loading."""
    device = choose_device(args.device, 0)
    check_batch(args, 1)  # the other processes are not there
    model = kind(**arguments)
    model.freeze_to(args.tune)
    model.to(device).train()
    model.set_grad_checkpointing(args.grad_checkpointing)
    images = torch.randn(args.batch_size, model.in_chans, *model.img_size, device=device)
    labels = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    optimizer = build_optimizer(args, model, 0.0)
    step = OptimizerStep(model, optimizer, device=device, precision=args.precision)
    augmentation = BatchAugmentation()
    return measure_rate(
        lambda: step(lambda x: augmentation.loss(model(x), labels), [images], 0.0),
        args.batch_size,
        args.dry_run_measure,
        device,
    )
