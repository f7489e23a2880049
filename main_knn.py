"""Weighted k-nearest-neighbour accuracy of an encoder's features, without any training.

One process on a CPU or GPU:  python main_knn.py --checkpoint RUN/checkpoint-last.pth --data_path D
Several:                      torchrun --nproc_per_node 8 main_knn.py --checkpoint ...
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_interrupt

    take_interrupt()

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

import models_zoo
from util.config.flag_parser import load_plugins
from util.config.flags import (
    FlagParser,
    add_data_flags,
    add_device_flag,
    add_dry_run_flags,
    add_heads_flag,
    add_split_flags,
    add_weights_key_flag,
    number,
)
from util.console import counted, print_text, visible_line
from util.data.class_names import check_splits
from util.data.datasets import DATASETS, SPLITS, build_dataset
from util.data.loading import say_conversions
from util.data.randomness import EvalSampler, evenly
from util.data.replace import fault_of
from util.data.samples import Samples, build_loader, default_workers
from util.data.source import Source, Subset
from util.data.splits import hold_out_of
from util.data.transforms import EvalTransform, normalize
from util.dry_run.cost import count_forward
from util.dry_run.report import Features, describe_features
from util.dry_run.training import look_at_data, processes_of
from util.errors import BadInput, CannotWrite, command
from util.files import create_temporary, sync, sync_folder, write_text, writing
from util.flag_types import MOST_IN_BATCH, expanded_path
from util.measure.knn import Bank, neighbours, rank_of, unit, vote
from util.progress import Progress, say
from util.train.advice import check_settings, say_warnings, warn_of_flags
from util.train.dist import Processes, processes
from util.train.logger import prepare_folder
from util.train.rank_log import rank_log
from util.train.results import MEASURED, identity_of, measured_on, set_others_aside
from util.weights.assumed import ASSUMED, assumptions, set_statistics
from util.weights.load_table import LOADED

RESULT = "knn.json"
FEATURES = ("cls", "avg", "both")
# Images whose labels no file lists are few and quickly drawn: up to so many are read beforehand.
FEW = 4096
NAMED = 10  # broken images that are named on the screen; the result names all


def build_parser() -> FlagParser:
    """The flags."""
    parser = FlagParser(
        description=__doc__.split("\n")[0],
        example="python main_knn.py --checkpoint RUN/checkpoint-last.pth --data_path DATA \\\n"
        "  --output_dir runs/knn",
        first=(
            "checkpoint", "model", "data_path", "dataset", "input_size", "features", "k",
            "train_images", "val_images", "batch_size", "output_dir", "save_features", "device",
        ),
    )  # fmt: skip
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        type=expanded_path,
        metavar="FILE",
        help="weights of ours, official MAE or timm: a file or https URL; no default",
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help="encoder's name, for weights that do not say; default: by the file",
    )
    add_heads_flag(group)
    add_weights_key_flag(group)
    group.add_argument(
        "--pos_resize",
        choices=("rescale", "extend"),
        default="rescale",
        help="positions at another --input_size: rescale keeps the image's extent, extend the "
        "distance of patches",
    )
    add_data_flags(parser, list(DATASETS))
    add_split_flags(parser)
    group = parser.add_argument_group("features and neighbours")
    group.add_argument(
        "--features",
        choices=FEATURES,
        default="avg",
        help="class token, mean of the patch tokens, or both, one after the other",
    )
    group.add_argument(
        "--k", type=number(int, 1), nargs="+", default=[20], help="neighbours; several in one pass"
    )
    group.add_argument(
        "--temperature",
        type=number(float, 0, open_low=True),
        default=0.07,
        help="of the weight exp(similarity / temperature) of a neighbour's vote",
    )
    for name, what in (("train_images", "neighbours among"), ("val_images", "classify")):
        group.add_argument(
            f"--{name}", type=number(int, 1), help=f"{what} so many, evenly spaced; default: all"
        )
    group.add_argument(
        "--batch_size", type=number(int, 1, MOST_IN_BATCH), default=128, help="images per process"
    )
    group.add_argument(
        "--query_chunk",
        type=number(int, 1),
        default=2048,
        help="queries at a time, over all processes; changes memory and time, never the result",
    )
    group.add_argument(
        "--bank_chunk",
        type=number(int, 1),
        default=8192,
        help="training images that they are compared with at a time, per process",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", type=expanded_path, default="./output_dir", help=f"folder for {RESULT}"
    )
    add_device_flag(group)
    group.add_argument(
        "--save_features",
        action="store_true",
        help="also write the features; features-{train,val}.npy, float32 [N, D], not normalised, "
        "in the order of files-{train,val}.txt, and labels-{train,val}.npy, -1 without labels and "
        "(beside a row of zeros) for undecodable images; without labels or with one split these "
        "alone",
    )
    add_dry_run_flags(parser)
    return parser


def open_sets(args: argparse.Namespace) -> tuple[dict[str, Source], str | None]:
    """The splits, and why there can be no vote; None: there can.

    Features alone need no labels and no second split: with --save_features those of what is there
    are of use.

    Raises:
        BadInput: no split, or without --save_features a vote that cannot be.
    """
    sources: dict[str, Source] = {}
    absent: list[BadInput] = []
    limits = dict(zip(SPLITS, (args.train_images, args.val_images), strict=True))
    for split in SPLITS:
        try:
            source = build_dataset(
                args.dataset,
                split,
                args.data_path,
                max_pixels=args.max_pixels,
                hold_out=hold_out_of(vars(args)),
            )
        except BadInput as error:
            absent.append(error)
            continue
        limit = limits[split]
        sources[split] = source if limit is None else Subset(source, evenly(len(source), limit))
    try:
        if absent:
            raise absent[0]
        check_labels(sources)
    except BadInput as error:
        if not sources:
            raise
        if not args.save_features:
            raise BadInput(f"{error}; or take the features alone with --save_features") from error
        return sources, str(error)
    return sources, None


def check_labels(sources: dict[str, Source]) -> None:
    """See that both splits have labels, and the same classes, before hours of features.

    Raises:
        BadInput: they do not.
    """
    train, val = (sources[split] for split in SPLITS)
    known = [labels_of(source) for source in (train, val)]
    for source, labels in zip((train, val), known, strict=True):
        if not source.labelled or (labels is not None and labels.min() < 0):
            raise BadInput(
                f"{source.name} has no labels in {source.split}, and neighbours vote with theirs; "
                "choose another --dataset, or images in class folders"
            )
    check_splits(train.classes, val.classes, train.name)
    of_train, of_val = known
    if of_train is not None and of_val is not None and not np.isin(of_val, of_train).any():
        raise BadInput(
            f"no image in val of {val.name} is of a class that train has, so no neighbour can be "
            "right; choose another --dataset"
        )


def labels_of(source: Source) -> np.ndarray | None:
    """All labels of a set that lists them, or is small: int [N]. None: only its images say."""
    if hasattr(source, "labels"):
        return np.asarray(source.labels)
    if len(source) > FEW:
        return None
    return np.array([source[i][1] for i in range(len(source))])


class FeatureFiles:
    """`features-{split}.npy` and `labels-{split}.npy`, into which each process writes its own rows.

    Written under temporary names, which `close` changes. Rows go by position and not through a
    memory map: maps of one page on two machines would overwrite each other's rows.

    Args:
        folder: takes the files.
        split: train | val.
        shape: (N, D) of the features.

    Raises:
        BadInput: the disk has no room or the folder is not writable.
        CannotWrite: later on.
    """

    def __init__(self, folder: Path, split: str, shape: tuple[int, int], procs: Processes) -> None:
        self.paths = [folder / f"{name}-{split}.npy" for name in ("features", "labels")]
        self.procs, self.row_bytes = procs, (4 * shape[1], 8)
        needed = shape[0] * sum(self.row_bytes)
        free = shutil.disk_usage(folder).free
        procs.barrier()  # all have asked before one takes the space
        if needed > free:
            raise BadInput(
                f"the features of {split} take {needed:,} bytes, and {folder} has {free:,}; choose "
                "another --output_dir, or leave --save_features out"
            )
        try:
            self.created: list[BinaryIO] = []  # open, and so locked: see `util.files.sweep`
            with procs.main_first():
                names = self._create(shape) if procs.main else []
            self.temporary = procs.gather(names)[0]
            self.offsets = [np.lib.format.open_memmap(path, "r").offset for path in self.temporary]
            self.files = [path.open("r+b", buffering=0) for path in self.temporary]
        except OSError as error:
            raise BadInput(f"cannot write {self.paths[0]}: {error.strerror}") from error

    def _create(self, shape: tuple[int, int]) -> list[Path]:
        """Files of the right size, zeros and labels -1; their temporary names."""
        names = []
        for path, dtype, size, fill in zip(
            self.paths, ("<f4", "<i8"), (shape, shape[:1]), (0, -1), strict=True
        ):
            file, temporary = create_temporary(path)
            self.created.append(file)
            names.append(temporary)
            rows = np.lib.format.open_memmap(temporary, "w+", np.dtype(dtype), size)
            if fill:
                rows[:] = fill
            rows.flush()
        return names

    def write(self, index: Tensor, features: Tensor, label: Tensor) -> None:
        """Rows of this process: int64 [B], float32 [B, D], int64 [B]."""
        rows = (features.numpy().astype("<f4"), label.numpy().astype("<i8"))
        for n, values in enumerate(rows):
            for i, row in zip(index.tolist(), values, strict=True):
                try:
                    place = self.offsets[n] + i * self.row_bytes[n]
                    written = os.pwrite(self.files[n].fileno(), row.tobytes(), place)
                except OSError as error:
                    raise CannotWrite(f"cannot write {self.paths[n]}: {error.strerror}") from error
                if written < self.row_bytes[n]:
                    raise CannotWrite(f"cannot write {self.paths[n]}: the disk is full")

    def close(self) -> None:
        """Give the files their names. A collective."""
        with writing(self.paths[0]):
            for file in self.files:
                sync(file.fileno())
                file.close()
            self.procs.barrier()
            if self.procs.main:
                for temporary, path in zip(self.temporary, self.paths, strict=True):
                    os.replace(temporary, path)
                sync_folder(self.paths[0].parent)
            for file in self.created:
                file.close()


@torch.inference_mode()
def features_of(model: Any, images: Tensor, kind: str, source: Source) -> Tensor:
    """uint8 [B, C, H, W], on the model's device, to float32 [B, D] or [B, 2D] on the CPU."""
    return model.features(normalize(images, source.mean, source.std), kind).float().cpu()


