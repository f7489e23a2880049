"""lab.compare_commits: what it takes for the same, and what not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import TINY
from trained import Trained

from lab import compare_commits
from lab.compare_commits import SETUPS, WORKTREE, Setup, differences, walk
from util.train.checkpoint import LAST, load_file, write_signed

FLAGS = [*TINY, "--epochs=1", "--warmup_epochs=0", "--train_images=72"]


@pytest.fixture
def two(trained: Trained, tmp_path: Path) -> tuple[Path, Path]:
    """A run folder and a copy."""
    one = trained("main_pretrain", FLAGS)
    return one, Path(shutil.copytree(one, tmp_path / "copy"))


def test_a_copy_is_the_same(two: tuple[Path, Path]) -> None:
    assert differences(*two) == []


@pytest.mark.parametrize("key", ["loss", "lr", "grad_norm"])
def test_a_number_in_the_log(two: tuple[Path, Path], key: str) -> None:
    path = two[1] / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    second = next(line for line in lines if line["step"] == 2)
    second[key] *= 1 + 2**-50
    lines.append(lines[-1] | {"images_per_s": 1})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    count, step = differences(*two)
    assert count == f"{len(lines) - 1} records and {len(lines)}"
    assert step.startswith(f"step 2: {key} ")


def test_speed_is_no_difference(two: tuple[Path, Path]) -> None:
    path = two[1] / "metrics.jsonl"
    lines = [json.loads(line) | {"images_per_s": 1} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(*two) == []


def test_one_bit_of_the_optimiser(two: tuple[Path, Path]) -> None:
    state = load_file(two[1] / LAST)
    name, x = next((n, x) for n, x in walk(state, "") if n.endswith("exp_avg") and x.ndim)
    x.view(torch.int32).flatten()[0] ^= 1
    write_signed(two[1] / LAST, state)
    (found,) = differences(*two)
    assert found.startswith("1 of ") and found.endswith(name)


@pytest.mark.smoke
def test_the_work_tree_is_itself_and_no_failure_is_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SETUPS, "mae", Setup("main_pretrain", FLAGS))
    assert compare_commits.main([WORKTREE, WORKTREE, "--only", "mae"]) == 0
    assert "the same: 3 steps" in capsys.readouterr().out
    monkeypatch.setitem(SETUPS, "mae", Setup("main_pretrain", ["--no_such_flag"]))
    assert compare_commits.main([WORKTREE, WORKTREE, "--only", "mae"]) == 1
    assert "a run failed" in capsys.readouterr().out
