"""Several processes: the same numbers, agreed decisions, and no one left waiting."""

import ctypes
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import CONTEXT, TINY, launch, start_group, wait, wait_for_step
from runs import records
from torch.utils._python_dispatch import TorchDispatchMode

import engine_pretrain
import main_pretrain
from models_zoo import create_model
from util import signals
from util.errors import BadInput, Stopped
from util.signals import stoppable
from util.train.agreement import Agreement
from util.train.checkpoint import LAST, load_file
from util.train.dist import Processes, processes, read_environment
from util.train.logger import StepLog
from util.train.optim import create_adamw, parameter_groups
from util.train.step import OptimizerStep

HERE = Path("/run/folder")


def train(rank: int, world: int, accum_iter: int, batch: int, out: Path) -> None:
    """Twenty float64 steps at a global batch of 24 images, by one of several processes."""
    with processes("cpu", out) as procs:
        torch.manual_seed(0)
        model = create_model("mae_vit_micro_patch4", img_size=16, depth=2, lscale_init=0.1).double()
        optimizer = create_adamw(parameter_groups(model, 0.05), 1e-3, (0.9, 0.95))
        trained = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
        step = OptimizerStep(
            trained, optimizer, device=procs.device, accum_iter=accum_iter, clip_grad=1.0
        )
        for number in range(20):
            generator = torch.Generator().manual_seed(number)
            images = torch.randn(24, 3, 16, 16, generator=generator, dtype=torch.float64)
            mask = torch.rand(24, 16, generator=generator).argsort(1) >= 4
            rows = torch.arange(24).reshape(accum_iter, world, batch)[:, rank]
            step(lambda i, x=images, m=mask: trained(x[i], m[i], 4)["loss"], rows, 1e-3)
        if procs.main:
            torch.save(model.state_dict(), out / "weights.pt")
    assert not dist.is_initialized()  # what comes after may be of one process


@pytest.mark.dist
def test_processes_and_accumulation_change_nothing_but_rounding(tmp_path: Path) -> None:
    results = {}
    for world in (1, 2, 3):
        for accum_iter in (1, 2, 4):
            out = tmp_path / f"{world}-{accum_iter}"
            out.mkdir()
            batch = 24 // world // accum_iter
            assert wait(start_group(train, world, accum_iter, batch, out)) == [0] * world
            results[world, accum_iter] = torch.load(out / "weights.pt")
    whole = results[1, 1]
    for split, weights in results.items():
        worst = max((whole[k] - weights[k]).abs().max().item() for k in whole)
        assert worst < 1e-9, (split, worst)


def end_with_an_exchange(rank: int, world: int, ending: Exception | None, out: Path) -> None:
    """Leave while a thread of gloo waits for the GIL, to let go of what it exchanged."""
    with suppress(Stopped), processes("cpu", out) as procs:
        dist.all_reduce(torch.ones(1), group=procs.control, async_op=True)
        ctypes.PyDLL(None).usleep(200_000)  # which keeps the GIL
        if ending is not None:
            raise ending
    assert not dist.is_initialized()
    assert not gloo_threads()


def gloo_threads() -> list[Path]:
    """Threads of this process that carry out exchanges, two for each group."""
    tasks = Path("/proc/self/task").iterdir()
    return [task for task in tasks if (task / "comm").read_text() == "pt_gloo_runloop\n"]


@pytest.mark.dist
@pytest.mark.parametrize("ending", [None, Stopped("stopped", signal.SIGUSR2)])
def test_no_thread_waits_for_python_as_the_interpreter_ends(
    ending: Exception | None, tmp_path: Path
) -> None:
    """It would abort the process: under Slurm a finished job counted as failed."""
    assert wait(start_group(end_with_an_exchange, 2, ending, tmp_path)) == [0, 0]


def fail_in_an_exchange(rank: int, world: int, out: Path) -> None:
    """One process fails while the exchange that it began waits for the other, which has gone on."""
    with processes("cpu", out) as procs:
        if rank == 0:
            dist.all_reduce(torch.ones(1), group=procs.control, async_op=True)
            raise ValueError("a fault")
        dist.all_reduce(torch.ones(1))  # in another group: until the failed process is gone


