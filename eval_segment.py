"""`main_segment.py --eval` and `--predict`: a segmenter measured, or used; and drawn."""

import argparse
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models_segmenters
from build_segment import TASK, build_inference, is_users_own, open_set
from engine_segment import eval_loader, evaluate, predict, write_label_maps
from util.config.flags import collect_settings
from util.config.segment_flags import LOOKS
from util.data.class_names import check_classes
from util.data.label_maps import palette
from util.data.randomness import evenly
from util.data.samples import default_workers
from util.data.source import Source, Subset
from util.data.splits import read_hold_out
from util.errors import BadInput
from util.files import save_png
from util.measure.confusion import Segmentation
from util.measure.segmentation_results import EVAL_FILES, RUN_FILES, save_segmentation, sheet
from util.progress import say
from util.train import checkpoint as ckpt
from util.train.dist import Processes
from util.train.logger import prepare_folder
from util.train.results import MEASURED, chosen_on, make_identity, measured_on, set_others_aside
from util.weights.assumed import assumptions, check_given, set_statistics
from util.weights.load_table import LOADED

# Flags that decide what --eval measures.
MEASURED_BY = (
    *LOOKS, "dataset", "data_path", "val_images", "mean", "std", "multi_scale", "flip",
    "val_fraction", "val_seed", "weights_key",
)  # fmt: skip


def use_checkpoint(args: argparse.Namespace, procs: Processes, given: Container[str]) -> None:
    """Measure a whole segmenter on the held-out split, or segment images with it.

    Args:
        given: flags that are not to be taken from the checkpoint.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
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
    build_inference(args)  # refuses windows that cannot work
    classes = state.get("classes")
    if args.predict:
        if procs.main:
            say(f"main_predict.py --checkpoint {path} --data_path FOLDER does this too")
        write_label_maps(
            model,
            [Path(place) for place in args.predict],
            folder,
            classes,
            build_inference(args),
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
        say_result(f"{source.name} {read_hold_out(vars(args)).words}", result, len(source))
        identity = make_identity(
            path, state.get("step"), {n: getattr(args, n) for n in MEASURED_BY}
        )
        set_others_aside(folder, EVAL_FILES, identity)
        more = {"checkpoint": str(path), "dataset": source.name, "images": len(source)}
        more |= {MEASURED: identity, "chosen_on": chosen_on(path, state)}
        more |= measured_on(vars(args), state, path, speaks=True)
        save_segmentation(folder, result, source.classes, more, EVAL_FILES)
        draw(args, model, source, procs, f"{source.name} val", folder / EVAL_FILES[2])
        say(f"written     {folder}/{', '.join(EVAL_FILES[:2])}")


def look_as_trained(
    args: argparse.Namespace, trained_on: Mapping[str, Any], given: Container[str]
) -> None:
    """Take from the checkpoint how it looks at images, where no flag says otherwise, and say so."""
    own = {name: trained_on[name] for name in LOOKS if name in trained_on and name not in given}
    if not is_users_own(args):  # another set says itself what its values are
        own.pop("label_map", None)
    changed = {name: value for name, value in own.items() if value != getattr(args, name)}
    vars(args).update(changed)
    if changed:
        texts = collect_settings(argparse.Namespace(**changed))
        words = [
            f"--{name} {' '.join(map(str, texts[name]))}"
            if isinstance(texts[name], list)
            else f"--{name} {texts[name]}"
            for name in changed
        ]
        say(f"as in its training: {', '.join(words)}")


def measurement(
    args: argparse.Namespace, source: Source, num_classes: int, procs: Processes
) -> Callable[[Any], Segmentation]:
    """A function that measures a model on the held-out set. A collective."""
    workers = default_workers(procs.local_size) if args.num_workers is None else args.num_workers
    loader = eval_loader(source, args.resize, workers, procs)

    def measure(model: Any) -> Segmentation:
        return evaluate(
            model,
            loader,
            num_classes,
            build_inference(args),
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
    source: Source,
    procs: Processes,
    title: str,
    path: Path,
) -> np.ndarray | None:
    """A sheet of held-out images with labels and predictions; the main process alone draws."""
    if not args.pictures:
        return None
    shown = Subset(source, evenly(len(source), args.pictures))
    alone = Processes(0, 1, 0, 1, procs.device)
    found = predict(
        model,
        eval_loader(shown, args.resize, 0, alone),
        build_inference(args),
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
        palette(len(source.classes)),
        title,
    )
    save_png(path, picture)
    return np.asarray(picture)


def save_result(
    args: argparse.Namespace,
    result: Segmentation,
    source: Source,
    more: dict[str, Any],
) -> None:
    """Write what a run measured last.

    Args:
        source: training images, for the names of the classes.
        more: to be written beside it.
    """
    folder, where = Path(args.output_dir), read_hold_out(vars(args)).words
    more |= {"dataset": source.name, "measured_on": where, "best_chosen_on": where}
    more[MEASURED] = {"task": TASK}  # tasks may share a folder
    set_others_aside(folder, RUN_FILES, more[MEASURED])
    save_segmentation(folder, result, source.classes, more)
