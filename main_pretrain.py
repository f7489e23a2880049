"""Pretrain a masked autoencoder: M-MAE by default, MAE with --method mae.

One process on a CPU or GPU:  python main_pretrain.py --data_path IMAGENET ...
Several:                      torchrun --nproc_per_node 8 main_pretrain.py ...
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_signals

    take_signals()

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models_zoo
from engine_pretrain import (
    OWN,
    Masker,
    PretrainLoss,
    evaluate,
    flat,
    lines_of,
    masker_of,
    reconstruct,
)
from engine_train import train_steps
from util.config.flag_parser import early_values, load_plugins
from util.config.flags import (
    FlagParser,
    add_checkpoint_flags,
    add_data_flags,
    add_dry_run_flags,
    add_optimisation_flags,
    add_run_flags,
    add_shard_flag,
    add_split_flags,
    add_view_flags,
    compiles,
    number,
)
from util.config.method_flags import (
    add_mask_flags,
    add_method_flag,
)
from util.config.session_flags import session_settings
from util.console import counted, print_text
from util.data.datasets import DATASETS, build_dataset
from util.data.images import ImageSource, Subset
from util.data.loading import say_conversions
from util.data.randomness import EvalSampler, evenly
from util.data.samples import PretrainSamples, build_loader
from util.data.splits import hold_out_of
from util.data.transforms import EvalTransform, normalize, pretrain_transform
from util.dry_run.cost import COUNTED, count_step
from util.dry_run.report import describe
from util.dry_run.training import (
    DryRun,
    limited,
    look_at_data,
    measure_rate,
    parameters_by_part,
    processes_of,
    rate_of,
)
from util.errors import BadInput, command, needs
from util.files import save_png
from util.flag_types import MOST_CHANNELS
from util.mask.strategies import STANDARD
from util.measure.visualize import panels, picture_grid
from util.progress import say, say_once
from util.train.advice import (
    Published,
    check_settings,
    warn_of_flags,
    warn_of_shards,
)
from util.train.dist import Processes, choose_device, processes
from util.train.lease import Lease, hold_folder
from util.train.logger import RunLogger
from util.train.memory import create_in_memory
from util.train.optim import create_adamw, parameter_groups
from util.train.run import due
from util.train.schedule import scaled_lr
from util.train.session import Session, Start
from util.train.step import OptimizerStep

TASK = "pretrain"
# Held-out images are measured under masks that no flag changes (STANDARD), so that runs compare;
# and under the run's own where these are others. Pictures show the run's own.
EVAL_SEED, PICTURES = 0, 8
# MAE's recipe, for what is warned of.
PUBLISHED = Published(1.5e-4, 4096)
# Beside those of every main: what is only looked at.
HOUSEKEEPING = {"eval_images", "picture_every"}


def build_parser(argv: Sequence[str] = ()) -> FlagParser:
    """The flags; MAE's keep their names and meaning.

    Args:
        argv: a command line whose `--plugin`, `--model` and `--method` decide whose flags these
            are; M-MAE's where they say nothing.
    """
    load_plugins(argv)
    early = early_values(argv, ("model", "method"))
    kind, name = models_zoo.find_class(early["model"], early["method"])
    methods = models_zoo.list_methods(kind)
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python main_pretrain.py --data_path DATA --model mae_vit_base_patch16 \\\n"
        "  --norm_pix_loss --epochs 400 --output_dir runs/pretrained",
        first=(
            "config", "data_path", "dataset", "model", "method", "mask_ratio", "norm_pix_loss",
            "input_size", "epochs", "batch_size", "blr", "output_dir", "resume", "device",
        ),
    )  # fmt: skip
    add_method_flag(parser, list(methods))
    add_mask_flags(parser.add_argument_group("masks"))
    add_data_flags(parser, list(DATASETS))
    add_view_flags(parser)
    add_split_flags(parser)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=name,
        metavar="NAME",
        help="autoencoder; --list_models prints the names",
    )
    group.add_argument("--list_models", action="store_true", help="print the names and leave")
    group.add_argument(
        "--in_chans",
        type=number(int, 1, MOST_CHANNELS),
        help="channels of an image; default: the data set's",
    )
    kind.add_flags(parser)
    add_optimisation_flags(parser)
    parser.set_defaults(epochs=400, warmup_epochs=40.0, blr=1.5e-4)
    add_shard_flag(parser)
    add_run_flags(parser)
    group = add_checkpoint_flags(parser)
    group.add_argument(
        "--picture_every",
        type=number(int, 0),
        default=20,
        help="epochs between pictures of held-out images",
    )
    group.add_argument(
        "--eval_every",
        type=number(int, 0),
        default=0,
        help="epochs between measurements of PSNR and SSIM on held-out images",
    )
    group.add_argument(
        "--eval_images", type=number(int, 1), default=256, help="held-out images to measure on"
    )
    add_dry_run_flags(parser)
    parser.add_presets("method", methods)
    return parser


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


def open_set(
    args: argparse.Namespace, split: str, channels: int | None, decoder: str = "pil"
) -> ImageSource:
    """A split of the data set that the flags name, or as much of train as they ask for."""
    source = build_dataset(
        args.dataset,
        split,
        args.data_path,
        channels=channels,
        mean=args.mean,
        std=args.std,
        max_pixels=args.max_pixels,
        hold_out=hold_out_of(vars(args)),
    ).with_decoder(decoder)
    limit = args.train_images if split == "train" else None
    return source if limit is None else Subset(source, evenly(len(source), limit))


def fit_model(
    args: argparse.Namespace,
    model: models_zoo.PretrainModel,
    source: ImageSource,
    samples: PretrainSamples,
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
        (normalize(b["image"], source.mean, source.std), {name: b[name] for name in model.draws})
        for b in loader
    )
    text = model.fit(batches, len(indices), vars(args), procs.sum)
    if procs.main:
        say(text)


@dataclass(frozen=True)
class HeldOut:
    """The images to measure or to show on, and their masks."""

    source: ImageSource
    samples: PretrainSamples
    sampler: EvalSampler
    loader: Iterable[dict[str, Any]]
    masker: Masker


def held_out_source(args: argparse.Namespace, train: ImageSource) -> ImageSource | None:
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


def held_out_set(
    source: ImageSource,
    model: models_zoo.PretrainModel,
    masker: Masker,
    limit: int,
    batch_size: int,
    procs: Processes,
) -> HeldOut:
    """At most `limit` held-out images under these masks, dealt out to the processes."""
    transform = EvalTransform(model.input.image_size, margin=source.eval_margin)
    samples = PretrainSamples(source, transform, masker.strategy, masker.cells.grid, EVAL_SEED)
    sampler = EvalSampler(
        evenly(len(source), limit), batch_size, world_size=procs.world_size, rank=procs.rank
    )
    loader = build_loader(samples, sampler, num_workers=0, pin_memory=False)
    return HeldOut(source, samples, sampler, loader, masker)


def draw_pictures(model: Any, held_out: HeldOut, device: torch.device, title: str) -> Any:
    """A grid of held-out images, masked and reconstructed."""
    source, masker = held_out.source, held_out.masker
    keys = next(iter(EvalSampler(evenly(len(source), PICTURES), PICTURES)))
    batch = [held_out.samples[key] for key in keys]
    images = torch.stack([sample["image"] for sample in batch]).to(device)
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


def peak_lr(args: argparse.Namespace, model: Any, num_visible: int, global_batch: int) -> float:
    """The learning rate after the warm-up."""
    if args.lr is not None:
        return args.lr
    return model.adjust_lr(scaled_lr(args.blr, global_batch), num_visible)


def plan_run(args: argparse.Namespace, count: int, warnings: Sequence[str] = ()) -> DryRun:
    """What the run would do and cost on `count` processes, see `util.dry_run.training`."""
    everything = argparse.Namespace(**vars(args) | {"train_images": None})
    data = look_at_data(
        args.dataset,
        args.data_path,
        args.dry_run_images,
        lambda: open_set(everything, "train", args.in_chans),
        hold_out_of(vars(args)),
    )
    data = limited(data, args.train_images)
    with torch.device("meta"):  # no memory and no time, whatever the size
        model, _ = build_model(args, args.in_chans or data.channels)
    masker = masker_of(vars(args), model)
    lr = peak_lr(args, model, masker.num_visible, args.batch_size * count * args.accum_iter)
    rate, rate_note = rate_of(
        args.images_per_second,
        (lambda: rate_here(args, data.channels)) if args.dry_run_measure else None,
        count,
    )
    return DryRun(
        task=TASK,
        what=f"{args.model} ({args.method}), {model.input}, "
        f"{model.describe(masker.num_visible)}; mask {args.mask}",
        data=data,
        dataset=args.dataset,
        batch_size=args.batch_size,
        processes=count,
        accum_iter=args.accum_iter,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        lr=lr,
        min_lr=args.min_lr,
        published=PUBLISHED,
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
    mask = torch.rand(batch_size, math.prod(model.mask_grid)).argsort(dim=1) >= num_visible
    drawn = {name: torch.rand(batch_size, *shape) - 0.5 for name, shape in model.draws.items()}
    return model(torch.rand(batch_size, *model.input.shape), mask, num_visible, **drawn)["loss"]


def rate_here(args: argparse.Namespace, channels: int) -> float:
    """Images/s of this process on drawn images: forward, backward, update; no loading."""
    device = choose_device(args.device, 0)
    model, _ = build_model(args, args.in_chans or channels)
    model.to(device).set_grad_checkpointing(args.grad_checkpointing)
    masker = masker_of(vars(args), model)
    B, K = args.batch_size, masker.num_visible
    images = torch.randn(B, *model.input.shape, device=device)
    mask = torch.rand(B, math.prod(model.mask_grid), device=device).argsort(dim=1) >= K
    drawn = {name: torch.rand(B, *s, device=device) - 0.5 for name, s in model.draws.items()}
    optimizer = create_adamw(parameter_groups(model, args.weight_decay), 0.0, betas=(0.9, 0.95))
    step = OptimizerStep(model, optimizer, device=device, precision=args.precision)
    return measure_rate(
        lambda: step(lambda x: model(x, mask, K, **drawn)["loss"], [images], 0.0),
        B,
        args.dry_run_measure,
        device,
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one pretraining; see the module."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(argv)
    args = parser.parse(argv)
    if args.list_models:
        print_text("\n".join(models_zoo.list_models()))
        return
    check_settings(vars(args))
    warnings = warn_of_flags(vars(args), parser.given)
    if args.dry_run:
        count, speaks = processes_of(args.dry_run_processes, Path(args.output_dir))
        if speaks:
            print_text(describe(plan_run(args, count, warnings)))
        return
    folder = Path(args.output_dir)
    with processes(args.device, folder) as procs, hold_folder(folder, procs) as lease:
        pretrain(args, procs, lease, warnings)


def pretrain(
    args: argparse.Namespace, procs: Processes, lease: Lease | None, warnings: Sequence[str]
) -> None:
    """The run, from top to bottom."""
    # -------------------------------------------------------------------------------- start
    if args.eval_every:
        needs("skimage.metrics", "scikit-image")  # now, not after the first epochs
    args.compile = compiles(args, procs.device)
    start = Start(TASK, session_settings(args, HOUSEKEEPING), procs, lease)

    # ------------------------------------------------------------------------------- data
    # One process lists a folder or fetches a set; the others find what it left on the disk.
    with procs.main_first():
        source = open_set(args, "train", args.in_chans, args.decode)
        val_source = held_out_source(args, source)
    model, model_args = build_model(args, source.channels)
    masker = masker_of(vars(args), model)
    transform = pretrain_transform(
        args.augment,
        args.decode,
        model.input.image_size,
        tuple(args.crop_scale),
        flip=not args.no_flip,
        channels=source.channels,
        margin=source.eval_margin,
    )
    samples = PretrainSamples(
        source, transform, masker.strategy, masker.cells.grid, args.seed, model.draws
    )
    parts = []  # under the standard masks, and under the run's own where these are others
    if val_source is not None:
        standard, size = masker_of(STANDARD, model), (args.eval_images, args.batch_size, procs)
        maskers = [standard, masker] if masker.differs_from(standard) else [standard]
        parts = [held_out_set(val_source, model, m, *size) for m in maskers]

    # ---------------------------------------------- loader, placement, optimiser, checkpoint
    lr = peak_lr(args, model, masker.num_visible, start.global_batch)
    session = Session(
        start,
        source=source,
        samples=samples,
        model=model,
        model_name=args.model,
        model_args=model_args,
        optimizer=lambda: create_adamw(
            parameter_groups(model, args.weight_decay), lr, betas=(0.9, 0.95)
        ),
        lr=lr,
        published=PUBLISHED,
        warnings=warnings,
        fit=lambda: fit_model(args, model, source, samples, start.workers, procs),
        snapshot=lambda: {
            "data": {
                "dataset": args.dataset,
                "mean": source.mean,
                "std": source.std,
                "eval_margin": source.eval_margin,
            },
        },
    )
    session.say(
        f"{args.model} ({args.method}), {sum(p.numel() for p in model.parameters()):,} "
        f"parameters; {counted(len(source), 'image')} of {args.dataset}"
    )

    # ----------------------------------------------------------------------------- epochs
    draws = tuple(model.draws)
    loss = PretrainLoss(masker, source.mean, source.std, procs.device, draws)
    step, folder = session.run.step, Path(args.output_dir)
    with session.running() as run:
        for epoch in range(run.first_epoch, args.epochs):
            measuring = bool(parts) and due(args.eval_every, epoch, args.epochs)
            drawing = bool(parts) and due(args.picture_every, epoch, args.epochs)
            if not (run.stage == "measuring" and epoch == run.first_epoch):
                session.start_epoch(epoch, step)
                step = train_steps(
                    session.trained,
                    session.loader,
                    session.optimizer_step,
                    loss,
                    session.rate,
                    first_step=step,
                    after_step=run.after_step,
                )
                run.end_epoch(epoch, step)
                numbered = epoch if due(args.save_every, epoch, args.epochs) else None
                run.save(step, "measuring" if measuring or drawing else "done", numbered)
            if measuring or drawing:
                with session.placed.whole() as whole:
                    if measuring:
                        tables = [
                            evaluate(
                                whole,
                                part.loader,
                                part.masker,
                                mean=source.mean,
                                std=source.std,
                                device=procs.device,
                                sum_over_ranks=procs.sum,
                            )
                            for part in parts
                        ]
                        for part in parts:
                            say_conversions(part.loader, procs.gather)
                        report(run.logger, parts, tables, step, epoch)
                    if drawing and procs.main:
                        shown = "training" if val_source is source else "held-out"
                        after = counted(epoch + 1, "epoch")
                        title = f"{args.model} ({args.method}) after {after}, {shown} images"
                        picture = draw_pictures(whole, parts[-1], procs.device, title)
                        save_png(folder / "pictures" / f"epoch-{epoch}.png", picture)
                        run.logger.picture("reconstruction", step, np.asarray(picture))
                run.save(step, "done")

        # -------------------------------------------------------------------------- close
        if procs.main:
            run.say_results()
            if (picture := last_picture(folder / "pictures")) is not None:
                say(f"pictures    {picture}")


def last_picture(folder: Path) -> Path | None:
    """The picture that was written last, if it can be seen."""
    try:
        found = folder.glob("epoch-*.png")
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    except OSError:
        return None


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
        for line in lines_of(table):
            say(f"  {line}")


if __name__ == "__main__":
    main()
