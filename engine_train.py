"""The step loop of every training: micro-batches into optimiser steps, and what is told of each."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from util.train.logger import StepReport
from util.train.step import OptimizerStep, Stopwatch, group_steps

Batch = dict[str, Any]


class BatchLoss(Protocol):
    """What a task is to this loop: the loss of one micro-batch."""

    def __call__(self, model: nn.Module, batch: Batch, step: int, number: int) -> Tensor:
        """A scalar, the mean over the images of the micro-batch.

        Args:
            model: as it is trained, in training mode.
            batch: of the loader, on the CPU; at least `index` and `bad` are in it.
            step: optimiser steps done before, counted from 0 over the run.
            number: of the micro-batch in its step, from 0. With step and rank it decides what is
                drawn at random.
        """
        ...


def train_steps(
    model: nn.Module,
    loader: Iterable[Batch],
    optimizer_step: OptimizerStep,
    loss: BatchLoss,
    schedule: Callable[[int], float],
    *,
    first_step: int,
    after_step: Callable[[StepReport], bool],
    before_step: Callable[[list[Batch]], None] | None = None,
    after_update: Callable[[], None] | None = None,
) -> int:
    """Train on what the loader yields, one optimiser step after another.

    Nothing in it waits for the device.

    Args:
        model: possibly compiled, wrapped for several processes, or in shards.
        loader: micro-batches of one size; `accum_iter` of them are one step.
        loss: of a micro-batch.
        schedule: optimiser step, counted from 0 over the run, to learning rate.
        first_step: optimiser steps done before.
        after_step: takes in each step; where it returns True, the loop is left there.
        before_step: called with a step's micro-batches before the first of them is computed.
        after_update: called after each update, before `after_step`: averages of the weights.

    Returns:
        optimiser steps done after.

    Raises:
        AssertionError: the loader ended in the middle of a step.
    """
    model.train()
    step = first_step

    def forward(numbered: tuple[int, Batch]) -> Tensor:
        number, batch = numbered
        return loss(model, batch, step, number)

    waiting = Stopwatch()
    for micro_batches in group_steps(waiting.around(loader), optimizer_step.accum_iter):
        lr = schedule(step)
        if before_step is not None:
            before_step(micro_batches)
        result = optimizer_step(forward, enumerate(micro_batches), lr)
        step += 1
        if after_update is not None:
            after_update()
        indices = [batch["index"] for batch in micro_batches]
        bad = [i for batch in micro_batches for i in batch["bad"].flatten().tolist() if i >= 0]
        if after_step(StepReport(step, result, lr, waiting.lap(), indices, bad)):
            break
    return step
