"""Say what is on images: classes by a fine-tuned classifier, label maps by a segmenter.

    python main_predict.py --checkpoint RUN/checkpoint-best.pth --data_path FOLDER --output_dir OUT

FOLDER may be a folder with sub-folders, one image, or a text file that names images; no labels are
needed. A classifier writes OUT/predictions.csv, and predictions.json with what they are of; a
segmenter OUT/maps and OUT/overlays.
Several processes: torchrun --nproc_per_node 8 main_predict.py ...
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_interrupt

    take_interrupt()

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models_segmenters
import models_zoo
from engine_finetune import classify
from engine_segment import Inference, write_label_maps
from util.config.flag_parser import load_plugins
from util.config.predict_flags import RESULT, build_parser
from util.config.segment_flags import LOOKS_BY_DEFAULT
from util.config.weights_flags import encoder_options
from util.console import counted
from util.data.loading import say_conversions
from util.data.randomness import EvalSampler
from util.data.samples import build_loader, default_workers
from util.data.transforms import EvalTransform, has_margin
from util.errors import BadInput, RunFailed, command
from util.files import write_text
from util.measure.predictions import (
    FileSamples,
    Prediction,
    file_source,
    find_images,
    names_of_classes,
    write_predictions,
)
from util.progress import Progress, say
from util.train import checkpoint as ckpt
from util.train.advice import check_settings, say_warnings, warn_of_flags
from util.train.dist import Processes, processes
from util.train.logger import prepare_folder
from util.train.results import MEASURED, make_identity, set_others_aside
from util.weights.files import load_state, take_averaged, weights_file
from util.weights.load_table import describe_reading

ABOUT = "predictions.json"
# Flags that decide what is predicted.
PREDICTED_BY = (
    "data_path", "top_k", "ema", "input_size", "pos_resize", "mean", "std", "max_pixels", "model",
    "num_heads", "weights_key",
)  # fmt: skip
FOR_CLASSES = ("top_k", "ema", "input_size", "pos_resize")  # flags that a segmenter has no use for
NAMED = 5  # images that cannot be decoded and are named on the screen; the table names all


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Predict once; see the module."""
    load_plugins(argv)
    parser = build_parser()
    args = parser.parse(argv)
    for name, what in (("checkpoint", "whose predictions"), ("data_path", "which images")):
        if not getattr(args, name):
            raise BadInput(f"--{name} is missing: {what}?")
    check_settings(vars(args))
    warnings = warn_of_flags(vars(args), parser.given)
    with processes(args.device, Path(args.output_dir)) as procs:
        if procs.main:
            say_warnings(warnings)
        with procs.main_first():  # an address is fetched once
            place = weights_file(args.checkpoint)
        whole = place.suffix != ".onnx" and not place.is_dir()
        state = ckpt.load_file(place) if whole else {}
        if state and models_segmenters.holds_segmenter(state, args.checkpoint, args.weights_key):
            if refused := [f"--{name}" for name in FOR_CLASSES if name in parser.given]:
                raise BadInput(
                    f"{args.checkpoint} is a segmenter, which takes no {' and no '.join(refused)}"
                )
            segment_files(args, procs, state)
        else:
            classify_files(args, procs, state or None)


def segment_files(args: argparse.Namespace, procs: Processes, state: dict[str, Any]) -> None:
    """Write label maps, as main_segment.py --predict does with the checkpoint's own settings."""
    model, state = models_segmenters.build_segmenter(
        state, args.checkpoint, args.model, args.num_heads, args.weights_key
    )
    say_assumed(args, state, procs)
    model.to(procs.device)
    trained_on = state.get("data", {})
    looks = {name: trained_on.get(name, value) for name, value in LOOKS_BY_DEFAULT.items()}
    write_label_maps(
        model,
        [Path(args.data_path)],
        Path(args.output_dir),
        state.get("classes"),
        Inference(looks["inference"] == "slide", looks["window"], looks["stride"]),
        procs,
        flag="--data_path",
        scale=looks["resize"],
        mean=args.mean or trained_on.get("mean"),
        std=args.std or trained_on.get("std"),
        num_workers=args.num_workers,
        max_pixels=args.max_pixels,
        strict=False,
    )


