"""Take weights to another program, or bring them from one; each file is verified before it appears.

python main_export.py --checkpoint RUN/checkpoint-last.pth --to timm --output vit.safetensors
python main_export.py --checkpoint FOLDER_OF_TRANSFORMERS --to mmae --output weights.pth
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_interrupt

    take_interrupt()

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import models_zoo
from models_layers import pair
from models_load_kinds import with_defaults
from models_segmenters import build_segmenter, holds_segmenter, mmseg_config, to_mmseg_names
from models_upernet import UperNet
from util.config.flag_parser import load_plugins
from util.config.flags import FlagParser, size_pair
from util.config.weights_flags import (
    add_autoencoder_flags,
    add_pos_resize_flag,
    autoencoder_options,
    encoder_options,
)
from util.console import print_text
from util.data.preprocessing import find_preprocessing
from util.errors import BadInput, command
from util.flag_types import expanded_path
from util.styles import EPS
from util.train.checkpoint import load_file, write_signed
from util.weights.export import appearing, check_same
from util.weights.export_model import BOUND, IMAGES, LoadedModel
from util.weights.export_targets import (
    PARTS,
    SEGMENTER_TARGETS,
    TARGETS,
    autoencoder_arguments,
    check_reading,
    check_request,
    choose_part,
    list_losses,
    unlike_mae,
)
from util.weights.files import load_state, take_averaged, weights_file
from util.weights.load_table import describe_reading


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python main_export.py --checkpoint RUN/checkpoint-last.pth --to timm \\\n"
        "  --output vit.safetensors",
        first=(
            "checkpoint", "to", "output", "part", "input_size", "keep_lscale", "ema", "model",
            "num_heads",
        ),
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint",
        type=expanded_path,
        metavar="FILE",
        help="of ours, official MAE, timm, mmsegmentation, ONNX; or a folder of transformers; "
        "path or https URL; no default",
    )
    parser.add_argument(
        "--to", choices=list(TARGETS), help="program or format to write for; no default"
    )
    parser.add_argument(
        "--output",
        type=expanded_path,
        help="file to write; for transformers a new folder, for timm either; no default",
    )
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="auto",
        help="part to export; auto: all that the file holds and --to can take",
    )
    parser.add_argument(
        "--keep_lscale",
        action="store_true",
        help="timm: leave LScale as timm's LayerScale instead of folding it; mmseg always does",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="use the averaged weights (EMA) of a fine-tuned checkpoint",
    )
    parser.add_argument(
        "--input_size",
        type=size_pair,
        help="image size of the exported model, in pixels; default: the file's",
    )
    add_pos_resize_flag(parser)
    add_autoencoder_flags(parser)
    return parser


def read_segmenter(args: argparse.Namespace) -> tuple[UperNet, dict[str, Any]] | None:
    """The whole segmenter that is to be exported, and what else its file holds; None: no such.

    Raises:
        BadInput: it was asked for, and cannot be.
    """
    asked, place = args.part == "segmenter", weights_file(args.checkpoint)
    if args.to not in SEGMENTER_TARGETS:
        if asked:
            raise BadInput(
                f"--to {args.to} takes no segmenter; {' and '.join(SEGMENTER_TARGETS)} do"
            )
        return None
    if args.part not in ("auto", "segmenter") or place.is_dir() or place.suffix == ".onnx":
        return None
    state = load_file(place)
    if not asked and not holds_segmenter(state, args.checkpoint, args.weights_key):
        return None
    if args.input_size is not None:
        raise BadInput("--input_size resizes encoders (--part encoder); a segmenter takes any size")
    return build_segmenter(state, args.checkpoint, args.model, args.num_heads, args.weights_key)


@torch.inference_mode()
def write_segmenter(
    model: UperNet, state: dict[str, Any], path: Path, args: argparse.Namespace
) -> None:
    """Write a whole segmenter, see that the file is the same function, and say what it is."""
    print_text("\n".join(describe_reading(state, args.checkpoint)))
    contents: dict[str, Any] = {k: state[k] for k in ("classes", "data") if k in state}
    contents |= {"model_args": model.arguments, "norm_eps": EPS}
    if args.to == "mmseg":
        contents = {"state_dict": to_mmseg_names(model), **contents}
    else:
        contents = {"task": "export", "step": 0, **contents, "model": model.state_dict()}
    shape = (IMAGES, model.in_chans, *model.encoder.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with appearing(path) as temporary:
        write_signed(temporary, contents)
        again, _ = build_segmenter(load_file(temporary), str(path))
        expected, found = model.eval()(images), again.eval()(images)
        line = check_same(expected, found, BOUND, "the new file")
    print_text(f"{args.checkpoint}: segmenter to {args.to}")
    print_text(f"verified  {line}\nwritten   {path}")
    if args.to == "mmseg":
        print_text(mmseg_config(model))


def read_autoencoder(args: argparse.Namespace, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A masked autoencoder with its decoder, and its arguments.

    Raises:
        BadInput: it cannot be had at that size, or the target has no room for it.
    """
    if args.input_size is not None and "model_args" in state:
        raise BadInput("--input_size resizes encoders; a model with its decoder keeps its size")
    options = autoencoder_options(args) | {"img_size": args.input_size}
    model, state = models_zoo.build_autoencoder(state, args.checkpoint, **options)
    if TARGETS[args.to].like_mae and (unlike := unlike_mae(model)):
        raise BadInput(
            f"--to {args.to} takes MAE's decoder, and this one has {unlike}; leave it out with "
            "--part encoder, for example --to timm"
        )
    arguments = autoencoder_arguments(model)
    if "lscale_init" in state.get("model_args", {}):
        arguments["lscale_init"] = state["model_args"]["lscale_init"]
    return model, arguments


