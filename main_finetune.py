"""Train a classifier on a pretrained encoder: all of it, its last blocks, or a linear probe.

    python main_finetune.py --finetune CHECKPOINT --data_path IMAGENET ...        all of it
    python main_finetune.py --finetune CHECKPOINT --tune partial:4 ...            the last 4 blocks
    python main_finetune.py --finetune CHECKPOINT --tune linear ...               a linear probe
    python main_finetune.py --model vit_base_patch16 ...                          from scratch
    python main_finetune.py --eval --resume CHECKPOINT --data_path IMAGENET       measure one

Several processes: torchrun --nproc_per_node 8 main_finetune.py ...
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_signals

    take_signals()

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3

import models_zoo
from engine_finetune import (
    BatchAugmentation,
    eval_loader,
    measurement,
    say_accuracy,
    train_one_epoch,
)
from models_protocols import blocks_of
from util.config.finetune_flags import (
    FULL,
    LINEAR,
    UNSET,
    add_augmentation_flags,
    add_model_flags,
)
from util.config.flag_parser import fill_unset, load_plugins
from util.config.flags import (
    FlagParser,
    add_checkpoint_flags,
    add_data_flags,
    add_dry_run_flags,
    add_optimisation_flags,
    add_run_flags,
    add_shard_flag,
    add_split_flags,
    arithmetic_of,
    compiles,
    number,
    run_options,
    settings_of,
)
from util.console import counted, print_text
from util.data.class_names import as_trained, check_classes, check_splits, need_labels
from util.data.datasets import DATASETS, build_dataset
from util.data.images import ImageSource, Subset
from util.data.randomness import EpochSampler, evenly
from util.data.samples import LabelledSamples, build_loader, default_workers
from util.data.splits import hold_out_of
from util.data.transforms import FinetuneTransform
from util.dry_run.cost import classifier_layers, cost_of
from util.dry_run.report import describe
from util.dry_run.training import (
    Data,
    DryRun,
    limited,
    look_at_data,
    measure_rate,
    parameters_by_part,
    processes_of,
    rate_of,
    start_of_plan,
)
from util.errors import BadInput, command
from util.measure.accuracy import EVAL_FILES, RUN_FILES, save_accuracy
from util.progress import say
from util.train import checkpoint as ckpt
from util.train.advice import (
    Published,
    check_settings,
    need_two,
    say_warnings,
    warn_of_course,
    warn_of_flags,
    warn_of_shards,
    warn_of_start,
)
from util.train.dist import Processes, choose_device, distribute, processes
from util.train.lease import Lease, hold_folder
from util.train.logger import prepare_folder
from util.train.memory import create_in_memory
from util.train.optim import create_adamw, create_lars, layer_decay_groups, load_moments
from util.train.results import MEASURED, chosen_on, identity_of, measured_on, set_others_aside
from util.train.resume import go_on
from util.train.run import Run, due
from util.train.schedule import CosineSchedule, scaled_lr
from util.train.shard import Placed
from util.train.step import OptimizerStep
from util.train.timeline import Timeline
from util.weights.assumed import assumptions, check_given, set_statistics
from util.weights.convert import read_encoder
from util.weights.files import load_state
from util.weights.load_table import LOADED

TASK = "finetune"
# Beside those of every main: what is only measured.
HOUSEKEEPING = {"eval", "dist_eval"}
# The recipes of the README's table, for what is warned of.
PUBLISHED = {
    "scratch": Published(1e-4, 4096),
    "full": Published(1e-3, 1024),
    "linear": Published(0.1, 16384),
}


def build_parser() -> FlagParser:
    """The flags; MAE's keep their names and meaning."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python main_finetune.py --finetune CHECKPOINT --data_path DATA \\\n"
        "  --epochs 100 --blr 5e-4 --output_dir runs/finetuned",
        first=(
            "data_path", "dataset", "finetune", "model", "tune", "input_size", "epochs",
            "batch_size", "blr", "output_dir", "resume", "eval", "device",
        ),
        presets=("tune", {"full": FULL, "linear": LINEAR}),
    )  # fmt: skip
    parser.add_argument(
        "--tune",
        default="full",
        help="what is trained: full, partial:K or linear; K: the last blocks, 0.5 the last MLP, 0 "
        "as linear",
    )
    add_data_flags(parser, list(DATASETS))
    add_split_flags(parser)
    for name, what in (("train_images", "learn from"), ("val_images", "measure on")):
        parser.add_argument(
            f"--{name}", type=number(int, 1), help=f"{what} so many, evenly spaced; default: all"
        )
    add_model_flags(parser)
    add_augmentation_flags(parser)
    add_optimisation_flags(
        parser, unset=("epochs", "warmup_epochs", "blr", "min_lr", "weight_decay")
    )
    group = parser.add_argument_group("optimisation, fine-tuning")
    group.add_argument(
        "--layer_decay",
        type=number(float, 0, 1, open_low=True),
        help="factor on the learning rate from one block to the one before it",
        **UNSET,
    )
    group.add_argument(
        "--betas",
        type=number(float, 0, 1, open_high=True),
        nargs=2,
        default=[0.9, 0.999],
        metavar=("BETA1", "BETA2"),
        help="of AdamW; a linear probe has LARS and no betas",
    )
    add_shard_flag(parser)
    add_run_flags(parser)
    group = add_checkpoint_flags(parser)
    group.add_argument(
        "--eval_every", type=number(int, 0), default=1, help="epochs between measurements"
    )
    group.add_argument(
        "--eval", action="store_true", help="measure --resume or --finetune; no training"
    )
    group.add_argument(
        "--dist_eval", action="store_true", help="accepted; evaluation is exact on any processes"
    )
    add_dry_run_flags(parser)
    return parser


