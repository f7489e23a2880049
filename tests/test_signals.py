"""A stop signal at any moment of a start ends with 75, and Ctrl-C is one of them."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import COMMANDS, JOBS, words_of
from launch import PATIENCE, ROOT, TINY, launch, until, wait, wait_for_step
from runs import records, signals_kept

import main_pretrain
from util import signals
from util.errors import EXIT_INTERRUPTED, EXIT_STOPPED, RunFailed
from util.signals import STOP_SIGNALS, TERMINAL_SIGNALS, StoppedAtStart
from util.train.agreement import Agreement
from util.train.checkpoint import LAST, load_file
from util.train.dist import Processes, peers_lost
from util.train.lease import NAME

HERE = Path(__file__).resolve().parent
ALL = (*STOP_SIGNALS, *TERMINAL_SIGNALS)
TRAINING = ("main_pretrain", "main_finetune", "main_segment")
OTHERS = sorted({*COMMANDS, *JOBS} - set(TRAINING))


# ---- Imports -----------------------------------------------------------------------------------


def hear_the_terminal() -> None:
    """In a new process: a shell's background ignores Ctrl-C, and nohup a closed terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def held_in_import(command: str, folder: Path) -> subprocess.Popen[str]:
    """A command that has begun to import torch, and will not come further."""
    process = subprocess.Popen(
        [sys.executable, *words_of(command), *TINY, f"--output_dir={folder / 'run'}"],
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": f"{HERE / 'slurm_hold'}",
            "MMAE_TEST_HOLD_IMPORT": "torch",
            "MMAE_TEST_HELD": str(folder / "held"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_the_terminal,
    )
    until(lambda: (folder / "held.0").exists())
    return process


@pytest.mark.parametrize("command", TRAINING)
@pytest.mark.parametrize("kind", ALL)
def test_a_signal_while_a_training_command_imports(
    command: str, kind: signal.Signals, tmp_path: Path
) -> None:
    process = held_in_import(command, tmp_path)
    process.send_signal(kind)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_STOPPED, err
    assert err == (
        f"stopped: {kind.name} before the first step of this start; nothing is lost, the same "
        "command begins again\n"
    )
    assert not out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", OTHERS)
def test_ctrl_c_while_another_command_imports(command: str, tmp_path: Path) -> None:
    process = held_in_import(command, tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (EXIT_INTERRUPTED, "", "stopped: Ctrl-C\n")


def test_ctrl_c_in_a_command_that_does_not_train(
    tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    import main_visualize

    def interrupted(*rest: object, **named: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(main_visualize, "build_parser", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, out, err = run_main("main_visualize", [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out, err) == (EXIT_INTERRUPTED, "", "stopped: Ctrl-C\n")


def test_a_program_that_imports_and_calls_keeps_its_handlers(tmp_path: Path, run_main) -> None:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    mine = {number: signal.getsignal(number) for number in ALL}
    try:
        for name in (*TRAINING, *OTHERS):
            importlib.import_module(name)
        main_pretrain.main([*TINY, f"--output_dir={tmp_path}", "--epochs=1"])
        assert {number: signal.getsignal(number) for number in ALL} == mine
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- The start of a run ------------------------------------------------------------------------


def hold_listing(folder: Path, patience: float, swallow: bool = False, rank: str = "0") -> None:
    """In a child: one rank stays in the listing of the data set until a file is there."""
    signals.PATIENCE = patience
    original = main_pretrain.open_set

    def open_set(*rest: object) -> object:
        if os.environ.get("RANK", "0") == rank:
            (folder / "listing").touch()
            while not (folder / "go-on").exists():
                try:
                    time.sleep(0.02)
                except BaseException:
                    if not swallow:
                        raise
        return original(*rest)

    main_pretrain.open_set = open_set


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Callable]:
    """Starts a run whose listing is held; returns its processes and the flags."""

    def start(world: int, patience: float = 1000.0, **more: object) -> list:
        flags = [*TINY, f"--output_dir={tmp_path / 'run'}", f"--batch_size={24 // world}"]
        prepare = partial(hold_listing, tmp_path, patience, **more)
        children = launch(flags, tmp_path / "out", world, prepare=prepare)
        until((tmp_path / "listing").exists)
        return children

    yield start
    (tmp_path / "go-on").touch()


@pytest.mark.dist
@pytest.mark.parametrize("kind", ALL)
def test_a_signal_in_the_start_of_one_process(
    kind: signal.Signals, held: Callable, tmp_path: Path
) -> None:
    """It leaves at once, and gives the lease up."""
    children = held(1)
    assert (tmp_path / "run" / NAME).exists()
    os.kill(children[0].pid, kind)
    assert wait(children) == [EXIT_STOPPED]
    text = (tmp_path / "out").read_text()
    assert text.count(f"stopped: {kind.name} before the first step") == 1
    assert "Traceback" not in text and not (tmp_path / "run").exists()


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_a_swallowed_stop_is_acted_on_by_the_loop(
    world: int, held: Callable, tmp_path: Path
) -> None:
    """A library that catches everything; several processes agree where they next meet."""
    children = held(world, swallow=True)
    os.kill(children[0].pid, signal.SIGTERM)
    time.sleep(0.1)
    (tmp_path / "go-on").touch()
    assert wait(children) == [EXIT_STOPPED] * world
    if world == 1:
        assert "stopped: SIGTERM after step 1, in epoch 1" in (tmp_path / "out").read_text()
        assert load_file(tmp_path / "run" / LAST)["step"] == 1
    else:
        assert "SIGTERM before the first step" in (tmp_path / "out.1").read_text()


@pytest.mark.dist
def test_a_stop_that_nobody_acts_on(held: Callable, tmp_path: Path) -> None:
    children = held(1, patience=0.1, swallow=True)
    os.kill(children[0].pid, signal.SIGTERM)
    assert wait(children) == [EXIT_STOPPED]
    assert "stopped: SIGTERM before the first step" in (tmp_path / "out").read_text()


@pytest.mark.dist
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_of_two_in_the_start_ends_both(
    victim: int, held: Callable, tmp_path: Path
) -> None:
    """Rank 1 waits inside a library for rank 0, which lists."""
    children = held(2)
    os.kill(children[victim].pid, signal.SIGUSR1)
    time.sleep(0.1)
    (tmp_path / "go-on").touch()
    assert wait(children) == [EXIT_STOPPED] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
def test_a_signal_to_both_of_two_that_hang(held: Callable, tmp_path: Path) -> None:
    children = held(2, patience=0.1, swallow=True)
    for child in children:
        os.kill(child.pid, signal.SIGUSR2)
    assert wait(children) == [EXIT_STOPPED] * 2


@pytest.mark.dist
def test_a_signal_while_waiting_for_the_others_to_come(tmp_path: Path) -> None:
    """torch waits for the second process, which never starts, without looking at signals."""
    flags = [*TINY, f"--output_dir={tmp_path / 'run'}"]
    children = launch(flags, tmp_path / "out", prepare=one_of_two)
    until((tmp_path / "out").exists)
    until(lambda: "joining" in (tmp_path / "out").read_text())
    os.kill(children[0].pid, signal.SIGTERM)
    assert wait(children) == [EXIT_STOPPED]


def one_of_two() -> None:
    """In a child: be the first of two, and say when it begins to wait for the second."""
    from util.train import dist

    os.environ |= {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    signals.PATIENCE, signals._start.several = 0.1, True
    original = dist.join

    def join(*rest: object) -> object:
        print("joining", flush=True)
        return original(*rest)

    dist.join = join


# ---- Ctrl-C in the loop ------------------------------------------------------------------------


def hold_step(step: int, times: int) -> None:
    """In a child: stay in that step until so many signals have come."""
    original, noted, note = Agreement.after_step, [], Agreement._note

    def after_step(self: Agreement) -> object:
        deadline = time.monotonic() + 600
        while self.steps + 1 == step and len(noted) < times and time.monotonic() < deadline:
            time.sleep(0.02)
        return original(self)

    def counted(self: Agreement, number: int, frame: object) -> None:
        noted.append(number)
        print(f"noted {len(noted)}", flush=True)
        note(self, number, frame)

    Agreement.after_step, Agreement._note = after_step, counted


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [d for child in children for d in (*descendants(int(child)), int(child))]


@pytest.mark.dist
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A terminal sends it to every process; loading processes say nothing of it."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    flags = [*TINY, "--epochs=1"]
    children = launch(
        [*flags, f"--output_dir={folder}", "--num_workers=2"],
        tmp_path / "out",
        prepare=partial(hold_step, 5, 1),
    )
    wait_for_step(folder, 5, children)
    for pid in (*descendants(children[0].pid), children[0].pid):
        os.kill(pid, signal.SIGINT)
    assert wait(children) == [EXIT_STOPPED]
    text = (tmp_path / "out").read_text()
    assert "press again to leave at once" in text and "Traceback" not in text
    assert "stopped: SIGINT after step 5, in epoch 1" in text
    assert wait(launch([*flags, f"--output_dir={folder}"], tmp_path / "out")) == [0]
    assert wait(launch([*flags, f"--output_dir={whole}"], tmp_path / "out")) == [0]
    assert [r["step"] for r in records(folder, "train")] == list(range(1, 11))
    weights = [load_file(f / LAST)["model"] for f in (folder, whole)]
    assert all((weights[0][k] == weights[1][k]).all() for k in weights[1])


@pytest.mark.dist
def test_ctrl_c_twice_ends_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = [*TINY, f"--output_dir={folder}"]
    children = launch(flags, tmp_path / "out", prepare=partial(hold_step, 5, 2))
    wait_for_step(folder, 5, children)
    for n in (1, 2):
        os.kill(children[0].pid, signal.SIGINT)
        until(lambda n=n: f"noted {n}" in (tmp_path / "out").read_text())
    assert wait(children) == [EXIT_INTERRUPTED]
    assert "Traceback" not in (tmp_path / "out").read_text()
    assert not (folder / LAST).exists()


def test_the_loop_takes_over_whatever_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a signal in the instant between its handlers and the end of the start."""
    start = signals._Start(taken=True, phase="running", asked=signal.SIGTERM)
    monkeypatch.setattr(signals, "_start", start)
    agreement = Agreement(Processes(0, 1, 0, 1, torch.device("cpu")), signal=signal.SIGUSR1)
    with signals_kept(), agreement:
        assert start.over.is_set() and start.phase == "over"
        assert agreement.after_step().stop == signal.SIGUSR1


@pytest.mark.parametrize("leaving", [False, True])
@pytest.mark.parametrize("place", ["asked", "seen"])
def test_a_peer_that_the_same_stop_ended_is_no_failure(
    leaving: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is ending, but the loop began before Slurm had ended all of the job's tasks."""
    start = signals._Start(taken=True, phase="over", leaving=leaving, **{place: signal.SIGUSR2})
    monkeypatch.setattr(signals, "_start", start)
    with pytest.raises(StoppedAtStart if leaving else RunFailed), peers_lost(0):
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("number", ALL)
def test_a_second_stop_in_the_start(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C again is meant to end it at once; a launcher repeats its signals."""
    monkeypatch.setattr(signals, "_start", signals._Start(taken=True, asked=signal.SIGTERM))
    ended: list[bool] = []
    monkeypatch.setattr(signals, "interrupt_at_once", lambda: ended.append(True))
    signals._note(number, None)
    assert bool(ended) == (number == signal.SIGINT)


@pytest.mark.parametrize("number", [*ALL, signal.SIGWINCH, signal.SIGCHLD])
def test_the_watching_thread_ends_a_start_for_stops_alone(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal that changes its size is none, and must not be remembered as one."""
    left: list[int] = []
    start = signals._Start(taken=True, leave=lambda stop: left.append(stop.signal))
    monkeypatch.setattr(signals, "_start", start)
    monkeypatch.setattr(signals, "PATIENCE", 0)
    read, write = os.pipe()
    os.write(write, bytes([number]))
    os.close(write)
    signals._watch(read)
    assert left == ([number] if number in ALL else []) and start.seen == (left or [0])[0]


def test_a_forked_child_dies_of_signals_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_start", signals._Start(taken=True, phase="running"))
    with signals_kept():
        for number in ALL:
            signal.signal(number, signals._note)
        signals._forget()
        after = {number: signal.getsignal(number) for number in ALL}
    dies = dict.fromkeys(STOP_SIGNALS, signal.SIG_DFL)
    assert after == dies | dict.fromkeys(TERMINAL_SIGNALS, signal.SIG_IGN)
