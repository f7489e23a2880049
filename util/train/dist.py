"""Processes: one, those that torchrun started, or those of a Slurm step; and what they agree on."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from util.errors import BadInput, RunFailed, Stopped
from util.files import at_start, writing
from util.signals import (
    StoppedAtStart,
    asked_at_start,
    why_peers_left,
)
from util.train.memory import keep_freed_memory

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# srun sets all of these for each task of a step; a batch script itself has no STEP_NUM_TASKS.
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class Place:
    """Which process this is, and how it finds the others.

    Attributes:
        rank, world_size: of all processes.
        local_rank, local_size: of those on this machine.
        rendezvous: torch's init_method; None for one process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    rendezvous: str | None = None


@dataclass
class Processes:
    """This process among the others.

    Attributes:
        rank, world_size: of all processes; local_rank, local_size: of those on this machine.
        device: where this process computes.
        control: gloo group for what the hosts have to say to each other; None for one process, and
            after `leave`.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: Any = None

    @property
    def main(self) -> bool:
        """The one process that writes."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of a tensor on this process's device, or on the CPU; new."""
        total = tensor.clone()
        if self.world_size > 1:
            dist.all_reduce(total, group=self.control if total.device.type == "cpu" else None)
        return total

    def gather(self, thing: Any) -> list[Any]:
        """A picklable thing of every process, by rank; waits for all.

        Raises:
            StoppedAtStart: on all of them, when a stop signal reached one before the step loop.
        """
        if self.world_size == 1:
            return [thing]
        answers: list[Any] = [None] * self.world_size
        dist.all_gather_object(answers, (thing, asked_at_start()), group=self.control)
        if stop := max(number for _, number in answers):
            raise StoppedAtStart(stop)
        return [answer for answer, _ in answers]

    def barrier(self) -> None:
        """Wait for the others."""
        self.gather(None)

    def leave(self) -> None:
        """Leave the others, with no exchange under way; the control group's threads end.

        A thread of gloo that lets go of a finished exchange of Python's tensors waits for the GIL.
        One that still does when the interpreter ends aborts the whole process, whatever its exit
        code would have been. Threads end with the last reference to their group, which is here.
        """
        dist.destroy_process_group()
        self.control = None

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do.

        If it fails there, they do not wait for it but meet the same fault themselves.
        """
        if not self.main:
            self.barrier()
        try:
            yield
        finally:
            if self.main:
                self.barrier()


def choose_device(name: str, local_rank: int, *, alone: bool = True) -> torch.device:
    """`auto`: a GPU of NVIDIA's, else Apple's, else the CPU. Or cpu, cuda, cuda:INDEX or mps.

    Args:
        alone: no other process takes part; gloo has no collectives on Apple's GPUs, so `auto` is
            the CPU for several where there is no other.

    Raises:
        BadInput: no such device, or none that we compute on.
    """
    if name == "auto":
        apple = alone and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"--device {name} is no device: {str(error).splitlines()[0]}") from None
    if device.type not in DEVICES:
        raise BadInput(f"--device {name} cannot be computed on; use auto, {', '.join(DEVICES)}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput(f"--device {name}, but torch finds no GPU of Apple's; use --device cpu")
    if device.type == "mps" and not alone:
        raise BadInput(
            f"--device {name} is one GPU, and several processes were started; start one, or give "
            "--device cpu"
        )
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BadInput(f"--device {name}, but torch finds no GPU; use --device cpu")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise BadInput(
                f"--device {name}: process {local_rank} of this machine needs GPU {index}, and it "
                f"has {torch.cuda.device_count()}, numbered from 0"
            )
        return torch.device("cuda", index)
    return device


def read_environment(environment: Mapping[str, str], folder: Path) -> Place:
    """Who this process is, by torchrun's variables or else by those of a Slurm step.

    Without either it is one process.

    Args:
        folder: run folder, on a file system that all processes see; the processes of a Slurm step
            meet in a file there, named by job, step and restart.

    Raises:
        BadInput: variables half set, or with values that cannot be.
    """
    # MASTER_ADDR and MASTER_PORT alone are often left over in a shell, and harmless.
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys():
        rank, world, local = _numbers(environment, TORCHRUN, "torchrun")
        here = int(environment.get("LOCAL_WORLD_SIZE", world))
        return Place(rank, world, local, here, "env://" if world > 1 else None)
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        rank, world, local = _numbers(environment, SLURM, "srun")
        # "2(x3),1" tasks on the nodes: this one's first number is right where nodes are alike.
        per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", str(world)).split("(")[0]
        names = (*SLURM[3:], "SLURM_RESTART_COUNT")
        meeting = "-".join(environment.get(name, "0") for name in names)
        path = folder.resolve() / f".rendezvous-{meeting}"
        return Place(rank, world, local, int(per_node.split(",")[0]), f"file://{path}")
    return Place()


def _numbers(
    environment: Mapping[str, str], names: tuple[str, ...], launcher: str
) -> tuple[int, int, int]:
    """(rank, world size, local rank), the first three of the names, all of which must be set."""
    missing = [name for name in names if name not in environment]
    if missing:
        found = [name for name in names if name in environment]
        raise BadInput(
            "the environment variables for several processes are incomplete: "
            f"{', '.join(found)} given, {', '.join(missing)} missing; start with {launcher}, or "
            "unset them"
        )
    try:
        rank, world, local = (int(environment[name]) for name in names[:3])
    except ValueError as error:
        raise BadInput(f"{', '.join(names[:3])} must be whole numbers: {error}") from None
    if not (0 <= rank < world and 0 <= local < world):
        raise BadInput(f"{names[0]} {rank} and {names[2]} {local} must be below {names[1]} {world}")
    return rank, world, local


@contextmanager
def processes(device_name: str, folder: Path) -> Iterator[Processes]:
    """Join the other processes, and leave them at the end. See also `keep_freed_memory`.

    nccl between GPUs, gloo between CPUs; a second, small gloo group carries what the hosts agree
    on. When one process dies, gloo closes its connections, and the others end with `RunFailed`.

    Args:
        device_name: auto | cpu | cuda | mps.
        folder: run folder, see `read_environment`.

    Raises:
        BadInput: see `read_environment` and `choose_device`.
        RunFailed: another process is gone.
    """
    place = read_environment(os.environ, folder)
    device = choose_device(device_name, place.local_rank, alone=place.world_size == 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    keep_freed_memory(device)
    if place.world_size == 1:
        yield join(place, device)
        return
    if place.rendezvous != "env://":
        with at_start(), writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    with peers_lost(place.rank):
        procs = join(place, device)
        try:
            yield procs
        except Stopped:
            # Launchers kill the others when one leaves so, and the main process may be writing.
            procs.barrier()
            procs.leave()
            raise
    # After a fault nothing is waited for: the others may never take part in what is under way.
    procs.leave()


def join(place: Place, device: torch.device) -> Processes:
    """Meet the other processes at the place's rendezvous; for one there is nobody to meet."""
    us = (place.rank, place.world_size, place.local_rank, place.local_size, device)
    if place.world_size == 1:
        return Processes(*us)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=place.rendezvous,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(minutes=30),
    )
    return Processes(*us, control=dist.new_group(backend="gloo"))


