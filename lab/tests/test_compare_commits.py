"""lab.compare_commits: what it takes for the same, and what not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import TINY
from trained import Trained

from lab.compare_commits import SETUPS, WORKTREE, Setup, compare, read_run, walk
from util.train.checkpoint import LAST, load_file, write_signed

FLAGS = [*TINY, "--epochs=1", "--warmup_epochs=0", "--train_images=72"]


@pytest.fixture
def two(trained: Trained, tmp_path: Path) -> tuple[Path, Path]:
    """A run folder and a copy."""
    one = trained("main_pretrain", FLAGS)
    return one, Path(shutil.copytree(one, tmp_path / "copy"))


def test_a_copy_is_the_same(two: tuple[Path, Path]) -> None:
    assert compare(*map(read_run, two)) == []


@pytest.mark.parametrize("key", ["loss", "lr", "grad_norm"])
def test_a_number_in_the_log(two: tuple[Path, Path], key: str) -> None:
    path = two[1] / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    second = next(line for line in lines if line["step"] == 2)
    second[key] *= 1 + 2**-50
    lines.append(lines[-1] | {"images_per_s": 1})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    count, step = compare(*map(read_run, two))
    assert count == f"{len(lines) - 1} records and {len(lines)}"
    assert step.startswith(f"step 2: {key} ")


def test_speed_is_no_difference(two: tuple[Path, Path]) -> None:
    path = two[1] / "metrics.jsonl"
    lines = [json.loads(line) | {"images_per_s": 1} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare(*map(read_run, two)) == []


def test_one_bit_of_the_optimiser(two: tuple[Path, Path]) -> None:
    state = load_file(two[1] / LAST)
    name, x = next((n, x) for n, x in walk(state, "") if n.endswith("exp_avg") and x.ndim)
    x.view(torch.int32).flatten()[0] ^= 1
    write_signed(two[1] / LAST, state)
    (found,) = compare(*map(read_run, two))
    assert found.startswith("1 of ") and found.endswith(name)


@pytest.mark.smoke
def test_the_work_tree_is_itself_and_no_failure_is_the_same(
    monkeypatch: pytest.MonkeyPatch, run_main: Any
) -> None:
    words = [WORKTREE, WORKTREE, "--only", "mae"]
    monkeypatch.setitem(SETUPS, "mae", Setup("main_pretrain", FLAGS))
    code, out, err = run_main("lab.compare_commits", words)
    assert code == 0 and "the same: 3 steps" in out, err
    monkeypatch.setitem(SETUPS, "mae", Setup("main_pretrain", ["--no_such_flag"]))
    code, out, err = run_main("lab.compare_commits", words)
    assert code == 1 and "a run failed" in out and "not the same: mae" in err


def test_a_commit_that_is_not_there(run_main: Any) -> None:
    code, _, err = run_main("lab.compare_commits", ["no-such-commit", WORKTREE])
    assert code == 2 and "cannot check out no-such-commit" in err and "Traceback" not in err
