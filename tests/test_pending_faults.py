"""A step that was not finite, and a checkpoint that is written before the next log line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import JOBS, stopping

from util.checkpoint import LAST, load_file
from util.errors import EXIT_STOPPED
from util.step import OptimizerStep

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
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("skipped") for r in records if r["kind"] == "train"] == [1, None, None]


def test_no_checkpoint_is_of_after_it(broken: None, tmp_path: Path, run_main: Callable) -> None:
    """Each start from one would have ended for it again, whatever was changed."""
    flags = [*FLAGS, f"--output_dir={tmp_path}", "--nan_policy=stop"]
    with stopping(3):
        code, out, err = run_main("main_pretrain", flags)
    assert code == 1 and "not finite in step 2;" in err, out + err
    assert not (tmp_path / LAST).exists() and "no checkpoint yet" in err
    assert run_main("main_pretrain", flags)[0] == 0  # the fault is gone: from the start
