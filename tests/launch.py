"""Start commands as processes of their own, cheaply: a fork server has torch imported already."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from util.signals import take_signals

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
# The server imports by PYTHONPATH alone: Python 3.11 does not hand it this process's sys.path.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
CONTEXT.set_forkserver_preload(["main_pretrain", "launch"])

# 256 drawn images in batches of 24 are 10 steps an epoch; 16 patches each.
TINY = [
    "--dataset=synthetic", "--model=mae_vit_micro_patch4", "--input_size=16", "--batch_size=24",
    "--epochs=3", "--warmup_epochs=1", "--blr=2e-3", "--log_every=1",
    "--num_workers=0", "--device=cpu", "--decoder_depth=1", "--picture_every=0",
]  # fmt: skip


def _child(
    module: str, argv: Sequence[str], env: dict[str, str], log: Path, prepare: Callable | None
) -> None:
    """In the new process: its output to a file, then the command."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(ROOT)
    os.environ.update(env)
    # A shell without job control lets what runs in its background ignore Ctrl-C, the tests too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    take_signals()  # as a file that runs as a command does first
    if prepare is not None:
        prepare()
    __import__(module)
    sys.modules[module].main(list(argv))


def launch(
    argv: Sequence[str],
    log: Path,
    world: int = 1,
    *,
    module: str = "main_pretrain",
    prepare: Callable | None = None,
    launcher: str = "torchrun",
) -> list[BaseProcess]:
    """Start a command on `world` processes, as torchrun or srun would.

    Args:
        log: file that takes the output of all; rank r > 0 writes to `{log}.{r}`.
        prepare: picklable function, run in each child before the command.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        env = {"OMP_NUM_THREADS": "1"}
        if world > 1 and launcher == "srun":
            env |= {
                "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_JOB_ID": "1",
                "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(world),
                "SLURM_STEP_TASKS_PER_NODE": str(world),
            }  # fmt: skip
        elif world > 1:
            env |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        path = log if rank == 0 else log.with_name(f"{log.name}.{rank}")
        child = CONTEXT.Process(target=_child, args=(module, argv, env, path, prepare))
        child.start()
        children.append(child)
    return children


def wait(children: Sequence[BaseProcess], seconds: float = 100) -> list[int | None]:
    """Exit codes, by rank; whoever is not done by then is killed and has None."""
    deadline = time.monotonic() + seconds
    for child in children:
        child.join(max(deadline - time.monotonic(), 0))
    codes = [child.exitcode for child in children]
    for child in children:
        if child.is_alive():
            child.kill()
            child.join()
    return codes


def records(folder: Path, kind: str) -> list[dict]:
    """Records of a run folder; a line that is being written is left out."""
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [r for r in found if r["kind"] == kind]


def steps_done(folder: Path) -> int:
    """The last logged step."""
    return max((r["step"] for r in records(folder, "train")), default=0)


def wait_for_step(folder: Path, step: int, children: Sequence[BaseProcess]) -> None:
    """Until the run has logged that step, or has ended."""
    deadline = time.monotonic() + 60
    while steps_done(folder) < step and all(c.is_alive() for c in children):
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)