def distribute(
    model: nn.Module,
    procs: Processes,
    *,
    compiled: bool = False,
    fullgraph: bool = True,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model as it is trained: compiled if asked for, its gradients those of all processes.

    One in shards (`util.train.shard`) exchanges its gradients by itself, and is not compiled.

    The model handed in stays as it is and shares its parameters: it is what is saved, under its own
    names, and what is evaluated. Compiled first and wrapped second: torch then cuts the backward
    pass where buckets of gradients are full, and sends them while it goes on.

    Args:
        compiled: through torch.compile, which must get the model as one graph; batches have one
            shape. Random draws are those of the uncompiled model.
        fullgraph: False lets a foreign model's graph be cut.
        options: more of torch.compile's, for benchmarks.

    Raises:
        BadInput: there is no C++ compiler, which torch.compile calls.
    """
    if compiled:
        check_compiler()
        model = cast(
            nn.Module,
            torch.compile(
                model,
                fullgraph=fullgraph,
                dynamic=False,
                options={"fallback_random": True, **(options or {})},
            ),
        )
    if procs.world_size == 1 or isinstance(model, FSDPModule):
        return model
    ids = [procs.device.index] if procs.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def check_compiler() -> None:
    """See that torch.compile finds a C++ compiler, before the data are opened.

    Raises:
        BadInput: it does not.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise BadInput(
            f"--compile needs a C++ compiler, and there is no {' or '.join(names)}; install one "
            "(Debian: apt-get install g++), or give --no-compile"
        )


@contextmanager
def peers_lost(rank: int) -> Iterator[None]:
    """What torch says of a broken connection to another process, as a `RunFailed` for people."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunFailed) or not is_peer_lost(error):
            raise
        if number := why_peers_left():  # the other one heard of it first
            raise StoppedAtStart(number) from None
        raise RunFailed(
            f"process {rank}: another process ended in the middle of the run; its own message says "
            f"why, and log-rank*.txt of the run folder ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, shortened."""
    return str(error).strip().split("\n")[0][:200]


def is_peer_lost(error: RuntimeError) -> bool:
    """Whether torch's exception means that a connection to another process broke."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return any(sign in str(error) for sign in signs)
