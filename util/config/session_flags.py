"""The settings that all trainings share (`util.train.session.Settings`), from their flags."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from util.config.flags import collect_settings, read_course, run_options, select_arithmetic
from util.train.schedule import Course
from util.train.session import Settings


def session_settings(settings: argparse.Namespace, more_housekeeping: Iterable[str]) -> Settings:
    """The settings of a run.

    Args:
        settings: resolved flags of a training main; `compile` is True or False by now, see
            `util.config.flags.compiles`.
        more_housekeeping: flags of the main that do not change its numbers.
    """
    flags = collect_settings(settings)
    by_epochs = "epochs" in flags
    return Settings(
        folder=Path(settings.output_dir),
        resume=settings.resume,
        allow_changes=settings.allow_changes,
        seed=settings.seed,
        tf32=settings.tf32,
        epochs=settings.epochs if by_epochs else None,
        iterations=None if by_epochs else settings.iterations,
        warmup=settings.warmup_epochs if by_epochs else settings.warmup_iterations,
        min_lr=settings.min_lr,
        course=read_course(settings) if by_epochs else Course(),
        batch_size=settings.batch_size,
        accum_iter=settings.accum_iter,
        crops_per_image=getattr(settings, "crops_per_decode", 1),
        num_workers=settings.num_workers,
        prefetch_factor=settings.prefetch_factor,
        pin_memory=settings.pin_mem,
        precision=settings.precision,
        clip_grad=settings.clip_grad,
        grad_checkpointing=settings.grad_checkpointing,
        shard=settings.shard,
        compiled=settings.compile,
        flags=flags,
        arithmetic=select_arithmetic(flags, more_housekeeping),
        run=run_options(settings),
    )
