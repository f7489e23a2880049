"""Weighted k-nearest-neighbour accuracy of an encoder's features, without any training.

One process on a CPU or GPU:  python main_knn.py --checkpoint RUN/checkpoint-last.pth --data_path D
Several:                      torchrun --nproc_per_node 8 main_knn.py --checkpoint ...
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
from torch import Tensor

from build_knn import (
    describe_encoder,
    open_encoder,
    open_sets,
    report_broken,
    say_other_statistics,
    say_saved,
)
from plan_knn import plan_run
from util.config.flag_parser import load_plugins
from util.config.knn_flags import RESULT, build_parser
from util.console import counted, print_text
from util.data.datasets import SPLITS
from util.data.samples import default_workers
from util.data.source import Source
from util.dry_run.training import plan_processes
from util.errors import BadInput, command
from util.files import write_text
from util.measure.features import (
    FeatureFiles,
    extract_features,
    feature_width,
    write_file_names,
)
from util.measure.knn import Bank, neighbours, rank_label, vote
from util.progress import Progress, say
from util.train.advice import check_settings, say_warnings, warn_of_flags
from util.train.dist import Processes, processes
from util.train.logger import prepare_folder
from util.train.rank_log import rank_log
from util.train.results import MEASURED, make_identity, measured_on, set_others_aside
from util.weights.assumed import ASSUMED

# Flags that decide what is measured.
MEASURED_BY = (
    "train_images", "val_images", "k", "dataset", "data_path", "features", "temperature",
    "input_size", "mean", "std", "val_fraction", "val_seed", "weights_key",
)  # fmt: skip


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
        count, speaks = plan_processes(args.dry_run_processes, Path(args.output_dir))
        if speaks:
            print_text(plan_run(args, count))
        return
    with processes(args.device, Path(args.output_dir)) as procs:
        measure(args, procs, warnings)


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
        model, state = open_encoder(args)
    model.to(device).eval()
    sources = {
        split: source.with_channels(model.in_chans).with_stats(args.mean, args.std)
        for split, source in sources.items()
    }
    prepare_folder(folder)

    with rank_log(folder, procs.rank):
        if procs.main:
            say_warnings(warnings)
            for line in describe_encoder(args, state):
                say(line)
            say_other_statistics(state, next(iter(sources.values())))
            if no_vote is not None:
                say(f"features alone, no neighbours and no {RESULT}: {no_vote}")

        # ---------------------------------------------------------------------- features
        banks, bad = {}, {}
        workers = args.num_workers
        # The smaller part first: an image of it that cannot be decoded ends the run.
        for source in (sources[split] for split in reversed(SPLITS) if split in sources):
            files = None
            if args.save_features:
                shape = (len(source), feature_width(model, args.features))
                files = FeatureFiles(folder, source.split, shape, procs)
            banks[source.split], bad[source.split] = extract_features(
                model,
                source,
                args.features,
                procs,
                batch_size=args.batch_size,
                files=files,
                labels_needed=votes,
                num_workers=default_workers(procs.local_size) if workers is None else workers,
                pin_memory=args.pin_mem and device.type == "cuda",
                prefetch_factor=args.prefetch_factor,
            )
            if files is not None:
                files.close()
                if procs.main:
                    write_file_names(folder, source)
            report_broken(source, bad[source.split], votes=votes, speaks=procs.main)
        if args.save_features and procs.main:
            say_saved(folder, list(sources), votes=votes)
        if not votes:
            return

        # -------------------------------------------------------------------- neighbours
        train, val = (sources[split] for split in SPLITS)
        classes = len(train.classes)
        hits = count_hits(args, banks, classes, procs)
        results = []
        for k, row in zip(args.k, hits.tolist(), strict=True):
            top1, top5 = (100 * count / len(val) for count in row)
            results.append({"k": k, "top1": top1} | ({"top5": top5} if classes > 5 else {}))

        # ------------------------------------------------------------------------- close
        if procs.main:
            save_result(args, results, model, state, sources, bad["train"])


def count_hits(
    args: argparse.Namespace, banks: Mapping[str, Bank], classes: int, procs: Processes
) -> Tensor:
    """How many images of val their neighbours name right, over all processes. A collective.

    Args:
        banks: this process's share of the features of train and val.

    Returns:
        int64 [len(args.k), 2]: right at once, and among the first five classes.
    """
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
                rank = rank_label(vote(found, k, args.temperature, classes), label)
                row += torch.stack([(rank < 1).sum(), (rank < 5).sum()])
            bar.update(len(label))
    return procs.sum(hits)


def save_result(
    args: argparse.Namespace,
    results: Sequence[dict[str, Any]],
    model: Any,
    state: Mapping[str, Any],
    sources: Mapping[str, Source],
    left_out: Sequence[int],
) -> None:
    """Write what was measured, and say it.

    Args:
        results: for each k its shares in percent: k, top1 and, of more than five classes, top5.
        model: the encoder. state: what else its checkpoint holds.
        left_out: indices of the images of train that cannot be decoded.
    """
    folder = Path(args.output_dir)
    train, val = (sources[split] for split in SPLITS)
    summary = results[0] | {
        "temperature": args.temperature,
        "features": args.features,
        "images": len(val),
        "bank_images": len(train) - len(left_out),
        "bad_images": [train.file_name(i) for i in left_out],
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
    # The file may say these where no flag does.
    settled = vars(args) | {name: summary[name] for name in ("input_size", "mean", "std")}
    settings = {name: settled[name] for name in MEASURED_BY}
    if args.weights_key:
        summary["weights_key"] = args.weights_key
    summary[MEASURED] = make_identity(args.checkpoint, state.get("step"), settings)
    set_others_aside(folder, [RESULT], summary[MEASURED])
    write_text(folder / RESULT, json.dumps(summary, indent=1) + "\n")
    say(
        f"{args.features} features of {args.checkpoint}: {counted(len(val), 'image')} of "
        f"{args.dataset} among {summary['bank_images']:,}, temperature {args.temperature}"
    )
    for result in results:
        shares = [f"{key} {result[key]:6.2f} %" for key in ("top1", "top5") if key in result]
        say(f"  k {result['k']:4d}   {'   '.join(shares)}")
    say(f"result      {folder / RESULT}")


if __name__ == "__main__":
    main()
