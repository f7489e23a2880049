"""Pretrain a masked autoencoder: M-MAE by default, MAE with --method mae.

One process on a CPU or GPU:  python main_pretrain.py --data_path IMAGENET ...
Several:                      torchrun --nproc_per_node 8 main_pretrain.py ...
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_signals

    take_signals()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import models_zoo
from build_pretrain import (
    TASK,
    build_model,
    build_optimizer,
    build_samples,
    fit_model,
    open_set,
    peak_lr,
    published_for,
)
from engine_pretrain import PretrainLoss, build_masker
from engine_train import train_steps
from eval_pretrain import held_out_parts, held_out_source, last_picture, measure, save_picture
from plan_pretrain import plan_run
from util.config import pretrain_flags
from util.config.flag_parser import early_values, load_plugins
from util.config.flags import FlagParser, compiles
from util.config.session_flags import session_settings
from util.console import counted, print_text
from util.dry_run.report import describe
from util.dry_run.training import plan_processes
from util.errors import command, needs
from util.progress import say
from util.train.advice import check_settings, warn_of_flags
from util.train.dist import Processes, processes
from util.train.lease import Lease, hold_folder
from util.train.run import due
from util.train.session import Session, Start

# Beside those of every main: what is only looked at.
HOUSEKEEPING = {"eval_images", "picture_every"}


def build_parser(argv: Sequence[str] = ()) -> FlagParser:
    """The flags; see `util.config.pretrain_flags`.

    Args:
        argv: a command line whose `--plugin`, `--model` and `--method` decide whose flags these
            are; M-MAE's where they say nothing.
    """
    load_plugins(argv)
    early = early_values(argv, ("model", "method"))
    kind, name = models_zoo.find_class(early["model"], early["method"])
    return pretrain_flags.build_parser(name, models_zoo.list_methods(name), kind.add_flags)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one pretraining; see the module."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(argv)
    args = parser.parse(argv)
    if args.list_models:
        print_text("\n".join(models_zoo.list_models()))
        return
    check_settings(vars(args))
    warnings = warn_of_flags(vars(args), parser.given)
    if args.dry_run:
        count, speaks = plan_processes(args.dry_run_processes, Path(args.output_dir))
        if speaks:
            print_text(describe(plan_run(args, count, warnings)))
        return
    folder = Path(args.output_dir)
    with processes(args.device, folder) as procs, hold_folder(folder, procs) as lease:
        pretrain(args, procs, lease, warnings)


def pretrain(
    args: argparse.Namespace, procs: Processes, lease: Lease | None, warnings: Sequence[str]
) -> None:
    """The run, from top to bottom."""
    # -------------------------------------------------------------------------------- start
    if args.eval_every:
        needs("skimage.metrics", "scikit-image")  # now, not after the first epochs
    args.compile = compiles(args, procs.device)
    start = Start(TASK, session_settings(args, HOUSEKEEPING), procs, lease)

    # ------------------------------------------------------------------------------- data
    # One process lists a folder or fetches a set; the others find what it left on the disk.
    with procs.main_first():
        source = open_set(args, "train", args.in_chans, args.decode)
        val_source = held_out_source(args, source)
    model, model_args = build_model(args, source.channels)
    masker = build_masker(vars(args), model)
    samples = build_samples(args, source, model, masker)
    parts = held_out_parts(args, val_source, model, masker, procs)

    # ---------------------------------------------- loader, placement, optimiser, checkpoint
    lr = peak_lr(args, model, masker.num_visible, start.global_batch)
    session = Session(
        start,
        source=source,
        samples=samples,
        model=model,
        model_name=args.model,
        model_args=model_args,
        optimizer=lambda: build_optimizer(args, model, lr),
        lr=lr,
        published=published_for(model),
        warnings=warnings,
        fit=lambda: fit_model(args, model, source, samples, start.workers, procs),
        snapshot=lambda: {
            "data": {
                "dataset": args.dataset,
                "mean": source.mean,
                "std": source.std,
                "eval_margin": source.eval_margin,
            },
        },
    )
    session.say(
        f"{args.model} ({args.method}), {sum(p.numel() for p in model.parameters()):,} "
        f"parameters; {counted(len(source), 'image')} of {args.dataset}"
    )

    # ----------------------------------------------------------------------------- epochs
    draws = tuple(model.draws)
    loss = PretrainLoss(masker, source.mean, source.std, procs.device, draws)
    step, folder = session.run.step, Path(args.output_dir)
    with session.running() as run:
        for epoch in range(run.first_epoch, args.epochs):
            measuring = bool(parts) and due(args.eval_every, epoch, args.epochs)
            drawing = bool(parts) and due(args.picture_every, epoch, args.epochs)
            if not (run.stage == "measuring" and epoch == run.first_epoch):
                session.start_epoch(epoch, step)
                step = train_steps(
                    session.trained,
                    session.loader,
                    session.optimizer_step,
                    loss,
                    session.rate,
                    first_step=step,
                    after_step=run.after_step,
                )
                run.end_epoch(epoch, step)
                numbered = epoch if due(args.save_every, epoch, args.epochs) else None
                run.save(step, "measuring" if measuring or drawing else "done", numbered)
            if measuring or drawing:
                with session.placed.whole() as whole:
                    if measuring:
                        measure(whole, parts, run.logger, step, epoch, procs)
                    if drawing and procs.main:
                        shown = "training" if val_source is source else "held-out"
                        after = counted(epoch + 1, "epoch")
                        title = f"{args.model} ({args.method}) after {after}, {shown} images"
                        save_picture(
                            whole, parts[-1], run.logger, folder, title, step, epoch, procs.device
                        )
                run.save(step, "done")

        # -------------------------------------------------------------------------- close
        if procs.main:
            run.say_results()
            if (picture := last_picture(folder)) is not None:
                say(f"pictures    {picture}")


if __name__ == "__main__":
    main()