def read_method(args: argparse.Namespace) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A pretrained model whose encoder is no plain vision transformer, its encoder's arguments, and
    what else the file holds.

    Raises:
        BadInput: it cannot be had at that size.
    """
    if args.input_size is not None:
        raise BadInput("--input_size resizes encoders; a model with its decoder keeps its size")
    model, state = models_zoo.load_pretrained(
        args.checkpoint, args.model, weights_key=args.weights_key
    )
    encoder = model.encoder_state()
    kind = models_zoo.ENCODER_KINDS.find(encoder.kind)
    arguments = with_defaults(kind, {**encoder.arguments, "num_classes": 0})
    return model, arguments, {**state, "encoder_kind": encoder.kind}


def read_eps(model: Any) -> float:
    """The epsilon of a model's LayerNorms."""
    return next((m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)), EPS)


def read_source(args: argparse.Namespace) -> LoadedModel:
    """Read the checkpoint, as much of it as is to be exported.

    Raises:
        BadInput: unreadable, or without the part that was asked for.
    """
    path, state = args.checkpoint, load_state(args.checkpoint, args.weights_key)
    if args.ema:
        take_averaged(state, path)
    decoder, found = models_zoo.holds_decoder(state), state
    part = choose_part(args.part, args.to, state, decoder)
    head = "own" if part == "head" else "none"
    plain = state.get("encoder_kind", "vit") == "vit"
    if part == "decoder" and plain:
        model, arguments = read_autoencoder(args, state)
    elif part == "decoder":
        notes = {name: state[name] for name in ("model", "notes", "style") if name in state}
        model, arguments, state = read_method(args)
        state = notes | state
    else:
        model, arguments, state = models_zoo.build_classifier(
            state, path, head=head, **encoder_options(args)
        )
    if part != "decoder" or not plain:
        sides = [name for name in ("img_size", "patch_size") if name in arguments]
        arguments |= {name: pair(arguments[name]) for name in sides}
        # How a model was trained does not belong to its weights.
        arguments |= {"drop_path": 0.0}

    def read_again(place: Path, name: str) -> Any:
        if part == "decoder" and not plain:
            return models_zoo.load_pretrained(str(place))[0]
        again = load_state(str(place))
        if part == "decoder":
            return models_zoo.build_autoencoder(again, name)[0]
        return models_zoo.build_classifier(again, name, head=head)[0]

    if lines := describe_reading(state, path):  # a whole one of ours goes as it is
        print_text("\n".join(lines))
    other = "other" if args.ema else "averaged (--ema)"
    lost = list_losses(found, part, other, decoder)
    size, channels = arguments["img_size"], arguments["in_chans"]
    seen, said = find_preprocessing(state.get("data", {}), size, channels)
    return LoadedModel(
        model.eval(), arguments, state, part, read_eps(model), seen, said, read_again,
        args.keep_lscale, lost,
    )  # fmt: skip


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Write one file for another program; see the module."""
    load_plugins(argv)
    args = build_parser().parse(argv)
    for name in ("checkpoint", "to", "output"):
        if not getattr(args, name):
            raise BadInput(f"--{name} is missing")
    path = Path(args.output)
    check_request(args.to, path, args.checkpoint, args.keep_lscale)
    segmenter = read_segmenter(args)
    if segmenter is not None:
        return write_segmenter(*segmenter, path, args)
    source = read_source(args)
    # At another size a file of another program has no answer to compare with.
    read = check_reading(source, args.checkpoint) if args.input_size is None else None
    lines = TARGETS[args.to].write(source, path)
    print_text(f"{args.checkpoint}: {source.part} to {args.to}")
    print_text("\n".join(f"lost      {what}" for what in source.lost) or "lost      nothing")
    if read is not None:
        print_text(f"read      {read}")
    print_text(f"verified  {lines[0]}")
    print_text(f"written   {path}")
    print_text(f"images    {source.preprocessing.describe(source.own_statistics)}")
    if len(lines) > 1:
        print_text(lines[1])


if __name__ == "__main__":
    main()
