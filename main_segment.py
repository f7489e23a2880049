"""Train a segmenter (UPerNet) on a pretrained encoder, measure one, or segment images with it.

    python main_segment.py --finetune CHECKPOINT --data_path ADEChallengeData2016 ...   train
    python main_segment.py --model vit_base_patch16 ...                                 from scratch
    python main_segment.py --eval --resume CHECKPOINT --data_path DATA                  measure one
    python main_segment.py --predict FOLDER --resume CHECKPOINT --output_dir OUT        its maps

Several processes: torchrun --nproc_per_node 8 main_segment.py ...
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_signals

    take_signals()

import argparse
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models_segmenters
import models_zoo
from engine_segment import (
    LOOKS_BY_DEFAULT,
    LOSS_MEANS,
    Inference,
    PixelLoss,
    eval_loader,
    evaluate,
    predict,
    train_iterations,
    write_label_maps,
)
from util.config.flag_parser import load_plugins
from util.config.flags import (
    FlagParser,
    add_checkpoint_flags,
    add_data_flags,
    add_dry_run_flags,
    add_heads_flag,
    add_optimisation_flags,
    add_run_flags,
    add_split_flags,
    add_weights_key_flag,
    arithmetic_of,
    number,
    run_options,
    settings_of,
    size_pair,
)
from util.console import counted, listed, print_text
from util.data.class_names import check_classes, check_splits
from util.data.label_values import label_pair
from util.data.randomness import IterationSampler, evenly
from util.data.samples import build_loader, default_workers
from util.data.segmentation_sets import (
    SEGMENTATION_SETS,
    SegmentationSource,
    SegmentationSubset,
    build_segmentation_set,
    check_pairs,
)
from util.data.segmentation_transforms import (
    SegmentationSamples,
    SegmentTransform,
)
from util.data.splits import hold_out_of
from util.dry_run.cost import cost_of
from util.dry_run.cost_upernet import segmenter_layers
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
from util.files import save_png
from util.flag_types import (
    MOST_CLASSES,
    MOST_LSCALE,
    MOST_SIDE,
    MOST_WIDTH,
    expanded_path,
    optional,
)
from util.measure.confusion import Segmentation
from util.measure.segmentation_results import EVAL_FILES, RUN_FILES, save_segmentation, sheet
from util.progress import say
from util.train import checkpoint as ckpt
from util.train.advice import (
    Published,
    check_settings,
    need_two,
    say_warnings,
    warn_of_course,
    warn_of_flags,
    warn_of_start,
)
from util.train.dist import Processes, choose_device, distribute, processes
from util.train.lease import Lease, hold_folder
from util.train.logger import prepare_folder
from util.train.memory import create_in_memory
from util.train.optim import create_adamw, layer_decay_groups, load_moments
from util.train.results import MEASURED, chosen_on, identity_of, measured_on, set_others_aside
from util.train.resume import go_on
from util.train.run import Run
from util.train.schedule import PolySchedule, scaled_lr
from util.train.step import OptimizerStep
from util.train.timeline import Timeline
from util.weights.assumed import ASSUMED, assumptions, check_given, set_statistics
from util.weights.convert import read_encoder
from util.weights.files import load_state
from util.weights.load_table import LOADED

TASK = "segment"
LR = 1e-4
# The published run, for what is warned of.
PUBLISHED = Published(LR * 256 / 16, 16, model="ViT-B on ADE20K", images=20_000)
# Where BatchNorm has one value per channel of an image.
POOL = "over the 1 x 1 pool"
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# How large a segmenter sees an image, in what parts, and what the values in masks stand for: in
# --eval and --predict as in training.
LOOKS = ("resize", "inference", "window", "stride", "scene_size", "label_map")
# Flags that decide what --eval measures.
MEASURED_BY = (
    *LOOKS, "dataset", "data_path", "val_images", "mean", "std", "multi_scale", "flip",
    "val_fraction", "val_seed", "weights_key",
)  # fmt: skip
# Beside those of every main: what is only measured, shown or looked at.
HOUSEKEEPING = {"eval", "predict", "check_data", "pictures"}


def build_parser() -> FlagParser:
    """The flags; defaults are those of MAE's ADE20K run (README, "Segmentation")."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python main_segment.py --finetune CHECKPOINT --data_path DATA \\\n"
        "  --iterations 160000 --output_dir runs/segmented",
        first=(
            "data_path", "dataset", "finetune", "model", "channels", "input_size", "iterations",
            "batch_size", "lr", "output_dir", "eval", "predict", "device",
        ),
    )  # fmt: skip
    add_data_flags(parser, list(SEGMENTATION_SETS), size="of training crops and of the encoder")
    add_split_flags(parser)
    parser.set_defaults(dataset="ade20k", input_size=(512, 512))
    parser.add_argument(
        "--nb_classes",
        type=number(int, 1, MOST_CLASSES),
        help="classes of --dataset folder; default: those of its classes.txt",
    )
    parser.add_argument(
        "--label_map",
        type=label_pair,
        nargs="+",
        metavar="VALUE:CLASS",
        help="of --dataset folder: what the values in its masks stand for, such as 0:0 255:1, or "
        "7:ignore; default: values are classes, 255 is ignored",
    )
    parser.add_argument(
        "--scene_size",
        type=number(int, 16, MOST_SIDE),
        default=96,
        help="side of the images of --dataset garments, in pixels",
    )
    for name, what in (("train_images", "learn from"), ("val_images", "measure on")):
        parser.add_argument(
            f"--{name}", type=number(int, 1), help=f"{what} so many, evenly spaced; default: all"
        )
    parser.add_argument(
        "--check_data", action="store_true", help="read every image and mask before training"
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="encoder; default: the checkpoint's")
    group.add_argument("--list_models", action="store_true", help="print the names and leave")
    group.add_argument(
        "--finetune",
        type=expanded_path,
        metavar="CHECKPOINT",
        help="encoder to start from: path or https URL; default: from scratch",
    )
    group.add_argument(
        "--pos_resize",
        choices=("rescale", "extend"),
        default="rescale",
        help="positions at another size: rescale keeps the image's extent, extend the distance of "
        "patches",
    )
    add_heads_flag(group)
    add_weights_key_flag(group)
    group.add_argument("--patch_size", type=size_pair, help="from scratch; default: the name's")
    group.add_argument(
        "--lscale_init",
        type=optional(number(float, 0, MOST_LSCALE, open_low=True)),
        help="start of trainable branch scales, for an encoder that has none (the public run: 1); "
        "default: none",
    )
    width, below_one = number(int, 1, MOST_WIDTH), number(float, 0, 1, open_high=True)
    group.add_argument(
        "--relative_bias",
        action="store_true",
        help="relative position bias in each block, from 0, as in the public run",
    )
    group.add_argument(
        "--channels",
        type=width,
        default=768,
        help="width of the UPer head; beside a small encoder it holds most weights",
    )
    group.add_argument(
        "--aux_channels", type=width, default=256, help="of the auxiliary head, used in training"
    )
    group.add_argument("--dropout", type=below_one, default=0.1, help="dropout in the heads")
    group.add_argument(
        "--drop_path",
        type=below_one,
        default=0.1,
        help="probability that the last block's branches are left out of a training step",
    )
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--resize",
        type=number(int, 1, MOST_SIDE),
        nargs=2,
        default=LOOKS_BY_DEFAULT["resize"],
        metavar=("LONG", "SHORT"),
        help="bounds of an image's sides, its aspect kept; also for evaluation",
    )
    group.add_argument(
        "--ratio_range",
        type=number(float, 0.01, 100),
        nargs=2,
        default=[0.5, 2.0],
        metavar=("MIN", "MAX"),
        help="random factor on --resize",
    )
    group.add_argument(
        "--cat_max_ratio",
        type=number(float, 0, 1, open_low=True),
        default=0.75,
        help="most of a crop that one class may cover",
    )
    group.add_argument("--no_flip", action="store_true", help="no horizontal flip")
    group.add_argument("--no_distortion", action="store_true", help="no photometric distortion")
    add_optimisation_flags(parser, lengths="iterations", peak=f"{LR:g}")
    parser.set_defaults(batch_size=2, iterations=160_000, warmup_iterations=1500)
    group = parser.add_argument_group("optimisation, segmentation")
    group.add_argument(
        "--layer_decay",
        type=number(float, 0, 1, open_low=True),
        default=0.65,
        help="factor on the learning rate from one block to the one before it",
    )
    group.add_argument(
        "--betas",
        type=below_one,
        nargs=2,
        default=[0.9, 0.999],
        metavar=("BETA1", "BETA2"),
        help="of AdamW: decay of its two averages",
    )
    group.add_argument(
        "--aux_weight",
        type=number(float, 0, 1000),
        default=0.4,
        help="weight of the auxiliary head's loss",
    )
    group.add_argument(
        "--loss_mean",
        choices=LOSS_MEANS,
        default="all",
        help="divide the loss by all pixels, as mmsegmentation does, or by those not ignored",
    )
    add_run_flags(parser)
    group = add_checkpoint_flags(parser, "iterations")
    parser.set_defaults(save_every=16_000)
    group.add_argument(
        "--eval_every",
        type=number(int, 0),
        default=16_000,
        help="iterations between measurements of the mIoU",
    )
    group.add_argument(
        "--pictures", type=number(int, 0, 1000), default=6, help="held-out images to draw each time"
    )
    group = parser.add_argument_group("inference")
    group.add_argument("--eval", action="store_true", help="measure --resume; no training")
    group.add_argument(
        "--predict",
        type=expanded_path,
        nargs="+",
        metavar="PATH",
        help="images to segment by --resume, and folders; default: none",
    )
    group.add_argument(
        "--inference",
        choices=("slide", "whole"),
        default="slide",
        help="slide: mean over overlapping windows; whole: the image at once",
    )
    group.add_argument(
        "--window",
        type=size_pair,
        default=LOOKS_BY_DEFAULT["window"],
        help="pixels of a window of slide",
    )
    group.add_argument(
        "--stride",
        type=size_pair,
        default=LOOKS_BY_DEFAULT["stride"],
        help="pixels from window to window",
    )
    group.add_argument(
        "--multi_scale",
        action="store_true",
        help=f"mean over scales {' '.join(map(str, SCALES))}; short side at least --resize's",
    )
    group.add_argument(
        "--flip", action="store_true", help="mean over the image and its mirror image"
    )
    add_dry_run_flags(parser)
    return parser


