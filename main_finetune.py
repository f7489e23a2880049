"""Train a classifier on a pretrained encoder: all of it, its last blocks, or a linear probe.

    python main_finetune.py --finetune CHECKPOINT --data_path IMAGENET ...        all of it
    python main_finetune.py --finetune CHECKPOINT --tune partial:4 ...            the last 4 blocks
    python main_finetune.py --finetune CHECKPOINT --tune linear ...               a linear probe
    python main_finetune.py --model vit_base_patch16 ...                          from scratch
    python main_finetune.py --eval --resume CHECKPOINT --data_path IMAGENET       measure one

Several processes: torchrun --nproc_per_node 8 main_finetune.py ...
"""

if __name__ == "__main__":  # before the imports that take seconds
    from util.signals import take_signals

    take_signals()

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.utils import ModelEmaV3

import models_zoo
from build_finetune import (
    TASK,
    build_augmentation,
    build_optimizer,
    build_samples,
    check_batch,
    describe_loading,
    new_model,
    open_set,
    published_for,
    resolve_tune,
)
from engine_finetune import FinetuneLoss, eval_loader, measurement, say_accuracy
from engine_train import train_steps
from eval_finetune import evaluate_checkpoint, save_result
from plan_finetune import plan_run
from util.config.finetune_flags import build_parser
from util.config.flags import compiles
from util.config.session_flags import session_settings
from util.console import counted, print_text
from util.data.class_names import check_classes, check_splits
from util.dry_run.report import describe
from util.dry_run.training import plan_processes
from util.errors import BadInput, command
from util.progress import say
from util.train import checkpoint as ckpt
from util.train.advice import check_settings, warn_of_flags, warn_of_start
from util.train.dist import Processes, processes
from util.train.lease import Lease, hold_folder
from util.train.run import due
from util.train.schedule import scaled_lr
from util.train.session import Session, Start
from util.weights.files import load_state

