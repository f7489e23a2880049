"""What a loading process meets reaches the user as one line, in every command."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import PATIENCE, ROOT, TINY, launch, wait
from PIL import Image
from test_segment import NEW, SMALL
from torch.utils.data import Dataset

from util.data.images import BadImage
from util.data.label_maps import BadPair
from util.data.loading import Loader, say_conversions
from util.data.randomness import Key
from util.data.samples import Samples, build_loader
from util.data.source import Source
from util.errors import EXIT_BAD_INPUT, EXIT_FAILED, BadInput, RunFailed

FAULTS = {
    "input": (BadInput("no such mask; mend it"), BadInput, "^no such mask; mend it$"),
    "run": (RunFailed("it diverged"), RunFailed, "^it diverged$"),
    "pair": (BadPair("the mask m.png is bad"), BadPair, "^the mask m.png is bad$"),
    "image": (BadImage("a.jpg", "cut"), BadImage, "^cannot read the image a.jpg: cut"),
    "machine": (
        OSError(116, os.strerror(116), "a.jpg"), RunFailed, "^reading the data failed.*a.jpg.*same"
    ),
}  # fmt: skip


class Failing(Dataset):
    """Numbers, of which one raises or kills its process."""

    def __init__(self, fault: Exception | None) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        if index == 5:
            if self.fault is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise self.fault
        return {"x": torch.zeros(1, 2, 2), "index": index}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_for_people_arrives_as_itself(fault, workers):
    raised, kind, message = FAULTS[fault]
    batches = [[0, 1], [2, 3], [4, 5], [6, 7]]
    loader = build_loader(Failing(raised), batches, num_workers=workers, pin_memory=False)
    seen = []
    with pytest.raises(kind, match=message) as caught:
        seen += [batch["index"].tolist() for batch in loader]
    assert type(caught.value) is kind and "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_so_do_those_of_single_items(workers):
    loader = Loader(Failing(BadInput("odd")), None, batch_size=None, num_workers=workers)
    taken = []
    with pytest.raises(BadInput, match=r"^odd$"):
        taken += [item["index"] for item in loader]


def test_a_fault_of_ours_keeps_its_traceback():
    loader = build_loader(Failing(KeyError("k")), [[5]], num_workers=1, pin_memory=False)
    with pytest.raises(KeyError, match="Traceback") as caught:
        list(loader)
    assert not multiprocessing.active_children(), caught.value


def test_a_killed_loading_process_fails_the_run():
    loader = build_loader(Failing(None), [[5]], num_workers=1, pin_memory=False)
    ended = r"loading process ended: DataLoader worker .*memory"
    with pytest.raises(RunFailed, match=ended) as caught:
        list(loader)
    assert not multiprocessing.active_children(), caught.value


class Mixed(Source):
    """Three channels, and one image of one."""

    def __init__(self) -> None:
        super().__init__("mixed", "train", (0.5,) * 3, (0.5,) * 3, ["a"])

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1 if index == 2 else 3, 8, 8, dtype=torch.uint8), 0


def test_images_of_other_channels_in_one_batch_are_refused() -> None:
    """And not copied three times, which is what torch would make of a gray one."""
    samples = Samples(Mixed(), lambda x: x, seed=0)
    with pytest.raises(BadInput, match=r"images of \(1, 8, 8\) and of \(3, 8, 8\).*image 2"):
        samples.__getitems__([Key(0, i) for i in range(4)])


KILLED = """
import multiprocessing, sys
sys.path.insert(0, "tests")
from test_loading import Failing
from util.data.samples import build_loader

