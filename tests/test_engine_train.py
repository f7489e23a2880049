"""The step loop: what it tells a task, and when."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_train import train_steps
from util.train.logger import StepReport
from util.train.step import OptimizerStep


def batches(count: int) -> list[dict[str, Any]]:
    return [
        {"index": torch.tensor([i]), "bad": torch.tensor([[-1]]), "x": torch.ones(1, 2) * i}
        for i in range(count)
    ]


def calls_of(
    data: list[dict[str, Any]], first_step: int = 0, leave_at: int | None = None, **hooks: bool
) -> tuple[list[Any], int]:
    """What the loop calls, in order, and the steps done; two micro-batches a step."""
    model, calls = nn.Linear(2, 1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = OptimizerStep(model, optimizer, device=torch.device("cpu"), accum_iter=2)
    model.eval()

    def loss(model: nn.Module, batch: dict[str, Any], step: int, number: int) -> Tensor:
        assert model.training
        calls.append(("loss", int(batch["index"]), step, number))
        return model(batch["x"]).mean()

    def after_step(report: StepReport) -> bool:
        calls.append(("after step", report.step, report.lr))
        return report.step == leave_at

    more: dict[str, Any] = {}
    if hooks.get("before"):
        more["before_step"] = lambda given: calls.append(
            ("before", [int(batch["index"]) for batch in given])
        )
    if hooks.get("update"):
        more["after_update"] = lambda: calls.append(("update",))
    done = train_steps(
        model, data, step, loss, lambda step: step / 10, first_step=first_step,
        after_step=after_step, **more,
    )  # fmt: skip
    return calls, done


def test_a_task_is_told_step_and_number_and_called_in_order() -> None:
    calls, done = calls_of(batches(4), first_step=7, before=True, update=True)
    assert done == 9
    assert calls == [
        ("before", [0, 1]), ("loss", 0, 7, 0), ("loss", 1, 7, 1), ("update",),
        ("after step", 8, 0.7),
        ("before", [2, 3]), ("loss", 2, 8, 0), ("loss", 3, 8, 1), ("update",),
        ("after step", 9, 0.8),
    ]  # fmt: skip


def test_a_task_may_have_nothing_beside_its_loss() -> None:
    assert [call[0] for call in calls_of(batches(2))[0]] == ["loss", "loss", "after step"]


def test_it_is_left_where_it_is_told_to() -> None:
    calls, done = calls_of(batches(8), leave_at=2)
    assert done == 2 and ("loss", 4, 2, 0) not in calls and calls[-1][:2] == ("after step", 2)


def test_no_part_of_a_step_is_trained() -> None:
    with pytest.raises(AssertionError, match="middle of an optimiser step"):
        calls_of(batches(3))
