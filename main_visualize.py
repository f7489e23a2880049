"""Show what a pretrained model reconstructs: a picture grid, and each panel as a file of its own.

python main_visualize.py --checkpoint RUN/checkpoint-last.pth --images photo.jpg folder/
python main_visualize.py --checkpoint RUN/checkpoint-last.pth --dataset photos
python main_visualize.py --checkpoint RUN/checkpoint-last.pth --dataset photos --measure
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_interrupt

    take_interrupt()

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models_zoo
from engine_pretrain import (
    NOT_NUMBERS,
    OWN,
    Masker,
    Stats,
    evaluate,
    fills_of,
    flat,
    lines_of,
    masker_of,
    reconstruct,
)
from util.config.flag_parser import load_plugins
from util.config.flags import (
    FlagParser,
    add_device_flag,
    add_heads_flag,
    add_pixels_flag,
    add_split_flags,
    add_weights_key_flag,
    number,
)
from util.config.method_flags import add_mask_flags
from util.console import print_text
from util.data.conversions import describe, take
from util.data.datasets import DATASETS, DEFAULT, build_dataset
from util.data.folders import image_files
from util.data.images import IMAGENET_MEAN, IMAGENET_STD, read_image
from util.data.loading import say_conversions
from util.data.randomness import EvalSampler, evenly, generator_of
from util.data.samples import Drawn, Samples, build_loader
from util.data.source import Source
from util.data.splits import hold_out_of
from util.data.transforms import EvalTransform
from util.errors import BadInput, RunFailed, command
from util.files import save_png, write_text
from util.flag_types import MOST_WIDTH, expanded_path
from util.mask.strategies import STANDARD
from util.mask.strategies import mask_settings as all_mask_settings
from util.measure.metrics import masked_psnr
from util.measure.visualize import panels, picture_grid, save_panels
from util.train.advice import check_settings, say_warnings, warn_of_flags
from util.train.dist import choose_device
from util.train.logger import prepare_folder
from util.train.results import MEASURED, identity_of, measured_on, set_others_aside
from util.weights.assumed import assumptions
from util.weights.load_table import LOADED

RESULT = "reconstruction.json"
MEASURED_AT_ONCE = 64


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python main_visualize.py --checkpoint RUN/checkpoint-last.pth \\\n"
        "  --images PHOTOS/ --output_dir pictures",
        first=(
            "checkpoint", "images", "dataset", "data_path", "num_images", "mask", "mask_ratio",
            "seed", "measure", "output_dir", "device",
        ),
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint",
        type=expanded_path,
        metavar="FILE",
        help="of ours, or official MAE weights with their decoder; no default",
    )
    parser.add_argument(
        "--images",
        type=expanded_path,
        nargs="+",
        help="image files and folders of them; default: those of --dataset",
    )
    parser.add_argument(
        "--dataset",
        choices=list(DATASETS),
        help="held-out images of a data set; default: none, --images are shown",
    )
    parser.add_argument(
        "--data_path",
        type=expanded_path,
        help="folder of --dataset; or packed:DIR, hf:NAME_OR_DIR; default: its own place",
    )
    add_split_flags(parser)
    add_pixels_flag(parser)
    parser.add_argument("--num_images", type=number(int, 1), default=8, help="images, at most")
    group = parser.add_argument_group(
        "masks (default: those of the checkpoint's run; --measure: 75 % random, and the run's)"
    )
    add_mask_flags(group, unset="default: the run's")
    parser.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the random masks"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help=f"no pictures: PSNR and SSIM over --num_images of --dataset, into {RESULT}",
    )
    parser.add_argument(
        "--output_dir",
        type=expanded_path,
        default="./pictures",
        help="folder for grid.png and panels",
    )
    add_device_flag(parser)
    group = parser.add_argument_group("for weights that do not say what they are")
    group.add_argument(
        "--model", metavar="NAME", help="name of the model in the file; default: by the file"
    )
    add_heads_flag(group)
    add_weights_key_flag(group)
    group.add_argument(
        "--decoder_num_heads",
        type=number(int, 1, MOST_WIDTH),
        help="the same of the decoder; default alike",
    )
    group.add_argument(
        "--norm_pix_loss", action="store_true", help="the decoder predicts normalised pixels"
    )
    return parser


def open_set(args: argparse.Namespace, channels: int) -> Source:
    """The held-out images of the data set that the flags name."""
    return build_dataset(
        args.dataset,
        "val",
        args.data_path,
        channels=channels,
        max_pixels=args.max_pixels,
        hold_out=hold_out_of(vars(args)),
    )


def gather_images(args: argparse.Namespace, model: Any) -> tuple[list[str], list[Tensor]]:
    """Names and uint8 [C, H, W] images at the model's size."""
    if bool(args.images) == bool(args.dataset):
        raise BadInput("give either --images FILES, or --dataset NAME or --data_path DATA")
    if args.dataset:
        source = open_set(args, model.input.channels)
        transform = EvalTransform(model.input.image_size, margin=source.eval_margin)
        indices = evenly(len(source), args.num_images)
        return [source.file_name(i) for i in indices], [transform(source[i][0]) for i in indices]
    paths = [path for name in args.images for path in image_files(Path(name), "--images")]
    if model.input.channels not in (1, 3):
        raise BadInput(
            f"image files are gray or RGB, the model takes {model.input.channels} channels"
        )
    if len(paths) > args.num_images:
        print_text(f"{args.num_images} of {len(paths):,} images, evenly spaced (--num_images)")
    paths = [paths[i] for i in evenly(len(paths), args.num_images)]
    transform = EvalTransform(model.input.image_size, margin=False)  # show as much as fits
    read = partial(read_image, channels=model.input.channels, max_pixels=args.max_pixels)
    return [str(p) for p in paths], [transform(read(p)) for p in paths]