# Beside those of every main: what is only measured.
HOUSEKEEPING = {"eval", "dist_eval"}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one fine-tuning, or one evaluation; see the module."""
    parser = build_parser(argv)
    args = parser.parse(argv)
    if args.list_models:
        print_text("\n".join(models_zoo.list_classifiers()))
        return
    resolve_tune(args)
    check_settings(vars(args))
    warnings = warn_of_flags(vars(args), parser.given)
    if args.dry_run:
        count, speaks = plan_processes(args.dry_run_processes, Path(args.output_dir))
        if speaks:
            print_text(describe(plan_run(args, count, warnings)))
        return
    with processes(args.device, Path(args.output_dir)) as procs:
        if args.eval:
            evaluate_checkpoint(args, procs)
        else:
            with hold_folder(Path(args.output_dir), procs) as lease:
                finetune(args, procs, lease, warnings)


def finetune(
    args: argparse.Namespace, procs: Processes, lease: Lease | None, warnings: Sequence[str]
) -> None:
    """The run, from top to bottom."""
    # -------------------------------------------------------------------------------- start
    check_batch(args, procs.world_size)
    args.compile = compiles(args, procs.device)
    start = Start(TASK, session_settings(args, HOUSEKEEPING), procs, lease)
    saved = start.saved

    # ------------------------------------------------------------------------------- data
    # One process lists a folder or fetches a file; the others find what it left on the disk.
    with procs.main_first():
        channels, origin = args.in_chans, None
        if saved:
            channels = saved["model_args"]["in_chans"]
        elif args.finetune:
            origin = load_state(args.finetune, args.weights_key)
            channels = models_zoo.count_channels(origin, args.finetune, args.input_size)
        source = open_set(args, "train", channels)
        val_source = open_set(args, "val", source.channels) if args.eval_every else None
    if val_source is not None:
        check_splits(source.classes, val_source.classes, args.dataset)
    num_classes = args.nb_classes or len(source.classes)
    if num_classes < len(source.classes):
        raise BadInput(
            f"--nb_classes {num_classes}, but {args.dataset} has labels up to "
            f"{len(source.classes) - 1}"
        )

    # ------------------------------------------------------------------------------ model
    if saved:
        model_args = saved["model_args"]
        model = models_zoo.ENCODER_KINDS.find(saved.get("encoder_kind", "vit"))(**model_args)
        check_classes(source.classes, saved["classes"], model_args["num_classes"])
    else:
        model, model_args = new_model(args, origin, source.channels, num_classes)
        if origin is not None:
            start.notes += describe_loading(args, origin, args.finetune)
    origin = None  # its weights are in the model now
    tuned = model.freeze_to(args.tune)
    ema = None
    if args.ema_decay is not None:
        # All at once (foreach) does not take parameters in shards beside buffers that are not.
        ema = ModelEmaV3(model, decay=args.ema_decay, foreach=not args.shard)

    # ------------------------------------------------------------------ loss and measurement
    augmentation = build_augmentation(args, num_classes, procs.device)
    loss = FinetuneLoss(augmentation, source.mean, source.std, procs.device, args.seed, procs.rank)
    measure = None
    if val_source is not None:
        held_out = eval_loader(val_source, model.img_size, args.batch_size, start.workers, procs)
        measure = measurement(held_out, val_source, num_classes, procs)

    # ---------------------------------------------- loader, placement, optimiser, checkpoint
    lr = args.lr
    if lr is None:
        lr = scaled_lr(args.blr, start.global_batch, args.lr_batch)
    best: dict[str, Any] = saved["best"] if saved else {"top1": -1.0, "epoch": -1}

    def snapshot() -> dict[str, Any]:
        return {
            **models_zoo.describe_kind(model),
            "classes": list(source.classes),
            "tune": args.tune,
            "best": best,
            "data": {
                "dataset": args.dataset,
                "mean": source.mean,
                "std": source.std,
                "eval_margin": source.eval_margin,
            },
        }

    if saved is None:
        warnings = [*warn_of_start(args.finetune, args.tune, args.layer_decay), *warnings]
    session = Session(
        start,
        source=source,
        samples=build_samples(args, source, model.img_size),
        model=model,
        model_name=args.model,
        model_args=model_args,
        averages=None if ema is None else ema.module,
        # A probe's BatchNorm talks to the other processes in the middle of the graph.
        fullgraph=args.tune != "linear" or procs.world_size == 1,
        optimizer=lambda: build_optimizer(args, model, lr),
        lr=lr,
        published=published_for(args),
        warnings=warnings,
        arithmetic={
            # Mixup and drop path are drawn by process and micro-step.
            "processes": procs.world_size,
            "micro_steps": args.accum_iter,
        },
        snapshot=snapshot,
    )
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    learning = sum(sizes[name] for name in tuned)
    session.say(
        f"{args.tune}: {learning:,} of {sum(sizes.values()):,} parameters learn "
        f"({counted(len(tuned), 'tensor')}); {counted(len(source), 'image')} of "
        f"{args.dataset}, {counted(num_classes, 'class')}"
    )

    # ----------------------------------------------------------------------------- epochs
    step, folder = session.run.step, Path(args.output_dir)
    with session.running() as run:
        for epoch in range(run.first_epoch, args.epochs):
            measuring = measure is not None and due(args.eval_every, epoch, args.epochs)
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
                    after_update=None if ema is None else lambda: ema.update(model),
                )
                run.end_epoch(epoch, step)
                numbered = epoch if due(args.save_every, epoch, args.epochs) else None
                run.save(step, "measuring" if measuring else "done", numbered)
            if measure is not None and measuring:
                with session.placed.whole() as whole:
                    result = measure(whole)
                values = result.summary()
                if session.averaged is not None:
                    with session.averaged.whole() as whole:
                        result = measure(whole)
                    values |= {f"ema_{k}": v for k, v in result.summary().items() if k != "images"}
                run.logger.record("eval", step, epoch=epoch, **values)
                better = result.summary()["top1"] > best["top1"]
                if better:
                    best = {"top1": result.summary()["top1"], "epoch": epoch}
                if procs.main:
                    done = f"after {counted(epoch + 1, 'epoch')}"
                    say_accuracy(f"{done}{', averaged weights' if ema else ''}", result)
                    if epoch == args.epochs - 1:
                        save_result(args, result, source, {**values, "best": best, "epoch": epoch})
                if better and procs.main:  # killed in between, the run measures and links again
                    ckpt.keep_best(folder, TASK)
                run.save(step, "done")

        # -------------------------------------------------------------------------- close
        if procs.main:
            run.say_results()
            if path := run.own(ckpt.BEST):
                after = counted(best["epoch"] + 1, "epoch")
                say(f"best        top-1 {best['top1']:.2f} % after {after}: {path}")


if __name__ == "__main__":
    main()