def inference_of(args: argparse.Namespace) -> Inference:
    """How label maps are made, from the flags."""
    scales = SCALES if args.multi_scale else ()
    sliding = args.inference == "slide"
    short_side = min(args.resize) if args.multi_scale else 0
    return Inference(sliding, args.window, args.stride, scales, args.flip, short_side)


def open_set(
    args: argparse.Namespace, split: str, classes: Sequence[str] | None = None
) -> SegmentationSource:
    """A split of the data set that the flags name, or as much of it as they ask for.

    Args:
        classes: of the model that is there already; they tell how many a folder has.
    """
    count = len(classes) if classes is not None and args.dataset == "folder" else args.nb_classes
    source = hold_out_of(vars(args)).open(
        lambda part: build_segmentation_set(
            args.dataset,
            part,
            args.data_path,
            num_classes=count,
            size=args.scene_size,
            mean=args.mean,
            std=args.std,
            label_map=args.label_map,
            max_pixels=args.max_pixels,
        ),
        split,
        SegmentationSubset,
    )
    limit = args.train_images if split == "train" else args.val_images
    return source if limit is None else SegmentationSubset(source, evenly(len(source), limit))


def new_model(args: argparse.Namespace, num_classes: int) -> tuple[Any, list[str]]:
    """The model that the flags describe, neck and heads fresh; and what to say of its weights."""
    own = {
        "img_size": args.input_size,
        "drop_path": args.drop_path,
        "channels": args.channels,
        "aux_channels": args.aux_channels,
        "dropout": args.dropout,
        "relative_bias": args.relative_bias,
    }
    if args.finetune is None:
        if args.model is None:
            raise BadInput("give --finetune CHECKPOINT, or --model NAME to train from scratch")
        if args.num_heads:
            raise BadInput("--num_heads without --finetune: --model NAME says how many there are")
        if args.weights_key is not None:
            raise BadInput("--weights_key without --finetune: there is no file to find weights in")
        more = {"patch_size": args.patch_size} if args.patch_size else {}
        own["lscale_init"] = args.lscale_init
        model = create_in_memory(
            lambda: models_zoo.create_segmenter(args.model, num_classes, **own, **more)
        )
        return model, []
    if args.patch_size:
        raise BadInput("--patch_size with --finetune: the checkpoint says what it is")
    state = load_state(args.finetune, args.weights_key)
    encoder = read_encoder(state, args.finetune, args.input_size)
    stored = encoder.arguments
    known = ("patch_size", "in_chans", "embed_dim", "depth", "mlp_ratio")
    arguments = {name: stored[name] for name in known}
    arguments["num_heads"], assumed = models_zoo.settle_heads(
        stored, args.finetune, args.model, args.num_heads
    )
    state[ASSUMED] = assumed + encoder.assumed
    if stored["in_chans"] != 3:
        raise BadInput(
            f"{args.finetune} takes images of {stored['in_chans']} channels; segmentation sets are "
            "RGB: pretrain on RGB images"
        )
    model = create_in_memory(
        lambda: models_zoo.segmenter_from(arguments | own | {"num_classes": num_classes})
    )
    if args.lscale_init is not None:
        model.add_lscale(args.lscale_init)
    models_segmenters.segmenter_encoder_of(state, model, args.finetune, args.pos_resize)
    statistics = set_statistics(args.mean)
    return model, [*state[LOADED], *assumptions(state, args.finetune, statistics)]


