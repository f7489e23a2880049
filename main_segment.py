"""Train a segmenter (UPerNet) on a pretrained encoder, measure one, or segment images with it.

    python main_segment.py --finetune CHECKPOINT --data_path ADEChallengeData2016 ...   train
    python main_segment.py --model vit_base_patch16 ...                                 from scratch
    python main_segment.py --eval --resume CHECKPOINT --data_path DATA                  measure one
    python main_segment.py --predict FOLDER --resume CHECKPOINT --output_dir OUT        its maps

Several processes: torchrun --nproc_per_node 8 main_segment.py ...
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_signals

    take_signals()

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models_zoo
from build_segment import (
    POOL,
    PUBLISHED,
    TASK,
    build_inference,
    build_optimizer,
    build_samples,
    check_data,
    new_model,
    open_set,
    peak_lr,
)
from engine_segment import PixelLoss, SegmentLoss
from engine_train import train_steps
from eval_segment import draw, measurement, save_result, say_result, use_checkpoint
from plan_segment import plan_run
from util.config.flags import compiles
from util.config.segment_flags import LOOKS, build_parser
from util.config.session_flags import session_settings
from util.console import counted, print_text
from util.data.class_names import check_classes, check_splits
from util.dry_run.report import describe
from util.dry_run.training import plan_processes
from util.errors import BadInput, command
from util.progress import say
from util.train import checkpoint as ckpt
from util.train.advice import check_settings, need_two, warn_of_flags, warn_of_start
from util.train.dist import Processes, processes
from util.train.lease import Lease, hold_folder
from util.train.session import Session, Start

# Beside those of every main: what is only measured, shown or looked at.
HOUSEKEEPING = {"eval", "predict", "check_data", "pictures"}


def next_stop(step: int, total: int, *every: int) -> int:
    """The next step after which something is due: a multiple of one of `every`, or the last."""
    return min([total, *((step // period + 1) * period for period in every if period)])


def is_due(every: int, step: int, total: int) -> bool:
    """Whether what is done every so many steps, and after the last, is due after this one."""
    return bool(every) and (step % every == 0 or step == total)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one training, one evaluation or one prediction; see the module."""
    parser = build_parser(argv)
    args = parser.parse(argv)
    if args.list_models:
        print_text("\n".join(models_zoo.list_segmenters()))
        return
    if args.eval and args.predict:
        raise BadInput("--eval and --predict are two commands; give one of them")
    if not (args.eval or args.predict):  # which may have theirs from the checkpoint
        build_inference(args)  # refuses windows that cannot work
    check_settings(vars(args))
    warnings = warn_of_flags(vars(args), parser.given)
    if args.dry_run:
        count, speaks = plan_processes(args.dry_run_processes, Path(args.output_dir))
        if speaks:
            print_text(describe(plan_run(args, count, warnings)))
        return
    with processes(args.device, Path(args.output_dir)) as procs:
        if args.eval or args.predict:
            use_checkpoint(args, procs, parser.given)
        else:
            with hold_folder(Path(args.output_dir), procs) as lease:
                segment(args, procs, lease, warnings)


