"""A folder of odd and broken files trains, with the right count and list, however it is run."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from launch import TINY, launch, wait, wait_for_step
from odd_files import odd_files
from runs import records

from util.train.checkpoint import LAST, load_file

pytestmark = pytest.mark.dist
FLAGS = [
    *TINY, "--dataset=imagefolder", "--model=mae_vit_micro_patch8", "--input_size=32",
    "--patch_size=8", "--batch_size=16", "--warmup_epochs=0", "--in_chans=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A training folder, and the names of its files that cannot be decoded."""
    root = tmp_path_factory.mktemp("data")
    kinds = odd_files(root / "train" / "odd")
    assert len(kinds) >= 20
    return root, {name for name, kind in kinds.items() if kind == "bad"}


def listed(folder: Path) -> set[str]:
    lines = (folder / "bad_images.txt").read_text().splitlines()
    assert len(lines) == len(set(lines))
    return {Path(line.split(": ")[0]).name for line in lines}


def run(data: Path, folder: Path, world: int = 1, *more: str, stop_at: int = 0) -> list[int | None]:
    folder.mkdir(exist_ok=True)
    flags = [f"--data_path={data}", f"--output_dir={folder}", f"--batch_size={16 // world}", *more]
    children = launch([*FLAGS, *flags], folder / "out", world)
    if stop_at:
        wait_for_step(folder, stop_at, children)
        os.kill(children[0].pid, signal.SIGTERM)
    return wait(children)


def test_count_and_list_are_right_after_a_stop_and_on_two_ranks(
    data: tuple[Path, set[str]], tmp_path: Path
) -> None:
    root, bad = data
    # 5 steps of 16 in an epoch of 83 files leave 3 out; in 3 epochs each file has its turn.
    one, two, stopped = tmp_path / "one", tmp_path / "two", tmp_path / "stopped"
    assert run(root, one) == [0]
    assert listed(one) == bad
    assert records(one, "train")[-1]["bad_images"] == len(bad)
    assert len(load_file(one / LAST)["bad_images"]) == len(bad)
    assert run(root, two, 2) == [0, 0]
    assert listed(two) == bad
    assert run(root, stopped, 1, "--num_workers=2", stop_at=7) == [75]
    assert run(root, stopped) == [0]
    assert listed(stopped) == bad
    losses = [[r["loss"] for r in records(f, "train")] for f in (one, two, stopped)]
    assert losses[0] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_too_many_end_the_run_with_the_list(data: tuple[Path, set[str]], tmp_path: Path) -> None:
    root, bad = data
    folder = tmp_path / "run"
    assert run(root, folder, 2, "--max_bad_images=5") == [1, 1]
    text = (folder / "out").read_text()
    assert "more than --max_bad_images 5" in text and str(folder / "bad_images.txt") in text
    assert "Traceback" not in text
    assert len(listed(folder)) > 5 and listed(folder) <= bad


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        path = tmp_path / "data" / "train" / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert run(tmp_path / "data", tmp_path / "run", 1, "--batch_size=2") == [2]
    text = (tmp_path / "run" / "out").read_text()
    assert "none could be decoded" in text
    shutil.rmtree(tmp_path / "data")