def extract(
    model: Any,
    source: Source,
    kind: str,
    procs: Processes,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    prefetch_factor: int = 2,
    files: FeatureFiles | None = None,
    labels_needed: bool = True,
) -> tuple[Bank, list[int]]:
    """Features of this process's share of a split. A collective.

    Args:
        kind: cls | avg | both.
        batch_size, num_workers: per process.
        prefetch_factor: batches that each worker has ready.
        files: take the features as they are.
        labels_needed: whether images without a label are refused.

    Returns:
        unit features of the images that could be decoded; the indices of those of all processes
        that could not.

    Raises:
        BadInput: features that are not finite, or images without a label; on every process alike.
    """
    transform = EvalTransform(model.img_size, margin=source.eval_margin)
    sampler = EvalSampler(
        range(len(source)), batch_size, world_size=procs.world_size, rank=procs.rank
    )
    loader = build_loader(
        Samples(source, transform, seed=0),
        sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
    )
    share = len(sampler.indices)
    bank = Bank(
        torch.empty(share, width_of(model, kind)),
        torch.empty(share, dtype=torch.int64),
        torch.empty(share, dtype=torch.int64),
    )
    done, bad, finite, labelled = 0, [], True, True
    name = f"features of {source.split}"
    with Progress(len(sampler), show=procs.main, unit="batch", where=lambda _: name) as bar:
        for batch in loader:
            images = batch["x"].to(procs.device, non_blocking=True)
            features = features_of(model, images, kind, source)
            finite = finite and bool(features.isfinite().all())
            labelled = labelled and bool((batch["y"] >= 0).all())
            # What stands in for an image that cannot be decoded has had, or gets, its own turn.
            good = batch["bad"][:, 0] < 0
            bad += batch["index"][~good].tolist()
            features, index, label = (t[good] for t in (features, batch["index"], batch["y"]))
            if files is not None:
                # Of a set that is no set of classes, the numbers of its labels are nobody's.
                known = label if source.labelled else torch.full_like(label, -1)
                files.write(index, features, known)
            rows = slice(done, done + len(index))
            bank.features[rows], bank.number[rows], bank.label[rows] = unit(features), index, label
            done = rows.stop
            bar.update()
    say_conversions(loader, procs.gather)
    if not all(procs.gather(labelled or not labels_needed)):
        raise BadInput(f"{source.name} has images without a label in {source.split}")
    if not all(procs.gather(finite)):
        raise BadInput(f"the checkpoint's features of {source.split} are not finite (NaN, inf)")
    everyones = sorted(i for part in procs.gather(bad) for i in part)
    return Bank(*(tensor[:done] for tensor in bank)), everyones


