"""Courses of the learning rate: against rates worked out by hand, and timm's scheduler."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from util.config.flags import read_course
from util.errors import BadInput
from util.train.schedule import (
    SCHEDULES,
    CosineSchedule,
    Course,
    FullCosineSchedule,
    StepSchedule,
    scaled_lr,
)

# SimMIM's 100 epochs of ImageNet at a global batch of 2048: 625 steps an epoch.
EACH, WARM = 625, 10 * 625
BASE = {"warmup_epochs": 10.0, "steps_per_epoch": EACH, "global_batch": 2048}


def test_the_first_steps_of_each_by_hand() -> None:
    """Four steps of warm-up from .1 to .5, twenty in all, down to .1."""
    cosine = CosineSchedule(0.5, 0.1, 4, 20, warmup_lr=0.1)
    full = FullCosineSchedule(0.5, 0.1, 4, 20, warmup_lr=0.1)
    falls = StepSchedule(0.5, 0.1, 4, (8, 12), 0.5, warmup_lr=0.1)
    assert [round(cosine(i), 12) for i in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    # The rate of the step before, and no peak: the cosine began with the run.
    after = 0.1 + 0.4 * (1 + math.cos(math.pi * 4 / 20)) / 2
    assert [full(i) for i in range(6)] == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.4, after])
    assert full(20) == pytest.approx(0.1 + 0.4 * (1 + math.cos(math.pi * 19 / 20)) / 2)
    assert [falls(i) for i in (0, 1, 4, 5, 8, 9, 12, 13, 19)] == pytest.approx(
        [0.1, 0.1, 0.4, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    )


def test_simmims_hundred_epochs_by_hand() -> None:
    """2e-4 at 512 images: 8e-4; from 4e-6 to 4e-5, with 97.7 % of the peak after the warm-up."""
    lr = scaled_lr(2e-4, 2048, 512)
    course = Course("full_cosine", warmup_lr=1e-6, lr_batch=512)
    rate = course.build(lr, 1e-5, epochs=100, **BASE)
    assert lr == pytest.approx(8e-4) and rate(0) == rate(1) == pytest.approx(4e-6)
    assert rate(2) == pytest.approx(4e-6 + (8e-4 - 4e-6) / WARM)
    assert rate(WARM + 1) == pytest.approx(4e-5 + 7.6e-4 * (1 + math.cos(math.pi * 0.1)) / 2)
    assert rate(WARM + 1) / lr == pytest.approx(0.9768, abs=1e-4)
    assert rate(100 * EACH) == pytest.approx(4e-5, rel=1e-6)
    assert course.end(lr, 1e-5, 2048) == pytest.approx(4e-5)


def test_simmims_eight_hundred_epochs_by_hand() -> None:
    """1e-4 at 512 images, a tenth of it from epoch 700 on."""
    lr = scaled_lr(1e-4, 2048, 512)
    course = Course("steps", 5e-7, (700.0,), 0.1, 512)
    rate = course.build(lr, 0.0, epochs=800, **BASE)
    assert rate(0) == pytest.approx(2e-6)
    assert [rate(i) for i in (WARM + 1, 700 * EACH)] == pytest.approx([4e-4, 4e-4])
    assert [rate(i) for i in (700 * EACH + 1, 800 * EACH - 1)] == pytest.approx([4e-5, 4e-5])
    assert course.end(lr, 0.0, 2048) == pytest.approx(4e-5)
    assert course.end(lr, 1e-4, 2048) == pytest.approx(4e-4)  # --min_lr is the lowest


@pytest.mark.parity
@pytest.mark.parametrize(("warm", "total"), [(0, 7), (3, 20), (10, 100), (5, 5)])
def test_every_rate_of_a_full_cosine_is_timms(warm: int, total: int) -> None:
    """Moved on after each update, by the number of the update that was just done."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=total, lr_min=0.05, warmup_lr_init=0.01, warmup_t=warm,
        cycle_limit=1, t_in_epochs=False,
    )  # fmt: skip
    ours = FullCosineSchedule(0.8, 0.05, warm, total, warmup_lr=0.01)
    for step in range(total):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step
        scheduler.step_update(step)


def test_maes_course_is_unchanged() -> None:
    course = Course()
    rate = course.build(1e-3, 1e-5, epochs=40, **BASE)
    assert rate == CosineSchedule(1e-3, 1e-5, WARM, 40 * EACH)
    assert rate(100) == 1e-3 * 100 / WARM  # to the bit
    assert course.scale(4096) == 1 and course.end(1e-3, 1e-5, 4096) == 1e-5
    assert scaled_lr(1.5e-4, 4096) == scaled_lr(1.5e-4, 4096, 256) == 1.5e-4 * 4096 / 256


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_course_is_told_and_falls(schedule: str) -> None:
    course = Course(schedule, decay_epochs=(3.0,) if schedule == "steps" else ())
    rate = course.build(1.0, 0.0, warmup_epochs=1, epochs=4, steps_per_epoch=5, global_batch=8)
    rates = [rate(step) for step in range(20)]
    peak = max(range(20), key=rates.__getitem__)
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[-1] < rates[peak]
    told = {"cosine": "cosine", "full_cosine": "cosine over all steps",
            "steps": "times 0.1 at epoch 3, down"}  # fmt: skip
    assert str(course) == told[schedule]


@pytest.mark.parametrize(("schedule", "epochs"), [("steps", None), ("cosine", [3.0])])
def test_steps_and_their_epochs_go_together(schedule: str, epochs: list[float] | None) -> None:
    with pytest.raises(BadInput, match="--schedule steps and --decay_epochs go together"):
        read_course(flags(schedule=schedule, decay_epochs=epochs))


def test_no_rate_falls_after_the_end() -> None:
    late = flags(schedule="steps", decay_epochs=[70.0, 100.0])
    with pytest.raises(BadInput, match=r"--decay_epochs 100 is not before the end .* --epochs 100"):
        read_course(late)
    found = read_course(flags(schedule="steps", decay_epochs=[70.0]))
    assert found == Course("steps", 1e-6, (70.0,), 0.1, 512)


def flags(**given: Any) -> Any:
    """Of SimMIM's 100 epochs, with others."""
    base = {"epochs": 100, "warmup_lr": 1e-6, "decay_rate": 0.1, "lr_batch": 512}
    return SimpleNamespace(**base | given)
