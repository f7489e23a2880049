"""Start commands as processes of their own, cheaply: a fork server has torch imported already."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from runs import records
from torch.distributed import TCPStore

from util.signals import take_signals

# Seconds that a test waits for anything: a hang is meant, and never a busy machine.
PATIENCE = 1800.0
ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
# The server imports by PYTHONPATH alone: Python 3.11 does not hand it this process's sys.path.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
CONTEXT.set_forkserver_preload(["main_pretrain", "launch"])


def repetitions(few: int, all: int) -> range:
    """How often a random trial is made: `make test-all` makes all of them.

    The seed of a trial is `trial_seed(number)`; it differs from run to run.
    """
    return range(all if os.environ.get("MMAE_TEST_ALL") == "1" else few)


def trial_seed(number: int) -> int:
    """Seed of one of the random trials; MMAE_TEST_SEED, printed by each run, repeats them."""
    return int(os.environ["MMAE_TEST_SEED"]) + number


# 256 drawn images in batches of 24 are 10 steps an epoch; 16 patches each.
TINY = [
    "--dataset=synthetic", "--model=mae_vit_micro_patch4", "--input_size=16", "--batch_size=24",
    "--epochs=3", "--warmup_epochs=1", "--blr=2e-3", "--log_every=1",
    "--num_workers=0", "--device=cpu", "--decoder_depth=1", "--picture_every=0",
]  # fmt: skip

# Every random part on: crops, flips, order, Gumbel noise, random masks, jitter.
EVERY_DRAW = [
    *TINY, "--mask=mixed", "--avg_temperature=1", "--pos_offset=jitter", "--lscale_init=0.1",
]  # fmt: skip
# A model of real digits that is hardly trained: something to start from.
OF_DIGITS = [*TINY, "--dataset=digits", "--batch_size=300", "--epochs=1", "--warmup_epochs=0"]


def meeting(world: int) -> tuple[list[dict[str, str]], TCPStore]:
    """The variables that torchrun sets for each of several processes, and the store they meet at.

    As with torchrun the store is the parent's, which must keep it: the port is taken before anyone
    is told its number, so nobody else can have it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    return [{"RANK": str(r), "LOCAL_RANK": str(r), **shared} for r in range(world)], store


def start_group(function: Callable, world: int, *rest: object) -> list[BaseProcess]:
    """Start `function(rank, world, *rest)` on several processes, as torchrun would."""
    places, store = meeting(world)
    children = [
        CONTEXT.Process(target=_place, args=(places[rank], function, rank, world, *rest))
        for rank in range(world)
    ]
    for child in children:
        child.start()
        child.store = store  # kept as long as the child is known
    return children


def _place(place: dict[str, str], function: Callable, *rest: object) -> None:
    torch.set_num_threads(1)
    os.environ.update(place)
    function(*rest)


def _child(
    module: str, argv: Sequence[str], env: dict[str, str], log: Path, prepare: Callable | None
) -> None:
    """In the new process: its output to a file, then the command."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(ROOT)
    os.environ.update(env)
    # A shell without job control lets what runs in its background ignore Ctrl-C, the tests too, and
    # nohup a closed terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
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
    places, store = meeting(world)
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
            env |= places[rank]
        path = log if rank == 0 else log.with_name(f"{log.name}.{rank}")
        child = CONTEXT.Process(target=_child, args=(module, argv, env, path, prepare))
        child.start()
        child.store = store  # kept as long as the child is known
        children.append(child)
    return children


def wait(children: Sequence[BaseProcess], seconds: float = PATIENCE) -> list[int | None]:
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


def until(
    done: Callable[[], object], what: Callable[[], str] = lambda: "", pause: float = 0.01
) -> None:
    """Wait for something; if it never comes it is a failure, which `what` explains."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, what()
        time.sleep(pause)


def steps_done(folder: Path, task: str = "pretrain") -> int:
    """The last logged step."""
    return max((r["step"] for r in records(folder, "train", task)), default=0)


def wait_for_step(
    folder: Path, step: int, children: Sequence[BaseProcess], task: str = "pretrain"
) -> None:
    """Until the run has logged that step, or has ended."""
    until(
        lambda: steps_done(folder, task) >= step or not all(c.is_alive() for c in children),
        lambda: f"the run does not get on: {steps_done(folder, task)} of {step} steps",
    )