def resolve_tune(args: argparse.Namespace) -> None:
    """Fill the flags that were not set from --tune, in place."""
    linear = blocks_of(args.tune) == 0
    if linear:
        args.tune = "linear"
    fill_unset(args, LINEAR if linear else FULL)


def open_set(args: argparse.Namespace, split: str, channels: int | None) -> ImageSource:
    """A labelled split of the data set that the flags name, or as much of it as they ask for."""
    source = build_dataset(
        args.dataset,
        split,
        args.data_path,
        channels=channels,
        mean=args.mean,
        std=args.std,
        max_pixels=args.max_pixels,
        hold_out=hold_out_of(vars(args)),
    )
    unlabelled = ("photos", "stl10_unlabeled", "garments")
    need_labels(source, args.data_path, [name for name in DATASETS if name not in unlabelled])
    limit = args.train_images if split == "train" else args.val_images
    return source if limit is None else Subset(source, evenly(len(source), limit))


def new_model(
    args: argparse.Namespace, origin: dict[str, Any] | None, in_chans: int, num_classes: int
) -> tuple[Any, dict[str, Any]]:
    """The model that the flags describe, with a fresh head, and its arguments in plain types.

    Args:
        origin: what --finetune holds; None: from scratch.
    """
    own = {
        "num_classes": num_classes,
        "global_pool": args.global_pool,
        "probe": args.tune == "linear",
        "drop_path": args.drop_path,
    }
    if origin is not None:
        given = [f"--{n}" for n in ("lscale_init", "patch_size", "in_chans") if getattr(args, n)]
        if given:
            raise BadInput(f"{', '.join(given)} with --finetune: the checkpoint says what it is")
        model, arguments, _ = models_zoo.classifier_of(
            origin,
            args.finetune,
            args.model,
            img_size=args.input_size,
            pos_resize=args.pos_resize,
            num_heads=args.num_heads,
            **own,
        )
        # As MAE's codes do: a fine-tuned head starts at almost nothing, a probe's at .01.
        model.init_head(0.01 if args.tune == "linear" else 2e-5)
        return model, arguments
    if args.weights_key is not None:
        raise BadInput("--weights_key without --finetune: there is no file to find weights in")
    if args.model is None:
        raise BadInput("give --finetune CHECKPOINT, or --model NAME to train from scratch")
    if args.num_heads:
        raise BadInput("--num_heads without --finetune: --model NAME says how many there are")
    arguments = models_zoo.model_arguments(args.model) | own
    if args.model not in models_zoo.CLASSIFIERS:
        raise BadInput(
            f"{args.model} is no classifier; choose from {', '.join(models_zoo.CLASSIFIERS)}"
        )
    arguments |= {"in_chans": in_chans, "lscale_init": args.lscale_init}
    arguments["img_size"] = list(args.input_size or (arguments["img_size"],) * 2)
    if args.patch_size is not None:
        arguments["patch_size"] = list(args.patch_size)
    model = create_in_memory(lambda: models_zoo.create_model(args.model, **arguments))
    return model, arguments


