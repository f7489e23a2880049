"""`main_finetune.py --eval`: one checkpoint measured on the held-out split."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import models_zoo
from build_finetune import TASK, describe_loading, open_set
from engine_finetune import eval_loader, measurement, say_accuracy
from util.data.class_names import as_trained
from util.data.samples import default_workers
from util.data.source import Source
from util.data.splits import read_hold_out
from util.errors import BadInput
from util.measure.accuracy import EVAL_FILES, RUN_FILES, Accuracy, save_accuracy
from util.progress import say
from util.train import checkpoint as ckpt
from util.train.dist import Processes
from util.train.logger import prepare_folder
from util.train.results import MEASURED, chosen_on, make_identity, measured_on, set_others_aside
from util.weights.assumed import check_given
from util.weights.files import load_state


def evaluate_checkpoint(args: argparse.Namespace, procs: Processes) -> None:
    """Measure one checkpoint on the held-out split, and write what was measured."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
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
        model, _, state = models_zoo.build_classifier(
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
        for line in describe_loading(args, state, path):
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
    identity = make_identity(path, state.get("step"), measured_settings(args, model))
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


def save_result(
    args: argparse.Namespace, result: Accuracy, source: Source, more: dict[str, Any]
) -> None:
    """Write what the last epoch of a run measured.

    Args:
        source: training images, for the names of the classes.
        more: to be written beside it.
    """
    folder, where = Path(args.output_dir), read_hold_out(vars(args)).words
    more |= {"dataset": args.dataset, "measured_on": where, "best_chosen_on": where}
    more[MEASURED] = {"task": TASK}  # tasks may share a folder
    set_others_aside(folder, RUN_FILES, more[MEASURED])
    save_accuracy(folder, result, source.classes, more)
