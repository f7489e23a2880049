"""One optimiser step, for every task: micro-steps, precision, gradient norm, update."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from util.train.shard import total_norm

T = TypeVar("T")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stopwatch:
    """Seconds spent inside an iterator's `next`, which for a loader is waiting for data."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, iterable: Iterable[T]) -> Iterator[T]:
        """The same items, timed."""
        iterator = iter(iterable)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item

    def lap(self) -> float:
        """Seconds since the last lap."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def group_steps(loader: Iterable[Any], accum_iter: int) -> Iterator[list[Any]]:
    """Group micro-batches into optimiser steps; the sampler yields whole steps only."""
    group: list[Any] = []
    for batch in loader:
        group.append(batch)
        if len(group) == accum_iter:
            yield group
            group = []
    assert not group, "the sampler ended in the middle of an optimiser step"


@dataclass(frozen=True)
class StepResult:
    """What a step computed, still on the device.

    Attributes:
        loss: mean over the micro-steps of this process.
        grad_norm: of the gradient of the global batch, before clipping; the same on every process.
        skipped: 1.0 where the update was left out, on every process alike.
        broken: 1.0 where that is a fault: a loss or gradient that was not finite. In fp16 a
            gradient that overflows only lowers the loss scale, so there only this process's own
            loss counts.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    broken: Tensor


class OptimizerStep:
    """Runs one optimiser step; nothing in it waits for the device.

    A non-finite loss on any process makes its gradients NaN, the exchange of gradients makes those
    of every process NaN, and each process skips the update, inside the fused optimiser. So all
    agree at once, without a message of their own.

    Args:
        model: possibly wrapped for several processes, or in shards; gradients are exchanged on the
            last micro-step only.
        optimizer: fused, so that it honours `found_inf`; one that does not makes each step wait
            for the device.
        precision: a key of `PRECISIONS`; bf16 and fp16 are autocast, parameters stay float32; fp16
            scales the loss (`scaler`).
        accum_iter: micro-steps per step.
        clip_grad: largest gradient norm, None: no clipping.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        precision: str = "fp32",
        accum_iter: int = 1,
        clip_grad: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.accum_iter = model, optimizer, accum_iter
        self.device, self.precision, self.clip_grad = device, precision, clip_grad
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def __call__(
        self, forward: Callable[[Any], Tensor], micro_batches: Iterable[Any], lr: float
    ) -> StepResult:
        """One step.

        Args:
            forward: micro-batch to scalar loss, a mean over the images of the micro-batch.
            micro_batches: `accum_iter` of them, all of one size.
            lr: learning rate of this step; a group's `lr_scale` multiplies it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        losses = []
        for number, micro_batch in enumerate(micro_batches, 1):
            with self._exchange(number == self.accum_iter):
                with self._autocast():
                    loss = forward(micro_batch)
                share = torch.full_like(loss, 1 / self.accum_iter)
                share = share.where(loss.isfinite(), torch.nan)
                self.scaler.scale(loss).backward(share)
            losses.append(loss.detach())
        assert len(losses) == self.accum_iter, "a step needs all of its micro-batches"
        return self._update(torch.stack(losses).mean())

    def load_scale(self, state: dict[str, Any]) -> None:
        """Go on with the loss scale of a checkpoint; a run without fp16 had none, and it is new."""
        if state:
            self.scaler.load_state_dict(state)

    def _exchange(self, last: bool) -> Any:
        if isinstance(self.model, FSDPModule):
            # Until the last micro-step every process keeps gradients of the whole model.
            self.model.set_requires_gradient_sync(last)
            return nullcontext()
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _autocast(self) -> Any:
        if self.precision == "fp32":
            return nullcontext()
        # In shards, weights are gathered to be freed again; a cache of their copies would keep all.
        cache = not isinstance(self.model, FSDPModule)
        return torch.autocast(self.device.type, PRECISIONS[self.precision], cache_enabled=cache)

    def _update(self, loss: Tensor) -> StepResult:
        self.scaler.unscale_(self.optimizer)  # does nothing without fp16, as the scaler's others
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(gradients)
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        skipped = (~norm.isfinite()).float()
        broken = skipped
        if self.scaler.is_enabled():
            broken = (~loss.isfinite()).float()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self._step_unless(skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm, skipped, broken)

    def _step_unless(self, skipped: Tensor) -> None:
        """One update of the optimiser, left out where `skipped` is not 0."""
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # The protocol by which GradScaler tells a fused optimiser to leave a step out.
            vars(self.optimizer).update(grad_scale=None, found_inf=skipped)
            self.optimizer.step()
        elif not skipped:  # waits for the device: Apple's alone has no such optimiser
            self.optimizer.step()