def said_of(args: argparse.Namespace, state: dict[str, Any], path: str) -> list[str]:
    """What became of the tensors of a file, and what was assumed of its model; for the reader."""
    return [*state[LOADED], *assumptions(state, path, set_statistics(args.mean))]


def build_augmentation(
    args: argparse.Namespace, num_classes: int, device: torch.device
) -> BatchAugmentation:
    """Erasing, mixup, cutmix and smoothing as the flags say; timm's."""
    erasing = mixup = None
    if args.reprob:
        erasing = RandomErasing(
            args.reprob, mode=args.remode, max_count=args.recount, device=device
        )
    if args.mixup or args.cutmix or args.cutmix_minmax:
        if args.batch_size % 2:
            raise BadInput(f"mixup pairs images: --batch_size {args.batch_size} must be even")
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    return BatchAugmentation(erasing, mixup, args.smoothing)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one fine-tuning, or one evaluation; see the module."""
    load_plugins(argv)
    parser = build_parser()
    args = parser.parse(argv)
    if args.list_models:
        print_text("\n".join(models_zoo.list_classifiers()))
        return
    resolve_tune(args)
    check_settings(vars(args))
    warnings = warn_of_flags(vars(args), parser.given)
    if args.dry_run:
        count, speaks = processes_of(args.dry_run_processes, Path(args.output_dir))
        if speaks:
            print_text(describe(plan_run(args, count, warnings)))
        return
    with processes(args.device, Path(args.output_dir)) as procs:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
        if args.eval:
            evaluate_checkpoint(args, procs)
        else:
            with hold_folder(Path(args.output_dir), procs) as lease:
                finetune(args, procs, lease, warnings)


def planned_model(args: argparse.Namespace, data: Data) -> tuple[Any, dict[str, Any], str]:
    """The model of a plan, its arguments, and where it starts; see `start_of_plan`."""
    num_classes = args.nb_classes or data.classes
    there, start = start_of_plan(args.finetune, args.model)
    if there:
        origin = load_state(args.finetune, args.weights_key)
        model, arguments = new_model(args, origin, data.channels, num_classes)
        for line in said_of(args, origin, args.finetune):
            say(line)
        return model, arguments, start
    args = argparse.Namespace(
        **vars(args) | {"finetune": None, "num_heads": None, "weights_key": None}
    )
    with torch.device("meta"):  # no memory and no time, whatever the size
        model, arguments = new_model(args, None, args.in_chans or data.channels, num_classes)
    return model, arguments, start


def published_for(args: argparse.Namespace) -> Published:
    """The recipe that the flags are held to."""
    if args.tune == "linear":
        return PUBLISHED["linear"]
    random = args.finetune is None and not warn_of_start(None, args.tune, args.layer_decay)
    return PUBLISHED["scratch" if random else "full"]


def check_batch(args: argparse.Namespace, count: int) -> None:
    """Refuse a linear probe on one image at a time; `count` processes share their statistics."""
    if args.tune == "linear":
        need_two(args.batch_size * count, "of the linear probe")


def plan_run(args: argparse.Namespace, count: int, warnings: Sequence[str] = ()) -> DryRun:
    """What the run would do and cost on `count` processes, see `util.dry_run.training`."""
    check_batch(args, count)
    everything = argparse.Namespace(**vars(args) | {"train_images": None})
    data = look_at_data(
        args.dataset,
        args.data_path,
        args.dry_run_images,
        lambda: open_set(everything, "train", args.in_chans),
        hold_out_of(vars(args)),
    )
    data = limited(data, args.train_images)
    model, arguments, start = planned_model(args, data)
    tuned = model.freeze_to(args.tune)
    blocks = blocks_of(args.tune, len(model.blocks))
    (h, w), (ph, pw) = model.img_size, model.patch_size
    global_batch = args.batch_size * count * args.accum_iter
    rate, rate_note = rate_of(
        args.images_per_second,
        (lambda: rate_here(args, arguments)) if args.dry_run_measure else None,
        count,
    )
    warnings = [
        *warn_of_start(args.finetune, args.tune, args.layer_decay),
        *warnings,
        *warn_of_shards(args.shard, count),
    ]
    return DryRun(
        task=TASK,
        what=f"{args.model or 'the model'} {start}, tune {args.tune} ({len(tuned)} tensors), "
        f"{model.in_chans} x {h} x {w}, patches {ph} x {pw}, {model.num_classes} classes",
        data=data,
        dataset=args.dataset,
        batch_size=args.batch_size,
        processes=count,
        accum_iter=args.accum_iter,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        lr=scaled_lr(args.blr, global_batch) if args.lr is None else args.lr,
        min_lr=args.min_lr,
        published=published_for(args),
        warnings=warnings,
        parameters=parameters_by_part(model),
        cost=cost_of(
            classifier_layers(arguments, blocks),
            precision=args.precision,
            grad_checkpointing=args.grad_checkpointing,
        ),
        counted="matrix products, 2 a multiply-add; backward of what learns and of what is after "
        "it; evaluation is not counted",
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


def rate_here(args: argparse.Namespace, arguments: dict[str, Any]) -> float:
    """Images/s of this process on drawn images: forward, backward, update; no loading."""
    device = choose_device(args.device, 0)
    check_batch(args, 1)  # the other processes are not there
    model = models_zoo.VisionTransformer(**arguments)
    model.freeze_to(args.tune)
    model.to(device).train()
    model.set_grad_checkpointing(args.grad_checkpointing)
    images = torch.randn(args.batch_size, model.in_chans, *model.img_size, device=device)
    labels = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
    optimizer: torch.optim.Optimizer
    if args.tune == "linear":
        optimizer = create_lars(groups, 0.0)
    else:
        optimizer = create_adamw(groups, 0.0, betas=(0.9, 0.999))
    step = OptimizerStep(model, optimizer, device=device, precision=args.precision)
    augmentation = BatchAugmentation()
    return measure_rate(
        lambda: step(lambda x: augmentation.loss(model(x), labels), [images], 0.0),
        args.batch_size,
        args.dry_run_measure,
        device,
    )


def evaluate_checkpoint(args: argparse.Namespace, procs: Processes) -> None:
    """Measure one checkpoint on the held-out split, and write what was measured."""
    folder = Path(args.output_dir)
    path = args.resume if args.resume not in ("auto", "none") else args.finetune
    if path is None:
        own = ckpt.best_or_newest(folder, TASK)
        if own is None:
            raise BadInput(f"{folder} holds no fine-tuned checkpoint; name one with --resume")
        path = str(own)
    with procs.main_first():  # an address is fetched once
        ckpt.local_file(path)
    whole = load_state(path, args.weights_key)

    def read(weights: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        model, _, state = models_zoo.classifier_of(
            whole | {"model": weights},
            path,
            args.model,
            head="own",
            img_size=args.input_size,
            pos_resize=args.pos_resize,
            num_heads=args.num_heads,
        )
        return model, state

    model, state = read(whole["model"])
    check_given(
        {"nb_classes": args.nb_classes, "in_chans": args.in_chans},
        {"nb_classes": model.num_classes, "in_chans": model.in_chans},
        path,
    )
    if procs.main:
        for line in said_of(args, state, path):
            say(line)
    # Images are normalised as in training, also those of another set.
    trained_on = state.get("data", {})
    args.mean, args.std = (args.mean or trained_on.get("mean"), args.std or trained_on.get("std"))
    with procs.main_first():
        source = open_set(args, "val", model.in_chans)
        names = names_of_head(args, state, len(source.classes), model.num_classes)
    part, known = "", len(source.classes)
    source = as_trained(source, names, model.num_classes, path)
    if known < len(source.classes):
        part = f", {known} of {len(source.classes)} classes"
    workers = default_workers(procs.local_size) if args.num_workers is None else args.num_workers
    loader = eval_loader(source, model.img_size, args.batch_size, workers, procs)
    measure = measurement(loader, source, model.num_classes, procs)
    model.to(procs.device)
    arms = {"": model.state_dict()}
    if "ema" in state:
        arms["ema_"] = read(whole["ema"])[0].state_dict()  # at this size too
    prepare_folder(folder)
    identity = identity_of(path, state.get("step"), measured_settings(args, model))
    if procs.main:
        set_others_aside(folder, EVAL_FILES, identity)
    more: dict[str, Any] = {"checkpoint": str(path), "dataset": args.dataset, MEASURED: identity}
    where = measured_on(vars(args), state, path, speaks=procs.main)
    more |= {**where, "chosen_on": chosen_on(path, state)}
    if part:
        more |= {"classes": known, "classes_of_head": len(source.classes)}
    for prefix, weights in arms.items():
        ckpt.load_weights(model, weights, path)
        result = measure(model)
        more |= {f"{prefix}{k}": v for k, v in result.summary().items()}
        if procs.main:
            whose = " (averaged weights)" if prefix else ""
            say_accuracy(f"{args.dataset} {where['measured_on']}{whose}{part}", result)
            save_accuracy(folder, result, source.classes, more, EVAL_FILES)
    if procs.main:
        say(f"written     {folder}/{', '.join(EVAL_FILES)}")


def names_of_head(
    args: argparse.Namespace, state: dict[str, Any], classes: int, outputs: int
) -> Sequence[str] | None:
    """The classes that a head was trained for; None: nobody knows their names.

    Files of other programs name none: where the held-out split has another number of classes,
    those of the training split are taken if there are as many as the head has outputs.
    """
    if state.get("classes") is not None or classes == outputs:
        return state.get("classes")
    with suppress(BadInput):
        train = open_set(args, "train", None).classes
        return train if len(train) == outputs else None
    return None


def measured_settings(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The flags that decide what an evaluation measures."""
    names = (
        "dataset", "data_path", "val_fraction", "val_seed", "val_images", "mean", "std",
        "precision", "weights_key",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names} | {"input_size": list(model.img_size)}