def next_stop(step: int, total: int, *every: int) -> int:
    """The next step after which something is due: a multiple of one of `every`, or the last."""
    return min([total, *((step // period + 1) * period for period in every if period)])


def is_due(every: int, step: int, total: int) -> bool:
    """Whether what is done every so many steps, and after the last, is due after this one."""
    return bool(every) and (step % every == 0 or step == total)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one training, one evaluation or one prediction; see the module."""
    load_plugins(argv)
    parser = build_parser()
    args = parser.parse(argv)
    if args.list_models:
        print_text("\n".join(models_zoo.list_segmenters()))
        return
    if args.eval and args.predict:
        raise BadInput("--eval and --predict are two commands; give one of them")
    if not (args.eval or args.predict):  # which may have theirs from the checkpoint
        inference_of(args)  # refuses windows that cannot work
    check_settings(vars(args))
    warnings = warn_of_flags(vars(args), parser.given)
    if args.dry_run:
        count, speaks = processes_of(args.dry_run_processes, Path(args.output_dir))
        if speaks:
            print_text(describe(plan_run(args, count, warnings)))
        return
    with processes(args.device, Path(args.output_dir)) as procs:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
        if args.eval or args.predict:
            use_checkpoint(args, procs, parser.given)
        else:
            with hold_folder(Path(args.output_dir), procs) as lease:
                segment(args, procs, lease, warnings)


def peak_lr(args: argparse.Namespace, global_batch: int) -> float:
    """The learning rate after the warm-up; the published one does not follow the batch."""
    if args.lr is not None:
        return float(args.lr)
    return LR if args.blr is None else scaled_lr(args.blr, global_batch)


def planned_model(args: argparse.Namespace, data: Data) -> tuple[Any, str]:
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
        hold_out_of(vars(args)),
    )
    data = limited(data, args.train_images)
    model, start = planned_model(args, data)
    arguments = model.arguments
    (h, w), (ph, pw) = arguments["img_size"], model.patch_size
    global_batch = args.batch_size * count * args.accum_iter
    rate, rate_note = rate_of(
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
        warnings=[*warn_of_start(args.finetune, "full", args.layer_decay), *warnings],
        parameters=parameters_by_part(model),
        cost=cost_of(
            segmenter_layers(arguments, model.neck.factors),
            precision=args.precision,
            grad_checkpointing=args.grad_checkpointing,
        ),
        counted="matrix products and convolutions of encoder, neck and both heads, 2 a "
        "multiply-add, both passes; evaluation is not counted",
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
    groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
    optimizer = create_adamw(groups, 0.0, betas=(args.betas[0], args.betas[1]))
    step = OptimizerStep(model, optimizer, device=device, precision=args.precision)
    return measure_rate(
        lambda: step(lambda x: loss(model(x), label, pixels), [images], 0.0),
        B,
        args.dry_run_measure,
        device,
    )


def use_checkpoint(args: argparse.Namespace, procs: Processes, given: Container[str]) -> None:
    """Measure a whole segmenter on the held-out split, or segment images with it.

    Args:
        given: flags that are not to be taken from the checkpoint.
    """
    folder = Path(args.output_dir)
    path = None if args.resume in ("auto", "none") else args.resume
    if path is None:
        own = ckpt.best_or_newest(folder, TASK)
        if own is None:
            raise BadInput(f"{folder} holds no segmenter; name a checkpoint with --resume")
        path = str(own)
    with procs.main_first():  # an address is fetched once
        ckpt.local_file(path)
    model, state = models_segmenters.load_segmenter(
        path, args.model, args.num_heads, args.weights_key
    )
    check_given({"nb_classes": args.nb_classes}, {"nb_classes": model.num_classes}, path)
    if procs.main:
        for line in [*state[LOADED], *assumptions(state, path, set_statistics(args.mean))]:
            say(line)
    model.to(procs.device)
    # Images are normalised as in training, also those of another set.
    trained_on = state.get("data", {})
    args.mean, args.std = (args.mean or trained_on.get("mean"), args.std or trained_on.get("std"))
    look_as_trained(args, trained_on, given)
    inference_of(args)  # refuses windows that cannot work
    classes = state.get("classes")
    if args.predict:
        if procs.main:
            say(f"main_predict.py --checkpoint {path} --data_path FOLDER does this too")
        write_label_maps(
            model,
            [Path(place) for place in args.predict],
            folder,
            classes,
            inference_of(args),
            procs,
            flag="--predict",
            scale=args.resize,
            mean=args.mean,
            std=args.std,
            num_workers=args.num_workers,
            max_pixels=args.max_pixels,
        )
        return
    with procs.main_first():
        source = open_set(args, "val", classes)
    check_classes(source.classes, classes, model.num_classes)
    if procs.main:
        for note in source.notes:
            say(f"note: {note}")
    measure = measurement(args, source, model.num_classes, procs)
    prepare_folder(folder)
    result = measure(model)
    if procs.main:
        say_result(f"{args.dataset} {hold_out_of(vars(args)).words}", result, len(source))
        identity = identity_of(path, state.get("step"), {n: getattr(args, n) for n in MEASURED_BY})
        set_others_aside(folder, EVAL_FILES, identity)
        more = {"checkpoint": str(path), "dataset": args.dataset, "images": len(source)}
        more |= {MEASURED: identity, "chosen_on": chosen_on(path, state)}
        more |= measured_on(vars(args), state, path, speaks=True)
        save_segmentation(folder, result, source.classes, more, EVAL_FILES)
        draw(args, model, source, procs, f"{args.dataset} val", folder / EVAL_FILES[2])
        say(f"written     {folder}/{', '.join(EVAL_FILES[:2])}")


def look_as_trained(
    args: argparse.Namespace, trained_on: Mapping[str, Any], given: Container[str]
) -> None:
    """Take from the checkpoint how it looks at images, where no flag says otherwise, and say so."""
    own = {name: trained_on[name] for name in LOOKS if name in trained_on and name not in given}
    if args.dataset != "folder":  # another set says itself what its values are
        own.pop("label_map", None)
    changed = {name: value for name, value in own.items() if value != getattr(args, name)}
    vars(args).update(changed)
    if changed:
        texts = settings_of(argparse.Namespace(**changed))
        words = [
            f"--{name} {' '.join(map(str, texts[name]))}"
            if isinstance(texts[name], list)
            else f"--{name} {texts[name]}"
            for name in changed
        ]
        say(f"as in its training: {', '.join(words)}")


def measurement(
    args: argparse.Namespace, source: SegmentationSource, num_classes: int, procs: Processes
) -> Callable[[Any], Segmentation]:
    """A function that measures a model on the held-out set. A collective."""
    workers = default_workers(procs.local_size) if args.num_workers is None else args.num_workers
    loader = eval_loader(source, args.resize, workers, procs)

    def measure(model: Any) -> Segmentation:
        return evaluate(
            model,
            loader,
            num_classes,
            inference_of(args),
            mean=source.mean,
            std=source.std,
            device=procs.device,
            sum_over_ranks=procs.sum,
            gather=procs.gather,
        )

    return measure


def say_result(name: str, result: Segmentation, images: int) -> None:
    """One line for the reader."""
    say(
        f"{name}: mIoU {result.miou:.2f}  pixel accuracy {result.pixel_accuracy:.2f}  "
        f"class accuracy {result.class_accuracy:.2f}  ({images:,} images)"
    )


def draw(
    args: argparse.Namespace,
    model: Any,
    source: SegmentationSource,
    procs: Processes,
    title: str,
    path: Path,
) -> np.ndarray | None:
    """A sheet of held-out images with labels and predictions; the main process alone draws."""
    if not args.pictures:
        return None
    shown = SegmentationSubset(source, evenly(len(source), args.pictures))
    alone = Processes(0, 1, 0, 1, procs.device)
    found = predict(
        model,
        eval_loader(shown, args.resize, 0, alone),
        inference_of(args),
        mean=source.mean,
        std=source.std,
        device=procs.device,
    )
    pairs = [shown[i] for i in range(len(shown))]
    picture = sheet(
        [np.asarray(image) for image, _ in pairs],
        [label for _, label in pairs],
        [label.cpu().numpy() for _, label in found],
        [shown.file_name(i) for i in range(len(shown))],
        source.classes,
        source.colours,
        title,
    )
    save_png(path, picture)
    return np.asarray(picture)


def segment(
    args: argparse.Namespace, procs: Processes, lease: Lease | None, warnings: Sequence[str]
) -> None:
    """The run, from top to bottom."""
    # ------------------------------------------------------------------ run and processes
    device, folder = procs.device, Path(args.output_dir)
    torch.manual_seed(args.seed)
    path, notes = ckpt.start_of(folder, TASK, args.resume, procs.gather)
    saved = None if path is None else ckpt.load_task(path, TASK)
    need_two(args.batch_size * procs.world_size, POOL)

    # ------------------------------------------------------------------------------- data
    # One process lists a folder or fetches a file; the others find what it left on the disk.
    with procs.main_first():
        classes = saved["classes"] if saved else None
        source = open_set(args, "train", classes)
        val_source = open_set(args, "val", source.classes) if args.eval_every else None
        if args.finetune and not saved:
            ckpt.local_file(args.finetune)
    check_classes(source.classes, classes or source.classes, len(source.classes))
    if val_source is not None:
        check_splits(source.classes, val_source.classes, args.dataset)
    if procs.main:
        for part in (source, val_source):
            for note in part.notes if part is not None else ():
                say(f"note: {note}")
    if args.check_data:
        check_data([source] + ([val_source] if val_source is not None else []), procs)

    # ------------------------------------------------------------------------------ model
    if saved:
        model = models_zoo.segmenter_from(saved["model_args"])
    else:
        model, lines = new_model(args, len(source.classes))
        notes += lines
    model.to(device)
    model.set_grad_checkpointing(args.grad_checkpointing)
    # Only when asked for: batch statistics of several processes cut the graph into pieces.
    args.compile = bool(args.compile)
    trained = distribute(model, procs, compiled=args.compile, fullgraph=False)

    transform = SegmentTransform(
        args.input_size,
        scale=(args.resize[0], args.resize[1]),
        ratio=(args.ratio_range[0], args.ratio_range[1]),
        most_of_one=args.cat_max_ratio,
        flip=not args.no_flip,
        distortion=not args.no_distortion,
    )
    sampler = IterationSampler(
        len(source),
        args.batch_size,
        accum_iter=args.accum_iter,
        world_size=procs.world_size,
        rank=procs.rank,
        seed=args.seed,
    )
    workers = default_workers(procs.local_size) if args.num_workers is None else args.num_workers
    loader = build_loader(
        SegmentationSamples(source, transform, args.seed),
        sampler,
        num_workers=workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        prefetch_factor=args.prefetch_factor,
    )
    measure = None
    if val_source is not None:
        measure = measurement(args, val_source, len(source.classes), procs)

    # ------------------------------------------------------------- optimiser and schedule
    lr = peak_lr(args, sampler.global_batch)
    schedule = PolySchedule(lr, args.warmup_iterations, args.iterations, args.min_lr)
    course = warn_of_course(
        PUBLISHED,
        global_batch=sampler.global_batch,
        images=len(source),
        length=args.iterations,
        warmup=args.warmup_iterations,
        unit="iterations",
        lr=lr,
        min_lr=args.min_lr,
    )
    if saved is None:
        course += warn_of_start(args.finetune, "full", args.layer_decay)
    timeline = Timeline(sampler.steps_per_epoch, iterations=args.iterations)
    groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
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
    model_args = model.arguments
    arithmetic = arithmetic_of(settings, HOUSEKEEPING) | {
        "model_args": model_args,
        "global_batch": sampler.global_batch,
        "processes": procs.world_size,  # drop path is drawn by process and micro-step
        "micro_steps": args.accum_iter,  # BatchNorm's statistics are a micro-step's
        "images": len(source),
        "stored": source.stored,
    }
    best: dict[str, Any] = {"miou": -1.0, "step": -1}
    if saved is not None and path is not None:
        timeline = go_on(
            timeline, saved, path, arithmetic, schedule, notes, allow_changes=args.allow_changes
        )
        sampler.place(timeline.first, timeline.start)
        ckpt.load_weights(model, saved["model"], "the checkpoint")
        load_moments(optimizer, saved["optimizer"])
        optimizer_step.load_scale(saved["scaler"])
        best = saved["best"]

    def snapshot() -> dict[str, Any]:
        return {
            "model_name": args.model,
            "model_args": model_args,
            "model": model.state_dict(),
            "classes": list(source.classes),
            "best": best,
            "optimizer": optimizer.state_dict(),
            "scaler": optimizer_step.scaler.state_dict(),
            "data": {"dataset": args.dataset, "mean": source.mean, "std": source.std}
            | {name: getattr(args, name) for name in LOOKS},
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
        whole = sum(p.numel() for p in model.parameters())
        encoder = sum(p.numel() for p in model.encoder.parameters())
        say(
            f"UPerNet, {whole:,} parameters: encoder {encoder:,}, neck and heads of --channels "
            f"{args.channels} {whole - encoder:,}; {counted(len(source), 'image')} of "
            f"{args.dataset}, {counted(len(source.classes), 'class')}; global batch "
            f"{sampler.global_batch} = {args.batch_size} x "
            f"{counted(procs.world_size, 'process')} x {args.accum_iter}; lr {lr:.3g}; "
            f"{args.precision} on {device}"
        )

    # ------------------------------------------------------------------------- iterations
    step, stage, total = run.step, run.stage, args.iterations
    with run:
        if procs.main:
            say_warnings([*course, *warnings])
        while stage != "done" or step < total:
            if stage != "measuring":
                # Stopped at the very step where something is due, that is still to be done.
                begun = step - 1 if stage == "training" and step else step
                goal = next_stop(begun, total, args.eval_every, args.save_every)
                sampler.between(step, goal)
                step = train_iterations(
                    trained,
                    loader,
                    optimizer_step,
                    PixelLoss(args.aux_weight, args.loss_mean),
                    schedule,
                    mean=source.mean,
                    std=source.std,
                    seed=args.seed,
                    rank=procs.rank,
                    world_size=procs.world_size,
                    sum_over_ranks=procs.sum,
                    first_step=step,
                    after_step=run.after_step,
                )
                run.end_epoch(timeline.epoch_of(step), step)
                measuring = measure is not None and is_due(args.eval_every, step, total)
                numbered = step if is_due(args.save_every, step, total) else None
                run.save(step, "measuring" if measuring else "done", numbered)
                stage = "measuring" if measuring else "done"
            if measure is not None and val_source is not None and stage == "measuring":
                result = measure(model)
                run.logger.record("eval", step, **result.summary())
                better = result.miou > best["miou"]
                if better:
                    best = {"miou": result.miou, "step": step}
                if procs.main:
                    title = f"{args.dataset} val after {step:,} iterations"
                    say_result(title, result, len(val_source))
                    more = {"best": best, "step": step, "dataset": args.dataset}
                    where = hold_out_of(vars(args)).words
                    more |= {"measured_on": where, "best_chosen_on": where}
                    more[MEASURED] = {"task": TASK}  # tasks may share a folder
                    set_others_aside(folder, RUN_FILES, more[MEASURED])
                    save_segmentation(folder, result, source.classes, more)
                    picture = folder / "pictures" / f"iteration-{step}.png"
                    drawn = draw(args, model, val_source, procs, title, picture)
                    if drawn is not None:
                        run.logger.picture("segmentation", step, drawn)
                if better and procs.main:  # killed in between, the run measures and links again
                    ckpt.keep_best(folder, TASK)
                run.save(step, "done")
                stage = "done"

        # -------------------------------------------------------------------------- close
        if procs.main:
            run.say_results()
            if path := run.own(ckpt.BEST):
                after = counted(best["step"], "iteration")
                say(f"best        mIoU {best['miou']:.2f} after {after}: {path}")


def check_data(sources: Sequence[SegmentationSource], procs: Processes) -> None:
    """Read every pair once, each process its share; stop at the first that cannot be learnt from.

    Raises:
        BadInput: with the file, the same on every process.
    """
    for source in sources:
        fault, count, seen = "", 0, set[int]()
        try:
            count = check_pairs(source, range(procs.rank, len(source), procs.world_size), seen)
        except BadInput as error:
            fault = str(error)
        found = procs.gather((fault, count, seen))
        if faults := [text for text, _, _ in found if text]:
            raise BadInput(faults[0])
        if procs.main:
            pairs = counted(sum(n for _, n, _ in found), "pair")
            say(f"checked {pairs} of {source.name} {source.split}")
            there = set().union(*(classes for _, _, classes in found))
            if absent := [name for i, name in enumerate(source.classes) if i not in there]:
                say(f"note: no mask of {source.split} holds {listed(absent)}")


if __name__ == "__main__":
    main()