def width_of(model: Any, kind: str) -> int:
    """Features of one image."""
    return model.num_features * (2 if kind == "both" else 1)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure one encoder; see the module."""
    load_plugins(argv)
    parser = build_parser()
    args = parser.parse(argv)
    check_settings(vars(args))
    warnings = warn_of_flags(vars(args), parser.given)
    if not args.checkpoint:
        raise BadInput("--checkpoint is missing: whose features are to be measured?")
    if args.dry_run:
        count, speaks = processes_of(args.dry_run_processes, Path(args.output_dir))
        if speaks:
            print_text(plan_run(args, count))
        return
    with processes(args.device, Path(args.output_dir)) as procs:
        measure(args, procs, warnings)


def plan_run(args: argparse.Namespace, count: int) -> str:
    """What the features would cost on `count` processes."""
    if args.dry_run_measure:
        raise BadInput("main_knn measures no rate beforehand; give --images_per_second X")
    data = look_at_data(
        args.dataset,
        args.data_path,
        args.dry_run_images,
        lambda: build_dataset(
            args.dataset, "train", args.data_path, hold_out=hold_out_of(vars(args))
        ),
        hold_out_of(vars(args)),
    )
    if args.checkpoint.startswith("https:") or Path(args.checkpoint).exists():
        model, state = models_zoo.load_encoder(
            args.checkpoint,
            args.model,
            img_size=args.input_size,
            pos_resize=args.pos_resize,
            num_heads=args.num_heads,
            weights_key=args.weights_key,
        )
        statistics = set_statistics(args.mean)
        for line in [*state[LOADED], *assumptions(state, args.checkpoint, statistics)]:
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
            width=width_of(model, args.features),
            images_per_second=args.images_per_second,
        )
    )


def measure(args: argparse.Namespace, procs: Processes, warnings: Sequence[str]) -> None:
    """The run, from top to bottom."""
    # ------------------------------------------------------------------ run and processes
    device, folder = procs.device, Path(args.output_dir)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    # ------------------------------------------------------------------------------- data
    # One process lists a folder or fetches a set; the others find what it left on the disk.
    with procs.main_first():
        sources, no_vote = open_sets(args)
    votes = no_vote is None
    if votes and max(args.k) > len(sources["train"]):
        size = counted(len(sources["train"]), "image")
        raise BadInput(f"k is {max(args.k)}, but the bank holds {size}; lower --k")

    # ------------------------------------------------------------------------------ model
    with procs.main_first():
        model, state = models_zoo.load_encoder(
            args.checkpoint,
            args.model,
            img_size=args.input_size,
            pos_resize=args.pos_resize,
            num_heads=args.num_heads,
            weights_key=args.weights_key,
        )
    model.to(device).eval()
    sources = {
        split: source.with_channels(model.in_chans).with_stats(args.mean, args.std)
        for split, source in sources.items()
    }
    prepare_folder(folder)

    with rank_log(folder, procs.rank):
        if procs.main:
            say_warnings(warnings)
            statistics = set_statistics(args.mean)
            for line in [*state[LOADED], *assumptions(state, args.checkpoint, statistics)]:
                say(line)
            stats = [tuple(state.get("data", {}).get(name, ())) for name in ("mean", "std")]
            one = next(iter(sources.values()))
            if all(stats) and stats != [one.mean, one.std]:
                say(
                    f"note: the checkpoint learned with --mean {numbers(stats[0])} --std "
                    f"{numbers(stats[1])}; these images get {numbers(one.mean)} and "
                    f"{numbers(one.std)}"
                )
            if no_vote is not None:
                say(f"features alone, no neighbours and no {RESULT}: {no_vote}")

        # ---------------------------------------------------------------------- features
        banks, bad = {}, {}
        workers = args.num_workers
        # The smaller part first: an image of it that cannot be decoded ends the run.
        for source in (sources[split] for split in reversed(SPLITS) if split in sources):
            files = None
            if args.save_features:
                shape = (len(source), width_of(model, args.features))
                files = FeatureFiles(folder, source.split, shape, procs)
            banks[source.split], bad[source.split] = extract(
                model,
                source,
                args.features,
                procs,
                batch_size=args.batch_size,
                num_workers=default_workers(procs.local_size) if workers is None else workers,
                pin_memory=args.pin_mem and device.type == "cuda",
                prefetch_factor=args.prefetch_factor,
                files=files,
                labels_needed=votes,
            )
            if files is not None:
                files.close()
                if procs.main:
                    lines = (visible_line(source.file_name(i)) for i in range(len(source)))
                    write_text(folder / f"files-{source.split}.txt", "\n".join([*lines, ""]))
            broken = bad[source.split]
            named = broken[:NAMED] if votes else broken
            names = [f"{source.file_name(i)}: {fault_of(source, i)}" for i in named]
            if broken and votes and source.split == "val":
                raise BadInput(
                    f"{len(broken)} of {counted(len(source), 'image')} to classify cannot be "
                    "decoded, and an accuracy without them would be another; replace them: "
                    f"{'; '.join(names)}"
                )
            if broken and procs.main:
                kind = "training" if source.split == "train" else source.split
                whole = counted(len(source), f"{kind} image")
                say(f"{len(broken)} of {whole} cannot be decoded, left out:")
                say("\n".join(f"  {name}" for name in names))
                if len(broken) > len(named):
                    say(f"  and {len(broken) - len(named)} more, which the result will name")
        if args.save_features and procs.main:
            say(f"features    {folder}/features-*.npy, labels-*.npy, files-*.txt")
            others = [f"features-{split}.npy" for split in SPLITS if split not in sources]
            others += [RESULT] if no_vote is not None else []
            if stale := [name for name in others if (folder / name).exists()]:
                say(f"note: {', '.join(stale)} in {folder}: of an earlier start, of other images")
        if no_vote is not None:
            return

        train, val = (sources[split] for split in SPLITS)
        # -------------------------------------------------------------------- neighbours
        classes = len(train.classes)
        hits = torch.zeros(len(args.k), 2, dtype=torch.int64)
        queries = len(banks["val"].label)
        with Progress(queries, show=procs.main, unit="query", where=lambda _: "neighbours") as bar:
            for found, label in neighbours(
                banks["val"],
                banks["train"],
                max(args.k),
                procs,
                query_chunk=args.query_chunk,
                bank_chunk=args.bank_chunk,
            ):
                for row, k in zip(hits, args.k, strict=True):
                    rank = rank_of(vote(found, k, args.temperature, classes), label)
                    row += torch.stack([(rank < 1).sum(), (rank < 5).sum()])
                bar.update(len(label))
        hits = procs.sum(hits)

        # ------------------------------------------------------------------------- close
        results = []
        for k, row in zip(args.k, hits.tolist(), strict=True):
            top1, top5 = (100 * count / len(val) for count in row)
            results.append({"k": k, "top1": top1} | ({"top5": top5} if classes > 5 else {}))
        if procs.main:
            summary = results[0] | {
                "temperature": args.temperature,
                "features": args.features,
                "images": len(val),
                "bank_images": len(train) - len(bad["train"]),
                "bad_images": [train.file_name(i) for i in bad["train"]],
                "checkpoint": args.checkpoint,
                "model": args.model or state.get("model_name"),
                "assumed": state[ASSUMED],
                "input_size": list(model.img_size),
                "dataset": args.dataset,
                "data_path": args.data_path,
                **measured_on(vars(args), state, args.checkpoint, speaks=True),
                "mean": list(val.mean),
                "std": list(val.std),
                "results": results,
            }
            settings = {n: getattr(args, n) for n in ("train_images", "val_images", "k")}
            kept = ("dataset", "data_path", "features", "temperature", "input_size", "mean", "std")
            settings |= {name: summary[name] for name in kept}
            more = ("val_fraction", "val_seed", "weights_key")
            settings |= {name: getattr(args, name) for name in more}
            if args.weights_key:
                summary["weights_key"] = args.weights_key
            summary[MEASURED] = identity_of(args.checkpoint, state.get("step"), settings)
            set_others_aside(folder, [RESULT], summary[MEASURED])
            write_text(folder / RESULT, json.dumps(summary, indent=1) + "\n")
            say(
                f"{args.features} features of {args.checkpoint}: {counted(len(val), 'image')} of "
                f"{args.dataset} among {summary['bank_images']:,}, temperature {args.temperature}"
            )
            for result in results:
                shares = [
                    f"{key} {result[key]:6.2f} %" for key in ("top1", "top5") if key in result
                ]
                say(f"  k {result['k']:4d}   {'   '.join(shares)}")
            say(f"result      {folder / RESULT}")


def numbers(values: Sequence[float]) -> str:
    """As they would be given to a flag."""
    return " ".join(f"{value:.4g}" for value in values)


if __name__ == "__main__":
    main()
