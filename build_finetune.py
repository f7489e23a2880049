"""What a fine-tuning is made of, from its flags: data, model, augmentation, optimiser."""

import argparse
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

import models_zoo
from engine_finetune import BatchAugmentation
from models_protocols import count_tuned_blocks
from util.config.finetune_flags import FULL, LINEAR
from util.config.flag_parser import fill_unset
from util.data.class_names import need_labels
from util.data.datasets import DATASETS, build_dataset
from util.data.randomness import evenly
from util.data.samples import Samples
from util.data.source import Source, Subset
from util.data.splits import read_hold_out
from util.data.transforms import FinetuneTransform
from util.errors import BadInput
from util.train.advice import Published, need_two, warn_of_start
from util.train.memory import create_in_memory
from util.train.optim import create_adamw, create_lars, layer_decay_groups
from util.weights.assumed import assumptions, set_statistics
from util.weights.load_table import LOADED

TASK = "finetune"
# MAE's recipes, for what is warned of.
PUBLISHED = {
    "scratch": Published(1e-4, 4096),
    "full": Published(1e-3, 1024),
    "linear": Published(0.1, 16384),
}


def resolve_tune(args: argparse.Namespace) -> None:
    """Fill the flags that were not set from --tune, in place."""
    linear = count_tuned_blocks(args.tune) == 0
    if linear:
        args.tune = "linear"
    fill_unset(args, LINEAR if linear else FULL)


def check_batch(args: argparse.Namespace, count: int) -> None:
    """Refuse a linear probe on one image at a time; `count` processes share their statistics."""
    if args.tune == "linear":
        need_two(args.batch_size * count, "of the linear probe")


def published_for(args: argparse.Namespace) -> Published:
    """The recipe that the flags are held to."""
    if args.tune == "linear":
        return PUBLISHED["linear"]
    random = args.finetune is None and not warn_of_start(None, args.tune, args.layer_decay)
    return PUBLISHED["scratch" if random else "full"]


def open_set(args: argparse.Namespace, split: str, channels: int | None) -> Source:
    """A labelled split of the data set that the flags name, or as much of it as they ask for."""
    source = build_dataset(
        args.dataset,
        split,
        args.data_path,
        channels=channels,
        mean=args.mean,
        std=args.std,
        max_pixels=args.max_pixels,
        hold_out=read_hold_out(vars(args)),
    )
    unlabelled = ("photos", "stl10_unlabeled", "garments")
    need_labels(source, args.data_path, [name for name in DATASETS if name not in unlabelled])
    limit = args.train_images if split == "train" else args.val_images
    return source if limit is None else Subset(source, evenly(len(source), limit))


def new_model(
    args: argparse.Namespace,
    origin: dict[str, Any] | None,
    in_chans: int,
    num_classes: int,
    depth: int | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The model that the flags describe, with a fresh head, and its arguments in plain types.

    Args:
        origin: what --finetune holds; None: from scratch.
        depth: of a model from scratch, for a plan; None: that of --model.
    """
    own = {
        "num_classes": num_classes,
        "global_pool": args.global_pool,
        "probe": args.tune == "linear",
        "drop_path": args.drop_path,
    }
    if origin is not None:
        if args.probe_block is not None and args.tune != "linear":
            raise BadInput(f"--probe_block with --tune {args.tune}: it is for --tune linear")
        given = [f"--{n}" for n in ("lscale_init", "patch_size", "in_chans") if getattr(args, n)]
        if given:
            raise BadInput(f"{', '.join(given)} with --finetune: the checkpoint says what it is")
        model, arguments, _ = models_zoo.build_classifier(
            origin,
            args.finetune,
            args.model,
            img_size=args.input_size,
            pos_resize=args.pos_resize,
            num_heads=args.num_heads,
            blocks=args.probe_block,
            **own,
        )
        # As the official codes do; MAE's starts a fine-tuned head at almost nothing.
        model.init_head(0.01 if args.tune == "linear" else model.head_std)
        return model, arguments
    if args.probe_block is not None:
        raise BadInput("--probe_block without --finetune: there is nothing to probe")
    if args.weights_key is not None:
        raise BadInput("--weights_key without --finetune: there is no file to find weights in")
    if args.model is None:
        raise BadInput("give --finetune CHECKPOINT, or --model NAME to train from scratch")
    if args.num_heads:
        raise BadInput("--num_heads without --finetune: --model NAME says how many there are")
    arguments = models_zoo.model_arguments(args.model) | own
    if args.model not in models_zoo.CLASSIFIERS:
        raise BadInput(
            f"{args.model} is not a classifier; choose from {', '.join(models_zoo.CLASSIFIERS)}"
        )
    arguments["in_chans"] = in_chans
    if depth is not None:
        arguments["depth"] = depth
    for name, value in (("lscale_init", args.lscale_init), ("patch_size", args.patch_size)):
        if models_zoo.CLASSIFIERS[args.model][0] is models_zoo.VisionTransformer:
            if name == "lscale_init" or value is not None:
                arguments[name] = list(value) if isinstance(value, tuple) else value
        elif value is not None:
            raise BadInput(f"--{name} with --model {args.model}, which is no vision transformer")
    if args.input_size is not None:
        arguments["img_size"] = list(args.input_size)
    elif isinstance(arguments.get("img_size"), int):
        arguments["img_size"] = [arguments["img_size"]] * 2
    model = create_in_memory(lambda: models_zoo.create_model(args.model, **arguments))
    return model, arguments


def describe_loading(args: argparse.Namespace, state: dict[str, Any], path: str) -> list[str]:
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


def build_optimizer(args: argparse.Namespace, model: Any, lr: float) -> torch.optim.Optimizer:
    """LARS for a linear probe, else AdamW; with rates that fall from head to input."""
    groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
    if args.tune == "linear":
        return create_lars(groups, lr)
    return create_adamw(groups, lr, betas=(args.betas[0], args.betas[1]))


def build_samples(args: argparse.Namespace, source: Source, size: tuple[int, int]) -> Samples:
    """Training images as the flags augment them."""
    transform = FinetuneTransform(
        size,
        auto_augment=args.aa,
        color_jitter=args.color_jitter,
        crop_scale=tuple(args.crop_scale),
        flip=not args.no_flip,
        mean=source.mean,
    )
    return Samples(source, transform, args.seed)