if __name__ == "__main__":
    loader = build_loader(Failing(None), [[0], [1]], num_workers=2, pin_memory=False)
    loader.multiprocessing_context = sys.argv[1]
    batches = iter(loader)
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="tells by /proc which processes live")
@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_the_loading_processes_of_a_killed_run_end(context: str, tmp_path: Path) -> None:
    """Nobody is left who could end them."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    words = [sys.executable, str(script), context]
    with subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        workers = [int(word) for word in run.stdout.readline().split()]
        assert len(workers) == 2 and all(alive(worker) for worker in workers)
        run.kill()
    deadline = time.monotonic() + PATIENCE
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_run_that_is_over_has_no_loading_processes(tmp_path: Path, run_main: Any) -> None:
    """At once, and not when Python happens to collect what refers to them."""
    flags = [
        "--dataset=digits", "--model=mae_vit_micro_patch4", "--input_size=16", "--epochs=1",
        "--warmup_epochs=0", "--batch_size=60", "--train_images=120", "--num_workers=2",
        "--device=cpu", "--picture_every=0",
    ]  # fmt: skip
    gc.disable()
    try:
        assert run_main("main_pretrain", [*flags, f"--output_dir={tmp_path}"])[0] == 0
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_after_an_error_a_loader_goes_on():
    """With other processes."""
    data = Failing(KeyError())
    loader = build_loader(data, [[5], [6]], num_workers=1, pin_memory=False)
    with pytest.raises(KeyError):
        list(loader)
    loader.batch_sampler[:] = [[0], [6]]
    assert [batch["index"].item() for batch in loader] == [0, 6]
    assert [batch["index"].item() for batch in loader] == [0, 6]


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_conversions_are_said_by_the_first_process(rank: int | None, monkeypatch, capsys):
    """All take part in gathering them."""
    loader = build_loader(Failing(None), [[0]], num_workers=0, pin_memory=False)
    loader.tally = SimpleNamespace(news=lambda gather: gather(["a line"]))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    asked = []
    say_conversions(loader, lambda lines: asked.append(lines) or lines)
    assert asked == [["a line"]]
    assert ("a line" in capsys.readouterr().out) == (rank in (None, 0))


def pairs(root: Path) -> None:
    """A segmentation set in which one mask holds a value that is no class."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (32, 32), (i, 2, 3)).save(root / split / "images" / f"{i}.png")
            value = 9 if i == 5 else i % 2
            Image.new("L", (32, 32), value).save(root / split / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("a\nb\n")


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_commands_end_in_one_line(tmp_path, world):
    pairs(tmp_path / "data")
    flags = [*SMALL, *NEW, f"--data_path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'run'}"]
    flags += ["--num_workers=1", "--batch_size=4"]
    codes = wait(launch(flags, tmp_path / "out", world, module="main_segment"))
    text = "".join(path.read_text() for path in tmp_path.glob("out*"))
    assert set(codes) <= {EXIT_BAD_INPUT, EXIT_FAILED} and EXIT_BAD_INPUT in codes, text
    assert "Traceback" not in text and "error: the mask" in text and "holds the value 9" in text


@pytest.mark.smoke
def test_a_run_on_damaged_shards_ends_in_one_line(run_main, tmp_path):
    for i in range(30):
        path = tmp_path / "data/train/a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 2, 3)).save(path)
    flags = [f"--data_path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'p'}", "--split=train"]
    assert run_main("main_pack", [*flags, "--format=raw"])[0] == 0
    shard = tmp_path / "p/train/shard-00000.bin"
    shard.write_bytes(b"\1" * shard.stat().st_size)
    flags = [*TINY, f"--data_path=packed:{tmp_path / 'p'}", f"--output_dir={tmp_path / 'run'}"]
    flags += ["--dataset=imagefolder", "--num_workers=2"]
    code, _, err = run_main("main_pretrain", flags)
    assert code == EXIT_BAD_INPUT and "Traceback" not in err and "DataLoader" not in err
    assert f"error: {shard} is damaged" in err
    flags = [f"--data_path=packed:{tmp_path / 'p'}", f"--output_dir={tmp_path / 'q'}"]
    code, _, err = run_main("main_pack", [*flags, "--split=train", "--num_workers=2"])
    assert code == EXIT_BAD_INPUT and f"error: {shard} is damaged" in err
