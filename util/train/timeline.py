"""How a run's optimiser steps fall into epochs, and where the run ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Timeline:
    """Which optimiser steps an epoch is, and which step is the last.

    Steps are counted once over the whole run: logs and checkpoints are ordered by them. A resume
    with another batch or with more images changes the steps of an epoch, from that epoch on.
    Nothing before it is counted anew.

    Args:
        steps_per_epoch: of epoch `first` and of all after it.
        epochs: of the run; None: it counts iterations (optimiser steps).
        iterations: of the run, where it counts them.
        first: epoch from which on epochs are so long.
        start: steps done when `first` begins. Where the length changed in the middle of `first`,
            it is where that epoch would have begun at its new length, perhaps below 0.
        changes: what a resume changed, for the metrics; empty: nothing.
    """

    steps_per_epoch: int
    epochs: int | None = None
    iterations: int | None = None
    first: int = 0
    start: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        if self.iterations is not None:
            return self.iterations
        assert self.epochs is not None
        return self.begin(self.epochs)

    def state(self) -> dict[str, int]:
        """How steps fall into epochs, for a checkpoint."""
        return {name: getattr(self, name) for name in ("steps_per_epoch", "first", "start")}

    def begin(self, epoch: int) -> int:
        """Steps done when an epoch, from 0, begins."""
        return self.start + (epoch - self.first) * self.steps_per_epoch

    def find_epoch(self, step: int) -> int:
        """The epoch, from 0, that the `step`-th step, from 1, is part of."""
        return self.first + (step - 1 - self.start) // self.steps_per_epoch

    def words(self, step: int) -> str:
        """Where the `step`-th step is, for the reader: epochs counted from 1."""
        return "" if self.epochs is None else f"epoch {self.find_epoch(step) + 1} of {self.epochs}"

    def scheduled(self, step: int) -> int:
        """What a learning rate schedule goes by after `step` steps.

        A schedule over epochs is laid out for epochs of one length, the present one. One over
        iterations is not touched by the length of an epoch.
        """
        if self.iterations is not None:
            return step
        return step - self.start + self.first * self.steps_per_epoch
