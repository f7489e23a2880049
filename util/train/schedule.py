"""Learning rates as pure functions of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine to `min_lr`, set at every optimiser step (MAE).

    Args:
        lr: peak learning rate, after scaling by the global batch.
        min_lr: learning rate at the end.
        warmup_steps, total_steps: optimiser steps; a fraction of an epoch is allowed.
        warmup_lr: learning rate of the first step of a warm-up.
    """

    lr: float
    min_lr: float
    warmup_steps: float
    total_steps: int
    warmup_lr: float = 0.0

    def __call__(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0 over the whole run."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1e-12)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


class TimmsWarmUp:
    """Linear warm-up in whole steps, and each step with the rate of the step before it.

    timm's scheduler is moved on after the optimiser, so only the first step has its own (SimMIM).
    """

    lr: float
    warmup_steps: float
    warmup_lr: float

    def __call__(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0 over the whole run."""
        before, warmup = max(step - 1, 0), int(self.warmup_steps)
        if before < warmup:
            return self.warmup_lr + (self.lr - self.warmup_lr) * before / warmup
        return self.after_warmup(before)

    def after_warmup(self, step: int) -> float:
        """The schedule's own rate of a step."""
        raise NotImplementedError


@dataclass(frozen=True)
class FullCosineSchedule(TimmsWarmUp):
    """A warm-up, then the rest of half a cosine that spans all steps, the warm-up's too.

    So the warm-up ends a little below the peak's line: at 97.6 % of `lr` after a tenth of the
    steps.

    Args: as `CosineSchedule`'s.

    Source: Xie et al., "SimMIM" (arXiv 2111.09886), its released code, and timm's schedulers.
    """

    lr: float
    min_lr: float
    warmup_steps: float
    total_steps: int
    warmup_lr: float = 0.0

    def after_warmup(self, step: int) -> float:
        """See `TimmsWarmUp`."""
        done = min(step / self.total_steps, 1)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class StepSchedule(TimmsWarmUp):
    """A warm-up, then the peak, multiplied by `factor` from each of some steps on (SimMIM's 800
    epochs).

    Args:
        lr, min_lr, warmup_steps, warmup_lr: as `CosineSchedule`'s; no rate falls below `min_lr`.
        milestones: optimiser steps from which on the rate is multiplied once more.
        factor: that it is multiplied by.
    """

    lr: float
    min_lr: float
    warmup_steps: float
    milestones: tuple[float, ...]
    factor: float = 0.1
    warmup_lr: float = 0.0

    def after_warmup(self, step: int) -> float:
        """See `TimmsWarmUp`."""
        passed = sum(step >= milestone for milestone in self.milestones)
        return max(self.lr * self.factor**passed, min(self.min_lr, self.lr))


# What `--schedule` can be.
SCHEDULES = ("cosine", "full_cosine", "steps")


@dataclass(frozen=True)
class Course:
    """How the learning rate of a run in epochs goes, by its flags.

    Attributes:
        schedule: of `SCHEDULES`.
        warmup_lr: at the first step of the warm-up.
        decay_epochs, decay_rate: of `steps`.
        lr_batch: images per step that the rates are given for; None: those at the start and at the
            end of the run are what they are, and the base rate is for 256.
    """

    schedule: str = "cosine"
    warmup_lr: float = 0.0
    decay_epochs: tuple[float, ...] = ()
    decay_rate: float = 0.1
    lr_batch: int | None = None

    def scale(self, global_batch: int) -> float:
        """Factor on the rates at the start of the warm-up and at the end."""
        return 1.0 if self.lr_batch is None else global_batch / self.lr_batch

    def build(
        self,
        lr: float,
        min_lr: float,
        *,
        warmup_epochs: float,
        epochs: int,
        steps_per_epoch: int,
        global_batch: int,
    ) -> Callable[[int], float]:
        """The rate of each step.

        Args:
            lr: at the peak, as it is.
            min_lr: as the flag gives it.
        """
        scale, warmup = self.scale(global_batch), warmup_epochs * steps_per_epoch
        low, start = scale * min_lr, scale * self.warmup_lr
        if self.schedule == "steps":
            milestones = tuple(epoch * steps_per_epoch for epoch in self.decay_epochs)
            return StepSchedule(lr, low, warmup, milestones, self.decay_rate, start)
        kind = CosineSchedule if self.schedule == "cosine" else FullCosineSchedule
        return kind(lr, low, warmup, epochs * steps_per_epoch, start)

    def end(self, lr: float, min_lr: float, global_batch: int) -> float:
        """The rate at the end of the run, of that at the peak and the flag's lowest."""
        low = self.scale(global_batch) * min_lr
        if self.schedule != "steps":
            return low
        return max(lr * self.decay_rate ** len(self.decay_epochs), min(low, lr))

    def __str__(self) -> str:
        if self.schedule == "steps":
            epochs = " and ".join(f"{epoch:g}" for epoch in self.decay_epochs)
            return f"times {self.decay_rate:g} at epoch {epochs}, down"
        return "cosine over all steps" if self.schedule == "full_cosine" else "cosine"


@dataclass(frozen=True)
class PolySchedule:
    """Linear warm-up, then a polynomial down to `min_lr`, set at every step (mmsegmentation).

    The polynomial starts where the warm-up ends: at its first step the rate is `lr`.

    Args:
        lr: peak learning rate.
        warmup_steps, total_steps: optimiser steps.
        min_lr: learning rate that the last step all but reaches.
        power: 1 is a straight line.
        warmup_start: share of the warm-up's own line at step 0.
    """

    lr: float
    warmup_steps: int
    total_steps: int
    min_lr: float = 0.0
    power: float = 1.0
    warmup_start: float = 1e-6

    def __call__(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0 over the whole run."""
        if step < self.warmup_steps:
            share = step / self.warmup_steps
            return self.lr * (self.warmup_start + (1 - self.warmup_start) * share)
        done = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.min_lr + (self.lr - self.min_lr) * (1 - min(done, 1)) ** self.power


def scaled_lr(blr: float, global_batch: int, per: int | None = None) -> float:
    """The linear scaling rule: base learning rate x images per optimiser step / 256.

    Args:
        per: images that the base rate is given for; None: 256.
    """
    return blr * global_batch / (per or 256)