def finetune(
    args: argparse.Namespace, procs: Processes, lease: Lease | None, warnings: Sequence[str]
) -> None:
    """The run, from top to bottom."""
    # ------------------------------------------------------------------ run and processes
    device, folder = procs.device, Path(args.output_dir)
    torch.manual_seed(args.seed)
    check_batch(args, procs.world_size)
    path, notes = ckpt.start_of(folder, TASK, args.resume, procs.gather)
    saved = None if path is None else ckpt.load_task(path, TASK)

    # ------------------------------------------------------------------------------- data
    # One process lists a folder or fetches a file; the others find what it left on the disk.
    with procs.main_first():
        channels, origin = args.in_chans, None
        if saved:
            channels = saved["model_args"]["in_chans"]
        elif args.finetune:
            origin = load_state(args.finetune, args.weights_key)
            stored = read_encoder(origin, args.finetune, args.input_size)
            channels = stored.arguments["in_chans"]
        source = open_set(args, "train", channels)
        val_source = open_set(args, "val", source.channels) if args.eval_every else None
    if val_source is not None:
        check_splits(source.classes, val_source.classes, args.dataset)
    num_classes = args.nb_classes or len(source.classes)
    if num_classes < len(source.classes):
        raise BadInput(
            f"--nb_classes {num_classes}, but {args.dataset} has labels up to "
            f"{len(source.classes) - 1}"
        )

    # ------------------------------------------------------------------------------ model
    if saved:
        model_args = saved["model_args"]
        model = models_zoo.VisionTransformer(**model_args)
        check_classes(source.classes, saved["classes"], model_args["num_classes"])
    else:
        model, model_args = new_model(args, origin, source.channels, num_classes)
        if origin is not None:
            notes += said_of(args, origin, args.finetune)
    origin = None  # its weights are in the model now
    tuned = model.freeze_to(args.tune)
    model.set_grad_checkpointing(args.grad_checkpointing)
    ema = averaged = None
    if args.ema_decay is not None:  # a copy, which a model in shards does not allow
        # All at once (foreach) does not take parameters in shards beside buffers that are not.
        ema = ModelEmaV3(model, decay=args.ema_decay, foreach=not args.shard)
        averaged = Placed(ema.module, procs, shard=args.shard)
    placed = Placed(model, procs, shard=args.shard)
    args.compile = compiles(args, device)
    # A probe's BatchNorm talks to the other processes in the middle of the graph.
    fullgraph = args.tune != "linear" or procs.world_size == 1
    trained = distribute(model, procs, compiled=args.compile, fullgraph=fullgraph)

    transform = FinetuneTransform(
        model.img_size,
        auto_augment=args.aa,
        color_jitter=args.color_jitter,
        crop_scale=tuple(args.crop_scale),
        flip=not args.no_flip,
        mean=source.mean,
    )
    sampler = EpochSampler(
        len(source),
        args.batch_size,
        accum_iter=args.accum_iter,
        world_size=procs.world_size,
        rank=procs.rank,
        seed=args.seed,
    )
    workers = default_workers(procs.local_size) if args.num_workers is None else args.num_workers
    loader = build_loader(
        LabelledSamples(source, transform, args.seed),
        sampler,
        num_workers=workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        prefetch_factor=args.prefetch_factor,
    )
    augmentation = build_augmentation(args, num_classes, device)
    measure = None
    if val_source is not None:
        held_out = eval_loader(val_source, model.img_size, args.batch_size, workers, procs)
        measure = measurement(held_out, val_source, num_classes, procs)

    # ------------------------------------------------------------- optimiser and schedule
    steps_per_epoch = sampler.steps_per_epoch
    lr = scaled_lr(args.blr, sampler.global_batch) if args.lr is None else args.lr
    schedule = CosineSchedule(
        lr, args.min_lr, args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch
    )
    course = warn_of_course(
        published_for(args),
        global_batch=sampler.global_batch,
        images=len(source),
        length=args.epochs,
        warmup=args.warmup_epochs,
        unit="epochs",
        lr=lr,
        min_lr=args.min_lr,
    )
    if saved is None:
        course += warn_of_start(args.finetune, args.tune, args.layer_decay)
    timeline = Timeline(steps_per_epoch, epochs=args.epochs)
    groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
    optimizer: torch.optim.Optimizer
    if args.tune == "linear":
        optimizer = create_lars(groups, lr)
    else:
        optimizer = create_adamw(groups, lr, betas=(args.betas[0], args.betas[1]))
    optimizer_step = OptimizerStep(
        trained,
        optimizer,
        device=device,
        precision=args.precision,
        accum_iter=args.accum_iter,
        clip_grad=args.clip_grad,
    )

    # ----------------------------------------------------------------------------- resume
    settings = settings_of(args)
    arithmetic = arithmetic_of(settings, HOUSEKEEPING) | {
        "model_args": model_args,
        "global_batch": sampler.global_batch,
        "processes": procs.world_size,  # mixup and drop path are drawn by process and micro-step
        "micro_steps": args.accum_iter,
        "images": len(source),
        "stored": source.stored,
    }
    best: dict[str, Any] = {"top1": -1.0, "epoch": -1}
    if saved is not None and path is not None:
        timeline = go_on(
            timeline, saved, path, arithmetic, schedule, notes, allow_changes=args.allow_changes
        )
        ckpt.load_weights(model, placed.parts(saved["model"]), "the checkpoint")
        if averaged is not None:
            weights = averaged.parts(saved.get("ema", saved["model"]))
            ckpt.load_weights(averaged.model, weights, "the checkpoint")
        load_moments(optimizer, saved["optimizer"])
        optimizer_step.load_scale(saved["scaler"])
        best = saved["best"]

    def snapshot() -> dict[str, Any]:
        means = averaged and {"ema": averaged.full(averaged.model.state_dict())}
        return {
            "model_name": args.model,
            "model_args": model_args,
            "model": placed.full(model.state_dict()),
            **(means or {}),
            "classes": list(source.classes),
            "tune": args.tune,
            "best": best,
            "optimizer": placed.full(optimizer.state_dict()),
            "scaler": optimizer_step.scaler.state_dict(),
            "data": {
                "dataset": args.dataset,
                "mean": source.mean,
                "std": source.std,
                "eval_margin": source.eval_margin,
            },
        }

    run = Run(
        folder,
        procs,
        lease=lease,
        task=TASK,
        source=source,
        settings=settings,
        arithmetic=arithmetic,
        snapshot=snapshot,
        state=saved,
        notes=notes,
        timeline=timeline,
        global_batch=sampler.global_batch,
        **run_options(args),
    )
    if procs.main:
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        learning = sum(sizes[name] for name in tuned)
        say(
            f"{args.tune}: {learning:,} of {sum(sizes.values()):,} parameters learn "
            f"({counted(len(tuned), 'tensor')}); {counted(len(source), 'image')} of "
            f"{args.dataset}, {counted(num_classes, 'class')}; global batch "
            f"{sampler.global_batch} = {args.batch_size} x "
            f"{counted(procs.world_size, 'process')} x {args.accum_iter}; lr {lr:.3g}; "
            f"{args.precision} on {device}, {placed}"
        )

    # ----------------------------------------------------------------------------- epochs
    step = run.step
    with run:
        if procs.main:
            say_warnings([*course, *warnings, *warn_of_shards(args.shard, procs.world_size)])
        for epoch in range(run.first_epoch, args.epochs):
            measuring = measure is not None and due(args.eval_every, epoch, args.epochs)
            if not (run.stage == "measuring" and epoch == run.first_epoch):
                sampler.start(epoch, step - timeline.begin(epoch))
                step = train_one_epoch(
                    trained,
                    loader,
                    optimizer_step,
                    augmentation,
                    lambda step: schedule(timeline.scheduled(step)),
                    mean=source.mean,
                    std=source.std,
                    seed=args.seed,
                    rank=procs.rank,
                    first_step=step,
                    after_step=run.after_step,
                    after_update=None if ema is None else lambda: ema.update(model),
                )
                run.end_epoch(epoch, step)
                numbered = epoch if due(args.save_every, epoch, args.epochs) else None
                run.save(step, "measuring" if measuring else "done", numbered)
            if measure is not None and measuring:
                with placed.whole() as whole:
                    result = measure(whole)
                values = result.summary()
                if averaged is not None:
                    with averaged.whole() as whole:
                        result = measure(whole)
                    values |= {f"ema_{k}": v for k, v in result.summary().items() if k != "images"}
                run.logger.record("eval", step, epoch=epoch, **values)
                better = result.summary()["top1"] > best["top1"]
                if better:
                    best = {"top1": result.summary()["top1"], "epoch": epoch}
                if procs.main:
                    done = f"after {counted(epoch + 1, 'epoch')}"
                    say_accuracy(f"{done}{', averaged weights' if ema else ''}", result)
                    if epoch == args.epochs - 1:
                        more = {**values, "best": best, "epoch": epoch, "dataset": args.dataset}
                        where = hold_out_of(vars(args)).words
                        more |= {"measured_on": where, "best_chosen_on": where}
                        more[MEASURED] = {"task": TASK}  # tasks may share a folder
                        set_others_aside(folder, RUN_FILES, more[MEASURED])
                        save_accuracy(folder, result, source.classes, more)
                if better and procs.main:  # killed in between, the run measures and links again
                    ckpt.keep_best(folder, TASK)
                run.save(step, "done")

        # -------------------------------------------------------------------------- close
        if procs.main:
            run.say_results()
            if path := run.own(ckpt.BEST):
                after = counted(best["epoch"] + 1, "epoch")
                say(f"best        top-1 {best['top1']:.2f} % after {after}: {path}")


if __name__ == "__main__":
    main()