def read_classifier(
    args: argparse.Namespace, read: dict[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """The classifier of --checkpoint, and what else the file holds.

    Args:
        read: contents of the file, if it was read before.

    Raises:
        BadInput: it is none.
    """
    state = load_state(args.checkpoint, args.weights_key, read)
    if state.get("task") == "pretrain":
        raise BadInput(
            f"{args.checkpoint} is a pretraining checkpoint, which knows no classes; fine-tune it "
            f"first: main_finetune.py --finetune {args.checkpoint} --data_path DATA"
        )
    if args.ema:
        take_averaged(state, args.checkpoint)
    model, _, state = models_zoo.build_classifier(
        state, args.checkpoint, head="own", **encoder_options(args)
    )
    return model, state


def say_assumed(args: argparse.Namespace, state: dict[str, Any], procs: Processes) -> None:
    """What was taken from the file, and what it does not say."""
    if procs.main:
        statistics = "ImageNet's mean and deviation (else --mean, --std)"
        for line in describe_reading(state, args.checkpoint, None if args.mean else statistics):
            say(line)


def classify_files(args: argparse.Namespace, procs: Processes, read: dict[str, Any] | None) -> None:
    """Write the most likely classes of each image."""
    model, state = read_classifier(args, read)
    with procs.main_first():
        root, names = find_images(Path(args.data_path), "--data_path")
    # The images are looked at as main_finetune.py evaluates.
    data = state.get("data", {})
    source = file_source(root, names).with_channels(model.in_chans)
    source = source.with_stats(args.mean or data.get("mean"), args.std or data.get("std"))
    source = source.with_max_pixels(args.max_pixels)
    transform = EvalTransform(model.img_size, margin=has_margin(data))
    classes = names_of_classes(state.get("classes"), model.num_classes)
    top = min(args.top_k, model.num_classes)
    prepare_folder(Path(args.output_dir))
    say_assumed(args, state, procs)
    if procs.main:
        if state.get("classes") is None:
            say(f"{args.checkpoint} does not name its classes: they are numbers, counted from 0")
        if "ema" in state and not args.ema:
            say(f"{args.checkpoint} holds averaged weights too (--ema)")

    sampler = EvalSampler(
        range(len(source)), args.batch_size, world_size=procs.world_size, rank=procs.rank
    )
    workers = default_workers(procs.local_size) if args.num_workers is None else args.num_workers
    loader = build_loader(
        FileSamples(source, transform, (source.channels, *model.img_size)),
        sampler,
        num_workers=workers,
        pin_memory=procs.device.type == "cuda",
    )
    model.to(procs.device)
    own: list[Prediction] = []
    with Progress(len(sampler), show=procs.main, unit="batch") as bar:
        for some in classify(
            model, loader, top, mean=source.mean, std=source.std, device=procs.device
        ):
            own += some
            bar.update()
    say_conversions(loader, procs.gather)
    found = sorted(one for part in procs.gather(own) for one in part)
    if broken := [one for one in found if not all(map(math.isfinite, one.probabilities))]:
        raise RunFailed(
            f"the logits of {len(broken)} images are not finite numbers: the first is "
            f"{names[broken[0].number]}"
        )
    if procs.main:
        save_predictions(args, state, found, names, classes, top)
    if found and all(one.fault for one in found):
        raise RunFailed(f"no image of {args.data_path} can be decoded")


def save_predictions(
    args: argparse.Namespace,
    state: dict[str, Any],
    found: Sequence[Prediction],
    names: Sequence[str],
    classes: Sequence[str],
    top: int,
) -> None:
    """Write the table and what it is of, and say what cannot be decoded.

    Args:
        state: what the checkpoint holds.
        found: of every image, in order. names: of the files. classes: names, by index.
        top: how many classes a row holds.
    """
    folder = Path(args.output_dir)
    bad = [one for one in found if one.fault]
    settings = {name: getattr(args, name) for name in PREDICTED_BY}
    identity = make_identity(args.checkpoint, state.get("step"), settings)
    set_others_aside(folder, (ABOUT, RESULT), identity)
    write_predictions(folder / RESULT, names, found, classes, top)
    about = {"images": len(found), "cannot_be_decoded": len(bad), MEASURED: identity}
    write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    for one in bad[:NAMED]:
        say(f"cannot decode {names[one.number]}: {one.fault}")
    rest = f", {len(bad):,} of them cannot be decoded (column error)" if bad else ""
    say(f"{counted(len(found), 'image')}{rest}: {folder / RESULT}")


if __name__ == "__main__":
    main()
