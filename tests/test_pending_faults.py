"""A checkpoint that is written between two log lines: steps that were not finite, and the speed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import records
from stopped_runs import JOBS, stopping

import eval_pretrain
from util.errors import EXIT_STOPPED
from util.train import checkpoint, logger
from util.train.checkpoint import LAST, load_file
from util.train.step import OptimizerStep

# Four steps an epoch, and a log line of them.
FLAGS = [
    *JOBS["pretrain"].flags, "--precision=fp32", "--target=pixels", "--train_images=16",
    "--batch_size=4", "--model=mae_vit_micro_patch8", "--eval_every=0", "--save_every=0",
]  # fmt: skip


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step has no finite loss, once."""
    call, steps = OptimizerStep.__call__, [0]

    def called(self: OptimizerStep, forward: Callable, *rest: Any) -> Any:
        steps[0] += 1
        bad = torch.nan if steps[0] == 2 else 1.0
        return call(self, lambda batch: forward(batch) * bad, *rest)

    monkeypatch.setattr(OptimizerStep, "__call__", called)


def test_it_is_said_before_the_checkpoint(broken: None, tmp_path: Path, run_main: Callable) -> None:
    """The next start does not know its images, and named no step at all."""
    flags = [*FLAGS, f"--output_dir={tmp_path}", "--nan_policy=skip"]
    with stopping(3):
        code, out, err = run_main("main_pretrain", flags)
    assert code == EXIT_STOPPED and out.count("not finite in step 2;") == 1, out + err
    dumped = json.loads((tmp_path / "nonfinite-step2-rank0.json").read_text())
    assert dumped["step"] == 2 and dumped["indices"]
    assert load_file(tmp_path / LAST)["sums"]["recent"][4:] == [1.0, 0.0]
    code, out, err = run_main("main_pretrain", flags)
    assert code == 0 and "not finite" not in out, out + err
    assert [r.get("skipped") for r in records(tmp_path, "train")] == [1, None, None]


def test_no_checkpoint_is_of_after_it(broken: None, tmp_path: Path, run_main: Callable) -> None:
    """Each start from one would have ended for it again, whatever was changed."""
    flags = [*FLAGS, f"--output_dir={tmp_path}", "--nan_policy=stop"]
    with stopping(3):
        code, out, err = run_main("main_pretrain", flags)
    assert code == 1 and "not finite in step 2;" in err, out + err
    assert not (tmp_path / LAST).exists() and "no checkpoint yet" in err
    assert run_main("main_pretrain", flags)[0] == 0  # the fault is gone: from the start


def test_speed_is_of_all_steps_and_no_time_of_saving(
    tmp_path: Path, run_main: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second and all else a hundred, by a clock of our own; each step is saved.

    Saving forgot the steps' time before it and kept their images: a line of four steps said four
    times the speed.
    """
    now = [0.0]

    def takes(owner: Any, name: str, seconds: float) -> None:
        original = getattr(owner, name)

        def timed(*rest: Any, **more: Any) -> Any:
            now[0] += seconds
            return original(*rest, **more)

        monkeypatch.setattr(owner, name, timed)

    takes(OptimizerStep, "__call__", 1.0)
    takes(checkpoint, "save_checkpoint", 100.0)
    takes(eval_pretrain, "evaluate", 100.0)
    monkeypatch.setattr(logger, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    flags = [
        *FLAGS,
        "--save_minutes=1e-9",
        "--eval_every=1",
        "--eval_images=4",
        f"--output_dir={tmp_path}",
    ]
    assert run_main("main_pretrain", flags)[0] == 0
    lines = records(tmp_path, "train")
    assert len(lines) == 3 and {line["images_per_s"] for line in lines} == {4.0}
