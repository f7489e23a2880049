"""`main_knn.py --dry_run`: what the features would cost."""

import argparse
from pathlib import Path
from typing import Any

import torch

import models_zoo
from build_knn import describe_encoder, open_encoder
from util.data.datasets import build_dataset
from util.data.splits import read_hold_out
from util.dry_run.cost import count_forward
from util.dry_run.report import Features, describe_features
from util.dry_run.training import look_at_data
from util.errors import BadInput
from util.measure.features import feature_width
from util.progress import say


def plan_run(args: argparse.Namespace, count: int) -> str:
    """What the features would cost on `count` processes."""
    if args.dry_run_measure:
        raise BadInput("main_knn measures no rate beforehand; give --images_per_second X")
    data = look_at_data(
        args.dataset,
        args.data_path,
        args.dry_run_images,
        lambda: build_dataset(
            args.dataset, "train", args.data_path, hold_out=read_hold_out(vars(args))
        ),
        read_hold_out(vars(args)),
    )
    if args.checkpoint.startswith("https:") or Path(args.checkpoint).exists():
        model, state = open_encoder(args)
        for line in describe_encoder(args, state):
            say(line)
    elif args.model is None:
        raise BadInput(
            f"--checkpoint {args.checkpoint} is not there, and it says which model this is; give "
            "--model NAME to plan without it"
        )
    else:
        size = {} if args.input_size is None else {"img_size": args.input_size}
        with torch.device("meta"):
            model = models_zoo.create_model(args.model, num_classes=0, **size)

    def drawn_features(encoder: Any, images: int) -> Any:
        size = (images, encoder.in_chans, *encoder.img_size)
        return encoder.features(torch.rand(size), args.features)

    return describe_features(
        Features(
            what=f"{args.model or args.checkpoint}, features {args.features}, k {args.k}",
            data=data,
            dataset=args.dataset,
            used=min(args.train_images or data.images, data.images),
            processes=count,
            parameters=sum(p.numel() for p in model.parameters()),
            forward=count_forward(model, drawn_features),
            width=feature_width(model, args.features),
            images_per_second=args.images_per_second,
        )
    )
