"""A run folder has one owner at a time, whoever starts what, where and when."""

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from launch import TINY, launch, until, wait, wait_for_step
from runs import records

from util.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_STOPPED, BadInput, RunFailed, Stopped
from util.train import lease as leases
from util.train import owner as owners
from util.train.agreement import Agreement
from util.train.checkpoint import LAST, load_file
from util.train.dist import Processes
from util.train.lease import NAME, Lease, acquire, hold_folder
from util.train.owner import Owner, kernel_of_this_process, this_owner

ALONE = Processes(0, 1, 0, 1, torch.device("cpu"))
ELSEWHERE = Owner("0" * 16, "another-machine", "boot pid:[1]", 1, 1, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def taken() -> Iterator[list[Lease]]:
    """Leases to give up at the end of a test."""
    found: list[Lease] = []
    yield found
    for lease in found:
        lease.release()


def write_lease(folder: Path, owner: Owner, age: float = 0.0) -> None:
    """A lease of an owner whose last heartbeat is some seconds ago."""
    path = folder / NAME
    path.write_text(json.dumps(asdict(owner)))
    at = time.time() - age
    os.utime(path, (at, at))


def dead_process() -> int:
    """The id of a process that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_a_folder_is_held_by_one_and_free_again(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with hold_folder(folder, ALONE) as lease:
        assert lease is not None
        lease.check()
        with pytest.raises(BadInput) as refused:
            acquire(folder)
        text = str(refused.value)
        assert f"process {os.getpid()} on {lease.owner.host}, since {lease.owner.since}" in text
        assert "give another --output_dir" in text
        assert [path.name for path in folder.iterdir()] == [NAME]
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_folder_made_for_nothing_is_removed_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), hold_folder(tmp_path / "a" / "b", ALONE):
        raise KeyError("a fault before anything was written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tells", [True, False])
def test_an_owner_is_known_by_kernel_and_number_only_with_its_start(
    tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system does not tell when a process began, another may have its number."""

    def start(pid: int) -> int:
        if not tells:
            raise OSError(errno.ENOENT, "no /proc")
        return 7

    monkeypatch.setattr(owners, "start_of_process", start)
    owner = this_owner({})
    assert (owner.started, owner.kernel) == ((7, kernel_of_this_process()) if tells else (0, ""))


@pytest.mark.parametrize(
    ("change", "age", "free"),
    [
        ({}, 0, False),  # alive
        ({}, 1e6, False),  # alive, if stopped by SIGSTOP: the process counts, not its heartbeat
        ({"token": "let go"}, 0, True),  # of a run of this process that has ended
        ({"started": 1}, 0, True),  # its number belongs to another process now
        ({"pid": None}, 0, True),  # dead
        ({"host": "another-machine"}, 0, False),
        ({"host": "another-machine"}, 50, False),
        ({"host": "another-machine"}, 70, True),
        # A container: the same host name, another namespace of process ids.
        ({"kernel": "boot pid:[2]", "pid": None}, 0, False),
        ({"kernel": "boot pid:[2]"}, 70, True),
        ({"kernel": ""}, 50, False),  # a system that does not tell
        ({"kernel": ""}, 70, True),
    ],
)
def test_who_is_taken_for_dead(
    change: dict, age: float, free: bool, tmp_path: Path, taken: list[Lease], capfd, monkeypatch
) -> None:
    if "pid" in change and change["pid"] is None:
        change = change | {"pid": dead_process()}
    owner = replace(this_owner({}), **change)
    if owner.token != "let go":
        monkeypatch.setattr(leases, "HELD", {owner.token})
    write_lease(tmp_path, owner, age)
    if not free:
        with pytest.raises(BadInput, match="is in use by process"):
            acquire(tmp_path)
        return
    taken.append(acquire(tmp_path))
    taken[0].check()
    out = capfd.readouterr()
    assert (out.out + out.err).count("taking over") == 1
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_process_that_nobody_waited_for_is_dead(tmp_path: Path, taken: list[Lease]) -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    started = leases.start_of_process(pid)
    write_lease(tmp_path, replace(this_owner({}), pid=pid, started=started))
    with pytest.raises(BadInput):
        acquire(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie
    taken.append(acquire(tmp_path))
    os.waitpid(pid, 0)


def test_the_clock_is_the_file_system_s(
    tmp_path: Path, taken: list[Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose clock is a day ahead takes nobody for dead."""
    write_lease(tmp_path, ELSEWHERE)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    with pytest.raises(BadInput):
        acquire(tmp_path)


# Leases of this machine whose values no owner has: asking the system for such a process fails.
DAMAGED = [
    json.dumps(asdict(this_owner({})) | change)
    for change in ({"pid": 10**30}, {"pid": 0}, {"pid": -1}, {"pid": "7"}, {"started": [1]})
]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 3}', "[" * 9000, *DAMAGED])
def test_a_lease_that_cannot_be_read_counts_by_its_age(
    text: str, tmp_path: Path, taken: list[Lease]
) -> None:
    path = tmp_path / NAME
    path.write_text(text)
    with pytest.raises(BadInput, match="an owner whose name cannot be read"):
        acquire(tmp_path)
    os.utime(path, (1, 1))
    taken.append(acquire(tmp_path))


def test_a_pipe_in_the_place_of_a_lease_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(BadInput, match="an owner whose name cannot be read"):
        acquire(tmp_path)


def test_a_link_to_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="is a link to nothing; remove it"):
        acquire(tmp_path)


def test_a_file_system_without_links(
    tmp_path: Path, taken: list[Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*names: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    before = os.umask(0)
    try:
        taken.append(acquire(tmp_path))
    finally:
        os.umask(before)
    taken[0].check()
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o644
    with pytest.raises(BadInput, match="is in use by process"):
        acquire(tmp_path)


def test_a_link_whose_answer_was_lost(
    tmp_path: Path, taken: list[Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS repeats the call, and is told that the name is taken: by ourselves."""
    original = os.link

    def link(*names: Path) -> None:
        original(*names)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", link)
    taken.append(acquire(tmp_path))
    taken[0].check()


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "7"},
        {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"},
    ],
)
def test_a_job_that_starts_again_waits_for_itself(
    environment: dict[str, str],
    tmp_path: Path,
    taken: list[Lease],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, slept = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds
        if leave_after is not None and len(slept) == leave_after:
            (tmp_path / NAME).unlink()

    monkeypatch.setattr(time, "sleep", sleep)
    write_lease(tmp_path, replace(ELSEWHERE, job="7"))
    leave_after = None
    with pytest.raises(Stopped, match=f"still held by process 1 on {ELSEWHERE.host}, job 7"):
        acquire(tmp_path, environment)
    assert 115 < sum(slept) < 125
    slept.clear()
    leave_after = 3
    taken.append(acquire(tmp_path, environment))
    assert len(slept) == 3
    write_lease(tmp_path, replace(ELSEWHERE, job="7"))
    with pytest.raises(BadInput, match="is in use"):  # another job does not wait
        acquire(tmp_path, {"SLURM_JOB_ID": "8"})


def test_an_owner_notices_that_it_lost_the_lease(tmp_path: Path) -> None:
    lost = acquire(tmp_path)
    (tmp_path / NAME).unlink()
    with pytest.raises(RunFailed, match="is gone: somebody removed it"):
        lost.check()
    write_lease(tmp_path, ELSEWHERE)
    with pytest.raises(RunFailed, match=f"now has process 1 on {ELSEWHERE.host}"):
        lost.check()
    lost.release()
    assert json.loads((tmp_path / NAME).read_text()) == asdict(ELSEWHERE)  # not its own


def test_the_heartbeat(
    tmp_path: Path, taken: list[Lease], monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """It touches the file; a failing file system is said once and ends nothing."""
    monkeypatch.setattr(leases, "HEARTBEAT", 0.01)
    taken.append(acquire(tmp_path))
    os.utime(tmp_path / NAME, (1, 1))
    until(lambda: (tmp_path / NAME).stat().st_mtime != 1)

    def fail(*rest: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "utime", fail)
    until(lambda: taken[0].fault is not None)
    taken[0].check()
    taken[0].check()
    out = capfd.readouterr()
    assert (out.out + out.err).count("heartbeat in") == 1


def test_many_starts_at_one_instant(tmp_path: Path) -> None:
    """On a free folder and on one whose owner is dead: one of them gets it, the others are told."""
    for trial in range(40):
        folder = tmp_path / str(trial)
        folder.mkdir()
        if trial % 2:
            write_lease(folder, replace(this_owner({}), pid=dead_process()))
        gate, got, refused = threading.Barrier(8), [], []

        def start(folder: Path, gate: threading.Barrier, got: list, refused: list) -> None:
            gate.wait()
            try:
                got.append(acquire(folder))
            except BadInput as error:
                refused.append(str(error))

        threads = [
            threading.Thread(target=start, args=(folder, gate, got, refused)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and len(refused) == 7, (trial, refused)
        assert all("is in use by process" in text for text in refused)
        got[0].check()
        got[0].release()
        assert list(folder.iterdir()) == []


def test_another_s_new_lease_is_not_taken_for_the_stale_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two find a dead owner; the slower must not take away what the faster has made."""
    write_lease(tmp_path, replace(this_owner({}), pid=dead_process()))
    original, faster = leases.remove_stale, []

    def remove_stale(*rest: object) -> bool:
        monkeypatch.setattr(leases, "remove_stale", original)
        faster.append(acquire(tmp_path))
        return original(*rest)

    monkeypatch.setattr(leases, "remove_stale", remove_stale)
    with pytest.raises(BadInput, match="is in use"):
        acquire(tmp_path)
    faster[0].check()
    faster[0].release()


def test_who_was_killed_while_taking_over_is_in_nobody_s_way(
    tmp_path: Path, taken: list[Lease]
) -> None:
    dead = replace(this_owner({}), pid=dead_process())
    write_lease(tmp_path, dead)
    (tmp_path / f"{NAME}-takeover").write_text(json.dumps(asdict(dead)))
    taken.append(acquire(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


# ---- Runs --------------------------------------------------------------------------------------


def wait_in_step(step: int, go_on: Path) -> None:
    """In a child: stay after that step until a file is there."""
    original = Agreement.after_step

    def after_step(self: Agreement) -> object:
        if self.steps + 1 == step:
            until(go_on.exists)
        return original(self)

    Agreement.after_step = after_step


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_the_same_command_twice(world: int, tmp_path: Path) -> None:
    folder, go_on = tmp_path / "run", tmp_path / "go-on"
    flags = [*TINY, f"--output_dir={folder}", f"--batch_size={24 // world}"]
    hold = partial(wait_in_step, 5, go_on)
    first = launch(flags, tmp_path / "first", world, prepare=hold)
    wait_for_step(folder, 5, first)
    second = launch(flags, tmp_path / "second", world)
    assert wait(second) == [EXIT_BAD_INPUT] * world
    for name in ("second", "second.1")[:world]:
        assert f"in use by process {first[0].pid} on" in (tmp_path / name).read_text()
    go_on.touch()
    assert wait(first) == [0] * world, (tmp_path / "first").read_text()
    assert [r["step"] for r in records(folder, "train")] == list(range(1, 31))
    assert not (folder / NAME).exists()


@pytest.mark.dist
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_after_an_end_the_same_command_goes_on(kind: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = [*TINY, f"--output_dir={folder}", "--save_minutes=1e-6"]
    first = launch(flags, tmp_path / "first", prepare=partial(wait_in_step, 5, tmp_path / "never"))
    wait_for_step(folder, 5, first)
    if kind == signal.SIGTERM:
        (tmp_path / "never").touch()
    os.kill(first[0].pid, kind)
    assert wait(first) == [EXIT_STOPPED if kind == signal.SIGTERM else -signal.SIGKILL]
    assert (folder / NAME).exists() == (kind == signal.SIGKILL)
    assert wait(launch(flags, tmp_path / "second")) == [0]
    assert ("taking over" in (tmp_path / "second").read_text()) == (kind == signal.SIGKILL)
    assert [r["step"] for r in records(folder, "train")] == list(range(1, 31))


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_lost_its_lease_writes_no_more(world: int, tmp_path: Path) -> None:
    folder, go_on = tmp_path / "run", tmp_path / "go-on"
    flags = [*TINY, f"--output_dir={folder}", f"--batch_size={24 // world}", "--save_minutes=1e-6"]
    children = launch(flags, tmp_path / "out", world, prepare=partial(wait_in_step, 5, go_on))
    wait_for_step(folder, 5, children)
    (folder / NAME).unlink()
    write_lease(folder, ELSEWHERE)
    before = {path.name: path.read_bytes() for path in folder.glob("[cm]*")}
    go_on.touch()
    assert wait(children) == [EXIT_FAILED] * world
    text = (tmp_path / "out").read_text()
    assert f"now has process 1 on {ELSEWHERE.host}" in text and "Traceback" not in text
    assert {path.name: path.read_bytes() for path in folder.glob("[cm]*")} == before
    assert json.loads((folder / NAME).read_text()) == asdict(ELSEWHERE)


@pytest.mark.smoke
def test_tasks_share_a_folder_one_after_another_and_readers_need_no_lease(
    tmp_path: Path, run_main
) -> None:
    flags = [*TINY, f"--output_dir={tmp_path}", "--epochs=1"]
    assert run_main("main_pretrain", flags)[0] == 0
    own = [f"--output_dir={tmp_path}", "--dataset=synthetic", "--model=vit_micro_patch4"]
    own += ["--batch_size=16", "--num_workers=0", "--device=cpu", "--input_size=16"]
    train = [*own, f"--finetune={tmp_path / LAST}", "--epochs=1", "--warmup_epochs=0"]
    assert run_main("main_finetune", [*train, "--train_images=32"])[0] == 0
    with hold_folder(tmp_path, ALONE):
        code, _, err = run_main("main_finetune", [*train, "--train_images=32"])
        assert code == EXIT_BAD_INPUT and "is in use by process" in err
        assert run_main("main_finetune", [*own, "--eval"])[0] == 0
        assert run_main("main_finetune", [*train, "--dry_run"])[0] == 0
    assert load_file(tmp_path / LAST)["task"] == "finetune"


def test_bad_input_leaves_no_folder(tmp_path: Path, run_main) -> None:
    flags = [*TINY, f"--output_dir={tmp_path}/a/run", f"--data_path={tmp_path}/nothing"]
    code, _, err = run_main("main_pretrain", [*flags, "--dataset=imagefolder"])
    assert code == EXIT_BAD_INPUT and "nothing" in err
    assert list(tmp_path.iterdir()) == []


def test_a_process_is_known_by_kernel_and_start() -> None:
    assert kernel_of_this_process() and this_owner({}).started > 0
    assert leases.start_of_process(os.getpid()) == this_owner({}).started
