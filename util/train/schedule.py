"""Learning rates as pure functions of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from 0, then half a cosine to `min_lr`, set at every optimiser step (MAE).

    Args:
        lr: peak learning rate, after scaling by the global batch.
        min_lr: learning rate at the end.
        warmup_steps, total_steps: optimiser steps; a fraction of an epoch is allowed.
    """

    lr: float
    min_lr: float
    warmup_steps: float
    total_steps: int

    def __call__(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0 over the whole run."""
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1e-12)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


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


def scaled_lr(blr: float, global_batch: int) -> float:
    """The linear scaling rule: base learning rate x images per optimiser step / 256."""
    return blr * global_batch / 256
