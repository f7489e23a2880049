"""Pack a data set of images into a few large files, which are read many times as fast.

    python main_pack.py --data_path IMAGENET --output_dir PACKED          JPEG, short side 256
    python main_pack.py --data_path IMAGENET --output_dir PACKED --format raw
    python main_pack.py --output_dir PACKED --verify                      compare all checksums
    python main_pretrain.py --data_path packed:PACKED ...                 use it, in every command

Cut off at any moment, the same command goes on with the shards that are missing.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_interrupt

    take_interrupt()

from collections.abc import Sequence
from pathlib import Path

from util.config.flag_parser import load_plugins
from util.config.flags import FlagParser, add_pixels_flag, number
from util.console import counted
from util.data.datasets import DATASETS, SPLITS, build_dataset
from util.data.folders import NoSplit
from util.data.manifest import FORMATS, MANIFEST
from util.data.packing import BAD_IMAGES, Recipe, pack, verify
from util.data.samples import default_workers
from util.errors import BadInput, command
from util.flag_types import MOST_SIDE, expanded_path, processes_flag
from util.progress import say
from util.train.advice import check_settings, say_warnings, warn_of_flags


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python main_pack.py --data_path IMAGENET --output_dir PACKED",
        first=(
            "data_path", "dataset", "split", "output_dir", "format", "short_side", "quality",
            "num_workers", "verify",
        ),
    )  # fmt: skip
    parser.add_argument(
        "--dataset", choices=list(DATASETS), default="imagefolder", help="name of the data set"
    )
    parser.add_argument(
        "--data_path",
        type=expanded_path,
        help="folder of the data set; or hf:NAME_OR_DIR, packed:DIR; default: the data set's own "
        "place",
    )
    add_pixels_flag(parser)
    parser.add_argument(
        "--split", choices=SPLITS, nargs="+", default=list(SPLITS), help="splits to pack"
    )
    parser.add_argument(
        "--output_dir", type=expanded_path, help="folder to write train/ and val/ into; no default"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="jpeg",
        help="how images are stored; jpeg: encoded anew; raw: pixels, ten times the space; keep: "
        "the files as they are",
    )
    parser.add_argument(
        "--short_side",
        type=number(int, 0, MOST_SIDE),
        default=256,
        help="pixels to shrink larger images to; 0: none is; nor by --format keep",
    )
    parser.add_argument(
        "--quality", type=number(int, 1, 95), default=90, help="JPEG quality of --format jpeg"
    )
    parser.add_argument(
        "--max_bad_images",
        type=number(int, 0),
        default=100,
        help="stop if more images than this cannot be decoded; until then they are left out "
        "and listed",
    )
    parser.add_argument(
        "--num_workers", type=processes_flag(0), help="processes; default: the cores, at most 10"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="verify the checksums of what is packed; write nothing",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Pack, or verify; see the module."""
    load_plugins(argv)
    parser = build_parser()
    args = parser.parse(argv)
    if not args.output_dir:
        raise BadInput("--output_dir is missing: where is the packed data set to be?")
    check_settings(vars(args))
    say_warnings(warn_of_flags(vars(args), parser.given))
    folder = Path(args.output_dir)

    # ----------------------------------------------------------------------------- verify
    if args.verify:
        there = [split for split in args.split if (folder / split).is_dir()]
        if not there:
            raise BadInput(f"{folder} has no {' or '.join(args.split)} to verify")
        for split in there:
            images, checked = verify(folder / split)
            line = f"{folder / split}: {images:,} images, every byte as written"
            if not checked:
                line += (
                    f"; but {MANIFEST} is older and has no checksum, so its statistics and classes "
                    "are not compared: delete it and run the command that packed again"
                )
            say(line)
        return

    # ------------------------------------------------------------------------------- pack
    recipe = Recipe(args.format, 0 if args.format == "keep" else args.short_side, args.quality)
    workers = default_workers(1) if args.num_workers is None else args.num_workers
    sources = {}  # all of them before the first is packed, which may take hours
    for split in args.split:
        try:
            sources[split] = build_dataset(
                args.dataset, split, args.data_path, max_pixels=args.max_pixels
            )
        except NoSplit as error:
            if "split" in parser.given:
                raise
            say(f"{split} is not packed: {error.what}")
    for split, source in sources.items():
        about = pack(
            source,
            folder / split,
            recipe,
            {"dataset": args.dataset, "data_path": args.data_path, "split": split},
            num_workers=workers,
            max_bad_images=args.max_bad_images,
        )
        size = sum(shard["bytes"] for shard in about["shards"])
        say(
            f"{folder / split}: {about['images']:,} of {counted(len(source), 'image')}, "
            f"{counted(len(about['shards']), 'shard')}, {size / 1e6:,.1f} MB"
        )
        if about["images"] < len(source):
            say(f"left out, for they cannot be decoded: {folder / split / BAD_IMAGES}")
    say(f"use it: --data_path packed:{folder}")


if __name__ == "__main__":
    main()