@pytest.mark.dist
def test_a_fault_does_not_wait_for_the_others(tmp_path: Path) -> None:
    assert wait(start_group(fail_in_an_exchange, 2, tmp_path), 300) == [1, 1]


def break_loss(when: int) -> None:
    """On rank 1 the images of one step become infinite."""
    original, calls = engine_pretrain.normalize, [0]

    def normalize(*args):
        calls[0] += 1
        x = original(*args)
        return x * torch.inf if calls[0] == when and os.environ["RANK"] == "1" else x

    engine_pretrain.normalize = normalize


@pytest.mark.dist
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_finite_on_one_of_two(policy: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    flags = [*TINY, f"--output_dir={folder}", f"--nan_policy={policy}", "--batch_size=12"]
    flags += ["--log_every=5", "--epochs=2"]
    children = launch(flags, out, 2, prepare=partial(break_loss, 13))
    codes = wait(children)
    texts = [out.read_text(), out.with_name("out.1").read_text()]
    dumps = {p.name: json.loads(p.read_text()) for p in folder.glob("nonfinite-*")}
    assert set(dumps) == {"nonfinite-step13-rank0.json", "nonfinite-step13-rank1.json"}
    assert dumps["nonfinite-step13-rank1.json"]["loss"] in ("nan", "inf")
    assert dumps["nonfinite-step13-rank0.json"]["loss"] not in ("nan", "inf")
    indices = [[i for micro in d["indices"] for i in micro] for d in dumps.values()]
    assert len(indices[0]) == len(indices[1]) == 12 and not set(indices[0]) & set(indices[1])
    assert all(
        d["last_good_checkpoint"] == str(folder / "checkpoint-last.pth") for d in dumps.values()
    )
    train = records(folder, "train")
    assert [r.get("skipped", 0) for r in train if r["step"] == 15] == [1]
    if policy == "stop":
        assert codes == [1, 1] and train[-1]["step"] == 15
        assert all("not finite in step 13" in t and "Traceback" not in t for t in texts)
        assert wait(launch(flags, out, 2)) == [0, 0]  # goes on from the last good checkpoint
    else:
        assert codes == [0, 0] and "not finite in step 13" in texts[0]
    assert records(folder, "train")[-1]["step"] == 20


@pytest.mark.dist
def test_a_killed_process_ends_the_other(tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    flags = [*TINY, f"--output_dir={folder}", "--batch_size=12", "--epochs=500"]
    children = launch(flags, out, 2)
    wait_for_step(folder, 5, children)
    os.kill(children[1].pid, signal.SIGKILL)
    start = time.monotonic()
    assert wait(children, 60) == [1, -signal.SIGKILL]
    assert time.monotonic() - start < 60
    text = out.read_text()
    assert "another process ended" in text and "Traceback" not in text
    assert "another process ended" in (folder / "log-rank0.txt").read_text()
    assert (folder / "log-rank1.txt").read_text().count("starts") == 1


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        break_at, original = [3], engine_pretrain.normalize

        def normalize(*args):
            break_at[0] -= 1
            if break_at[0] == 0:
                raise KeyError("a fault of one process")
            return original(*args)

        engine_pretrain.normalize = normalize


@pytest.mark.dist
def test_a_fault_of_one_process_is_in_its_log_and_ends_both(tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    flags = [*TINY, f"--output_dir={folder}", "--batch_size=12"]
    assert wait(launch(flags, out, 2, prepare=fail_on_rank_1), 60) == [1, 1]
    assert "a fault of one process" in (folder / "log-rank1.txt").read_text()
    assert "another process ended" in (folder / "log-rank0.txt").read_text()


class NoHostSync(TorchDispatchMode):
    """Whatever would make the host wait for a device's value raises, unless allowed."""

    allowed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if not NoHostSync.allowed and ("_local_scalar_dense" in name or "nonzero" in name):
            raise AssertionError(f"{name} waits for the device between log lines")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [[], ["--method=mae"], ["--pos_offset=jitter", "--clip_grad=1"],
                                   ["--precision=bf16", "--accum_iter=2"]])  # fmt: skip
def test_no_host_synchronisation_between_log_lines(
    flags: list[str], tmp_path: Path, monkeypatch
) -> None:
    watched = []

    def watch(cls: type, name: str, allowed: bool) -> None:
        """Guard a method (or, where a log line is written, lift the guard)."""
        original = getattr(cls, name)

        def method(self, *args):
            if allowed:
                NoHostSync.allowed = True
                original(self, *args)
                NoHostSync.allowed = False
                return None
            watched.append(name)
            with NoHostSync():
                return original(self, *args)

        monkeypatch.setattr(cls, name, method)

    watch(OptimizerStep, "__call__", allowed=False)  # masks, forward, backward, update
    watch(StepLog, "__call__", allowed=False)
    watch(StepLog, "flush", allowed=True)
    main_pretrain.main([*TINY, "--log_every=4", f"--output_dir={tmp_path}", *flags])
    assert len(watched) == 2 * load_file(tmp_path / LAST)["step"]
    with pytest.raises(AssertionError, match="waits"), NoHostSync():
        torch.ones(1).item()  # the guard itself bites


def train_long(folder: Path) -> None:
    """Write this process's memory after every tenth of 200 steps."""
    torch.set_num_threads(1)
    sizes = []
    original = StepLog.__call__

    def call(self, report) -> None:
        original(self, report)
        if report.step % 10 == 0:
            # What it allocated. The pages of libraries come and go as a busy machine needs them.
            status = Path("/proc/self/status").read_text()
            sizes.append(int(re.search(r"RssAnon:\s+(\d+) kB", status).group(1)) / 2**10)

    StepLog.__call__ = call
    main_pretrain.main([*TINY, "--epochs=20", "--log_every=20", f"--output_dir={folder}"])
    (folder / "sizes.json").write_text(json.dumps(sizes))


@pytest.mark.dist
def test_memory_is_flat_over_200_steps(tmp_path: Path) -> None:
    child = CONTEXT.Process(target=train_long, args=(tmp_path,))
    child.start()
    assert wait([child]) == [0]
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert len(sizes) == 20
    assert max(sizes[10:]) - max(sizes[3:10]) < 5, sizes  # MiB


FULL = {
    "torchrun": {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h",
                 "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"},
    "slurm": {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1",
              "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
}  # fmt: skip


@pytest.mark.parametrize("launcher", FULL)
def test_environments(launcher: str) -> None:
    place = read_environment(FULL[launcher], HERE)
    assert (place.rank, place.world_size, place.local_rank, place.local_size) == (1, 4, 1, 2)
    for missing in FULL[launcher]:
        if missing in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"):
            continue
        half = {k: v for k, v in FULL[launcher].items() if k != missing}
        with pytest.raises(BadInput, match=f"{missing} missing"):
            read_environment(half, HERE)


def test_slurm_meets_anew_after_each_restart() -> None:
    first = read_environment(FULL["slurm"], HERE).rendezvous
    again = read_environment(FULL["slurm"] | {"SLURM_RESTART_COUNT": "1"}, HERE).rendezvous
    assert first == "file:///run/folder/.rendezvous-7-0-0" and again != first
    # A batch script without srun is one process, however many tasks the job has.
    alone = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert read_environment(alone, HERE).world_size == 1


@pytest.mark.parametrize("change", [{"RANK": "x"}, {"RANK": "4"}, {"LOCAL_RANK": "-1"}])
def test_impossible_ranks(change: dict[str, str]) -> None:
    with pytest.raises(BadInput):
        read_environment(FULL["torchrun"] | change, HERE)


@pytest.fixture
def as_command() -> Iterator[None]:
    """This process has the stop signals as a command has them; given back at the end."""
    before = {number: signal.getsignal(number) for number in stoppable()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "_start", replace(signals._start, taken=True, phase="over"))
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_command")
def test_agreement_of_one_is_immediate() -> None:
    alone = Processes(0, 1, 0, 1, torch.device("cpu"))
    with Agreement(alone) as agreement:
        assert agreement.after_step().stop == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert agreement.after_step().stop == signal.SIGUSR1
    with Agreement(alone, save_minutes=1e-9) as agreement:
        assert agreement.after_step().save
    # One that comes after the end would make a failure of a run that is done.
    os.kill(os.getpid(), signal.SIGUSR1)
