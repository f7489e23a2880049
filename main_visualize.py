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
from pathlib import Path
from typing import Any

import torch

from build_visualize import (
    choose_maskers,
    gather_images,
    mask_settings,
    open_model,
    open_set,
    say_reading,
)
from engine_pretrain import (
    NOT_NUMBERS,
    OWN,
    Stats,
    build_masker,
    draw_masks,
    evaluate,
    find_statistics,
    flat,
    format_table,
    make_fills,
    reconstruct,
)
from util.config.flag_parser import load_plugins
from util.config.visualize_flags import RESULT, build_parser
from util.console import print_text
from util.data.conversions import describe, take
from util.data.datasets import DEFAULT
from util.data.loading import say_conversions
from util.data.randomness import EvalSampler, evenly
from util.data.samples import Drawn, Samples, build_loader
from util.data.transforms import EvalTransform
from util.errors import BadInput, RunFailed, command
from util.files import save_png, write_text
from util.measure.metrics import masked_psnr
from util.measure.visualize import panels, picture_grid, save_panels
from util.train.advice import check_settings, say_warnings, warn_of_flags
from util.train.dist import choose_device
from util.train.logger import prepare_folder
from util.train.results import MEASURED, make_identity, measured_on, set_others_aside

MEASURED_AT_ONCE = 64
# Flags that decide what is measured, beside those of the masks.
MEASURED_BY = (
    "dataset", "data_path", "num_images", "seed", "val_fraction", "val_seed", "weights_key",
)  # fmt: skip


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
    device = choose_device(args.device, 0)
    model, state = open_model(args)
    model.to(device).eval()
    stats = find_statistics(state, model.input.channels)
    say_reading(args, state)
    if args.measure:
        measure(args, model, state, device, stats)
    else:
        show(args, model, state, device, stats)


def show(
    args: argparse.Namespace,
    model: Any,
    state: Mapping[str, Any],
    device: torch.device,
    stats: tuple[Stats, Stats],
) -> None:
    """Mask images, have the model reconstruct them, and write the pictures.

    Args:
        state: what the checkpoint holds beside the model.
        stats: mean and deviation of each channel, in 0..1 units.

    Raises:
        RunFailed: the reconstruction is not numbers.
    """
    # --------------------------------------------------------------------- masks and images
    folder, (mean, std) = Path(args.output_dir), stats
    given, own = mask_settings(args, state)
    masker = build_masker(own | given, model)
    take()  # what other readers noted is not these images'
    names, images = gather_images(args, model)
    batch = torch.stack(images).to(device)
    mask = draw_masks(batch, masker, args.seed)

    # --------------------------------------------------------------------------- pictures
    composites = {"model": reconstruct(model, batch, mask, masker, mean, std)}
    if composites["model"].isnan().any():
        raise RunFailed(f"the reconstruction of {args.checkpoint} {NOT_NUMBERS}")
    composites |= make_fills(model, batch, mask, masker, mean, std)
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

    # ------------------------------------------------------------------------------ files
    prepare_folder(folder)
    save_png(folder / "grid.png", grid)
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        save_panels(folder / "panels", f"{number:03d}-{Path(name).stem}", row)
    print_text(f"masked {masker.words}")
    print_text("\n".join([*describe(take()), *captions]))
    print_text(f"grid    {folder / 'grid.png'}\npanels  {folder / 'panels'}")


def measure(
    args: argparse.Namespace,
    model: Any,
    state: Mapping[str, Any],
    device: torch.device,
    stats: tuple[Stats, Stats],
) -> None:
    """PSNR and SSIM on held-out images of a set, the model's own or another; see `evaluate`.

    Masks are a function of (seed, index), as in pretraining's --eval_every: with the same set,
    number of images and the default masks the numbers are those. Arguments as of `show`.

    Raises:
        BadInput: no set is given.
    """
    settings, maskers = choose_maskers(args, model, state)
    settings |= {name: getattr(args, name) for name in MEASURED_BY}
    settings["own_mask"] = maskers[-1].words if len(maskers) > 1 else None
    identity = make_identity(args.checkpoint, state.get("step"), settings)
    where = measured_on(vars(args), state, args.checkpoint, speaks=True)
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
        print_text("\n".join(format_table(table)))
    folder = Path(args.output_dir)
    prepare_folder(folder)
    set_others_aside(folder, [RESULT], identity)
    write_text(folder / RESULT, json.dumps(result | {MEASURED: identity}, indent=1) + "\n")
    if note := model.note:
        print_text(note)
    print_text(f"result  {folder / RESULT}")


if __name__ == "__main__":
    main()
