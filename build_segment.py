"""What a segmentation is made of, from its flags: data, model, optimiser, inference."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import models_segmenters
import models_zoo
from engine_segment import Inference
from models_load_kinds import check_kind, with_defaults
from util.config.segment_flags import LR, SCALES
from util.console import counted, listed
from util.data.randomness import evenly
from util.data.samples import Samples
from util.data.segmentation_sets import build_segmentation_set, check_pairs
from util.data.segmentation_transforms import SegmentTransform
from util.data.source import Source, Subset
from util.data.splits import read_hold_out
from util.errors import BadInput
from util.progress import say
from util.train.advice import Published
from util.train.dist import Processes
from util.train.memory import create_in_memory
from util.train.optim import create_adamw, layer_decay_groups
from util.train.schedule import scaled_lr
from util.weights.assumed import ASSUMED, assumptions, set_statistics
from util.weights.convert import read_encoder
from util.weights.files import load_state
from util.weights.load_table import LOADED

TASK = "segment"
# The published run, for what is warned of.
PUBLISHED = Published(LR * 256 / 16, 16, model="ViT-B on ADE20K", images=20_000)
# Where BatchNorm has one value per channel of an image.
POOL = "over the 1 x 1 pool"


def peak_lr(args: argparse.Namespace, global_batch: int) -> float:
    """The learning rate after the warm-up; the published one does not follow the batch."""
    if args.lr is not None:
        return float(args.lr)
    return LR if args.blr is None else scaled_lr(args.blr, global_batch)


def is_users_own(args: argparse.Namespace) -> bool:
    """Whether the flags say what the values of its masks are, and not the set."""
    return args.dataset == "folder" or str(args.data_path).startswith("hf:")


def open_set(args: argparse.Namespace, split: str, classes: Sequence[str] | None = None) -> Source:
    """A split of the data set that the flags name, or as much of it as they ask for.

    Args:
        classes: of the model that is there already; they tell how many a folder has.
    """
    count = len(classes) if classes is not None and is_users_own(args) else args.nb_classes
    source = read_hold_out(vars(args)).open(
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
    )
    limit = args.train_images if split == "train" else args.val_images
    return source if limit is None else Subset(source, evenly(len(source), limit))


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
        listed = models_zoo.CLASSIFIERS.get(args.model)
        if listed is None or listed[0] is models_zoo.VisionTransformer:
            own["lscale_init"] = args.lscale_init
        elif args.lscale_init is not None:
            raise BadInput(
                f"--lscale_init with --model {args.model}, which is no vision transformer"
            )
        model = create_in_memory(
            lambda: models_zoo.create_segmenter(args.model, num_classes, **own, **more)
        )
        return model, []
    if args.patch_size:
        raise BadInput("--patch_size with --finetune: the checkpoint says what it is")
    state = load_state(args.finetune, args.weights_key)
    if state.get("encoder_kind", "vit") != "vit":
        return _model_of_kind(args, state, own | {"num_classes": num_classes})
    encoder = read_encoder(state, args.finetune, args.input_size)
    stored = encoder.arguments
    models_zoo.check_name(args.model, stored, args.finetune)
    known = ("patch_size", "in_chans", "embed_dim", "depth", "mlp_ratio", "cls_tokens")
    arguments = {name: stored[name] for name in known if name in stored}
    arguments["num_heads"], assumed = models_zoo.settle_heads(
        stored, args.finetune, args.model, args.num_heads
    )
    state[ASSUMED] = assumed + encoder.assumed
    _check_channels(stored, args.finetune)
    model = create_in_memory(
        lambda: models_zoo.segmenter_from(arguments | own | {"num_classes": num_classes})
    )
    if args.lscale_init is not None:
        model.add_lscale(args.lscale_init)
    models_segmenters.build_segmenter_encoder(state, model, args.finetune, args.pos_resize)
    statistics = set_statistics(args.mean)
    return model, [*state[LOADED], *assumptions(state, args.finetune, statistics)]


def _model_of_kind(
    args: argparse.Namespace, state: dict[str, Any], own: dict[str, Any]
) -> tuple[Any, list[str]]:
    """`new_model` from a file with an encoder that is no plain vision transformer."""
    kind, stored = state["encoder_kind"], dict(state["model_args"])
    scaled = with_defaults(models_zoo.ENCODER_KINDS.find(kind), stored).get("lscale_init")
    scales = "has no LScale" if scaled is None else "takes its scales from the file"
    for flag, given, why in (
        ("num_heads", args.num_heads, "says its own sizes"),
        ("lscale_init", args.lscale_init, scales),
    ):
        if given is not None:
            raise BadInput(f"--{flag} with {args.finetune}: an encoder of kind {kind} {why}")
    check_kind(args.model, kind, stored, args.finetune)
    _check_channels(stored, args.finetune)
    unused = ("num_classes", "global_pool", "probe", "shared_bias")
    arguments = {k: v for k, v in stored.items() if k not in unused}
    arguments |= {"encoder_kind": kind, **own}
    state[ASSUMED] = state.get("assumed", [])
    model = create_in_memory(lambda: models_zoo.segmenter_from(arguments))
    models_segmenters.build_segmenter_encoder(state, model, args.finetune, args.pos_resize)
    statistics = set_statistics(args.mean)
    return model, [*state[LOADED], *assumptions(state, args.finetune, statistics)]


def _check_channels(stored: Mapping[str, Any], path: str) -> None:
    if stored["in_chans"] != 3:
        raise BadInput(
            f"{path} takes images of {stored['in_chans']} channels; segmentation sets are RGB: "
            "pretrain on RGB images"
        )


def build_optimizer(args: argparse.Namespace, model: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW, with rates that fall from head to input."""
    groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
    return create_adamw(groups, lr, betas=(args.betas[0], args.betas[1]))


def build_inference(args: argparse.Namespace) -> Inference:
    """How label maps are made, from the flags."""
    scales = SCALES if args.multi_scale else ()
    sliding = args.inference == "slide"
    short_side = min(args.resize) if args.multi_scale else 0
    return Inference(sliding, args.window, args.stride, scales, args.flip, short_side)


def check_data(sources: Sequence[Source], procs: Processes) -> None:
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


def build_samples(args: argparse.Namespace, source: Source) -> Samples:
    """Training crops as the flags augment them."""
    transform = SegmentTransform(
        args.input_size,
        scale=(args.resize[0], args.resize[1]),
        ratio=(args.ratio_range[0], args.ratio_range[1]),
        most_of_one=args.cat_max_ratio,
        flip=not args.no_flip,
        distortion=not args.no_distortion,
    )
    return Samples(source, transform, args.seed)