def segment(
    args: argparse.Namespace, procs: Processes, lease: Lease | None, warnings: Sequence[str]
) -> None:
    """The run, from top to bottom."""
    # -------------------------------------------------------------------------------- start
    need_two(args.batch_size * procs.world_size, POOL)
    # Only when asked for: batch statistics of several processes cut the graph into pieces.
    args.compile = compiles(args, procs.device, unasked=False)
    start = Start(TASK, session_settings(args, HOUSEKEEPING), procs, lease)
    saved = start.saved

    # ------------------------------------------------------------------------------- data
    # One process lists a folder or fetches a file; the others find what it left on the disk.
    with procs.main_first():
        classes = saved["classes"] if saved else None
        source = open_set(args, "train", classes)
        val_source = open_set(args, "val", source.classes) if args.eval_every else None
        if args.finetune and not saved:
            ckpt.local_file(args.finetune)
    check_classes(source.classes, classes or source.classes, len(source.classes))
    if val_source is not None:
        check_splits(source.classes, val_source.classes, source.name)
    if procs.main:
        for part in (source, val_source):
            for note in part.notes if part is not None else ():
                say(f"note: {note}")
    if args.check_data:
        check_data([source] + ([val_source] if val_source is not None else []), procs)

    # ------------------------------------------------------------------------------ model
    if saved:
        model = models_zoo.segmenter_from(saved["model_args"])
    else:
        model, lines = new_model(args, len(source.classes))
        start.notes += lines

    # ------------------------------------------------------------------ loss and measurement
    loss = SegmentLoss(
        PixelLoss(args.aux_weight, args.loss_mean),
        source.mean,
        source.std,
        procs.device,
        seed=args.seed,
        rank=procs.rank,
        world_size=procs.world_size,
        sum_over_ranks=procs.sum,
    )
    measure = None
    if val_source is not None:
        measure = measurement(args, val_source, len(source.classes), procs)

    # ---------------------------------------------- loader, placement, optimiser, checkpoint
    lr = peak_lr(args, start.global_batch)
    best: dict[str, Any] = saved["best"] if saved else {"miou": -1.0, "step": -1}

    def snapshot() -> dict[str, Any]:
        return {
            "classes": list(source.classes),
            "best": best,
            "data": {"dataset": source.name, "mean": source.mean, "std": source.std}
            | {name: getattr(args, name) for name in LOOKS},
        }

    if saved is None:
        warnings = [*warn_of_start(args.finetune, "full", args.layer_decay), *warnings]
    session = Session(
        start,
        source=source,
        samples=build_samples(args, source),
        model=model,
        model_name=args.model,
        model_args=model.arguments,
        fullgraph=False,
        optimizer=lambda: build_optimizer(args, model, lr),
        lr=lr,
        published=PUBLISHED,
        warnings=warnings,
        arithmetic={
            "processes": procs.world_size,  # drop path is drawn by process and micro-step
            "micro_steps": args.accum_iter,  # BatchNorm's statistics are a micro-step's
        },
        snapshot=snapshot,
    )
    total = sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    session.say(
        f"UPerNet, {total:,} parameters: encoder {encoder:,}, neck and heads of --channels "
        f"{args.channels} {total - encoder:,}; {counted(len(source), 'image')} of "
        f"{source.name}, {counted(len(source.classes), 'class')}"
    )

    # ------------------------------------------------------------------------- iterations
    run, total, folder = session.run, args.iterations, Path(args.output_dir)
    step, stage = run.step, run.stage
    with session.running():
        while stage != "done" or step < total:
            if stage != "measuring":
                # Stopped at the very step where something is due, that is still to be done.
                begun = step - 1 if stage == "training" and step else step
                goal = next_stop(begun, total, args.eval_every, args.save_every)
                session.start_steps(step, goal)
                step = train_steps(
                    session.trained,
                    session.loader,
                    session.optimizer_step,
                    loss,
                    session.rate,
                    first_step=step,
                    after_step=run.after_step,
                    before_step=loss.before_step,
                )
                run.end_epoch(run.timeline.find_epoch(step), step)
                measuring = measure is not None and is_due(args.eval_every, step, total)
                numbered = step if is_due(args.save_every, step, total) else None
                run.save(step, "measuring" if measuring else "done", numbered)
                stage = "measuring" if measuring else "done"
            if measure is not None and val_source is not None and stage == "measuring":
                with session.placed.whole() as whole:
                    result = measure(whole)
                    run.logger.record("eval", step, **result.summary())
                    better = result.miou > best["miou"]
                    if better:
                        best = {"miou": result.miou, "step": step}
                    if procs.main:
                        title = f"{source.name} val after {step:,} iterations"
                        say_result(title, result, len(val_source))
                        save_result(args, result, source, {"best": best, "step": step})
                        picture = folder / "pictures" / f"iteration-{step}.png"
                        drawn = draw(args, whole, val_source, procs, title, picture)
                        if drawn is not None:
                            run.logger.picture("segmentation", step, drawn)
                if better and procs.main:  # killed in between, the run measures and links again
                    ckpt.keep_best(folder, TASK)
                run.save(step, "done")
                stage = "done"

        # -------------------------------------------------------------------------- close
        if procs.main:
            run.say_results()
            if path := run.own(ckpt.BEST):
                after = counted(best["step"], "iteration")
                say(f"best        mIoU {best['miou']:.2f} after {after}: {path}")


if __name__ == "__main__":
    main()