def mask_settings(
    args: argparse.Namespace, state: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the flags say of the masks, and the checkpoint's run had; names as in `STANDARD`."""
    trained = state.get("arithmetic", {})  # weights of other programs have none
    names = all_mask_settings()
    own = {name: trained[name] for name in names if trained.get(name) is not None}
    given = {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}
    return given, STANDARD | own


def measure(
    args: argparse.Namespace,
    model: Any,
    maskers: Sequence[Masker],
    device: torch.device,
    stats: tuple[Stats, Stats],
    identity: Mapping[str, Any],
    where: Mapping[str, str],
) -> None:
    """PSNR and SSIM on held-out images of a set, the model's own or another; see `evaluate`.

    Masks are a function of (seed, index), as in pretraining's --eval_every: with the same set,
    number of images and the default masks the numbers are those.

    Args:
        maskers: the masks to measure under, and where nobody chose them the run's own as well.
        identity: what the numbers are of, and where: on which images, see `util.train.results`.
    """
    if not args.dataset:
        raise BadInput(
            "--measure takes held-out images of a set: --dataset NAME or --data_path DATA"
        )
    mean, std = stats
    source = open_set(args, model.input.channels).with_stats(mean, std)
    transform = EvalTransform(model.input.image_size, margin=source.eval_margin)
    sampler = EvalSampler(evenly(len(source), args.num_images), MEASURED_AT_ONCE)
    masks = {name: identity[name] for name in ("mask", "mask_ratio")}
    result = {"checkpoint": args.checkpoint, "dataset": args.dataset, **masks}
    result |= {"images": sampler.total, **where}
    for prefix, masker in zip(("", OWN), maskers, strict=False):
        samples = Samples(source, transform, args.seed, Drawn(masker.strategy, masker.cells.grid))
        loader = build_loader(samples, sampler, num_workers=0, pin_memory=False)
        table = evaluate(
            model, loader, masker, mean=mean, std=std, device=device, sum_over_ranks=torch.clone
        )
        say_conversions(loader, lambda found: [found])
        result |= flat(table, prefix) | ({"own_mask": masker.words} if prefix else {})
        print_text(f"{masker.words} masks{', as the run trained' if prefix else ''}:")
        print_text("\n".join(lines_of(table)))
    folder = Path(args.output_dir)
    prepare_folder(folder)
    set_others_aside(folder, [RESULT], identity)
    write_text(folder / RESULT, json.dumps(result | {MEASURED: identity}, indent=1) + "\n")
    if note := model.note:
        print_text(note)
    print_text(f"result  {folder / RESULT}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Write the pictures; see the module."""
    load_plugins(argv)
    parser = build_parser()
    args = parser.parse(argv)
    if not args.checkpoint:
        raise BadInput("--checkpoint is missing: which model is to be shown?")
    if args.data_path and not args.dataset:
        args.dataset = DEFAULT
    check_settings(vars(args))
    say_warnings(warn_of_flags(vars(args), parser.given))
    device, folder = choose_device(args.device, 0), Path(args.output_dir)

    # ------------------------------------------------------------------------------ model
    model, state = models_zoo.load_pretrained(
        args.checkpoint,
        args.model,
        norm_pix_loss=args.norm_pix_loss or None,
        num_heads=args.num_heads,
        decoder_num_heads=args.decoder_num_heads,
        weights_key=args.weights_key,
    )
    model.to(device).eval()
    data = state.get("data", {})
    mean, std = data.get("mean"), data.get("std")
    if mean is None:  # foreign weights do not say; MAE's were trained with ImageNet's
        gray = model.input.channels == 1
        mean = [sum(IMAGENET_MEAN) / 3] if gray else IMAGENET_MEAN
        std = [sum(IMAGENET_STD) / 3] if gray else IMAGENET_STD
    statistics = "ImageNet's mean and deviation"
    for line in [*state[LOADED], *assumptions(state, args.checkpoint, statistics)]:
        print_text(line)

    # ------------------------------------------------------------------------------ masks
    given, own = mask_settings(args, state)
    if args.measure:
        settings = STANDARD | given
        maskers = [masker_of(settings, model)]
        if not given and masker_of(own, model).differs_from(maskers[0]):
            maskers.append(masker_of(own, model))
        measured = (
            "dataset", "data_path", "num_images", "seed", "val_fraction", "val_seed", "weights_key",
        )  # fmt: skip
        settings |= {name: getattr(args, name) for name in measured}
        settings["own_mask"] = maskers[-1].words if len(maskers) > 1 else None
        identity = identity_of(args.checkpoint, state.get("step"), settings)
        where = measured_on(vars(args), state, args.checkpoint, speaks=True)
        measure(args, model, maskers, device, (mean, std), identity, where)
        return
    masker = masker_of(own | given, model)

    # ----------------------------------------------------------------------------- images
    take()  # what other readers noted is not these images'
    names, images = gather_images(args, model)
    draws = [
        masker.strategy.draw(masker.cells.grid, generator_of(args.seed, "mask", 0, i, 0))
        for i in range(len(images))
    ]
    batch = torch.stack(images).to(device)
    mask = masker(batch, torch.stack(draws).to(device))

    # --------------------------------------------------------------------------- pictures
    composites = {"model": reconstruct(model, batch, mask, masker, mean, std)}
    if composites["model"].isnan().any():
        raise RunFailed(f"the reconstruction of {args.checkpoint} {NOT_NUMBERS}")
    composites |= fills_of(model, batch, mask, masker, mean, std)
    psnr = {
        arm: masked_psnr(batch, picture, mask, masker.place_size)
        for arm, picture in composites.items()
    }
    captions = [
        f"{Path(name).name}: {', '.join(f'{arm} {psnr[arm][i]:.1f}' for arm in psnr)} dB"
        for i, name in enumerate(names)
    ]
    rows = panels(batch, mask, composites["model"], masker.place_size)
    grid = picture_grid(
        rows,
        captions,
        headers=("original", f"masked {masker.words}", "reconstruction"),
        title=f"{Path(args.checkpoint).name}: PSNR over masked pixels, beside two trivial fills",
        footer=model.note,
    )
    prepare_folder(folder)
    save_png(folder / "grid.png", grid)
    for number_, (name, row) in enumerate(zip(names, rows, strict=True)):
        save_panels(folder / "panels", f"{number_:03d}-{Path(name).stem}", row)
    print_text(f"masked {masker.words}")
    print_text("\n".join([*describe(take()), *captions]))
    print_text(f"grid    {folder / 'grid.png'}\npanels  {folder / 'panels'}")


if __name__ == "__main__":
    main()
