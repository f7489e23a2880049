"""The lease on a run folder: one owner at a time, whoever starts what and where.

The owner's name stands in the file `.lease`, whose modification time is its heartbeat. A process of
the same machine is looked up. One elsewhere is believed to live while its heartbeat is younger than
`STALE` seconds by the clock of the file system, which all machines share, and no local clock.

Nothing depends on file locks, which some network file systems do not have: a lease comes into being
by a hard link, which fails where the name is taken, and so does the right to remove a stale one.
"""

import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from util.errors import BadInput, RunFailed, Stopped
from util.files import sweep
from util.progress import say
from util.signals import StoppedAtStart, asked_at_start
from util.train.dist import Processes
from util.train.owner import Owner, start_of_process, this_owner

NAME = ".lease"
# Seconds: between heartbeats; without one until the owner is taken for dead; that a job which
# Slurm has started again waits for its former self; between two looks; for a rival's few calls.
HEARTBEAT, STALE, WAIT, POLL, BRIEF = 10.0, 60.0, 120.0, 1.0, 0.01
# Tokens of the leases that this process holds: of several runs in a notebook, one.
HELD: set[str] = set()
# Of a file that can be a lease: bytes, and the process id, an int of 32 bits.
LONGEST, LARGEST_PID = 10_000, 2**31 - 1


@dataclass(frozen=True)
class FoundLease:
    """A lease as it stands in a folder.

    Attributes:
        owner: None: its file is being written, or is damaged.
        beat: time of its last heartbeat, by the file system.
        file: (device, inode).
    """

    owner: Owner | None
    beat: float
    file: tuple[int, int]


def read_lease(path: Path) -> FoundLease | None:
    """The lease in a file; None: there is none.

    Raises:
        OSError: the file system fails.
    """
    try:
        # Opened anew each time: a network file system then asks its server and not its cache.
        # Without waiting, as a named pipe of that name would have it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(LONGEST) if stat.S_ISREG(status.st_mode) else b""
    except FileNotFoundError:
        return None
    return FoundLease(owner_in(text), status.st_mtime, (status.st_dev, status.st_ino))


def owner_in(text: bytes) -> Owner | None:
    """The owner that the text of a lease names; None: it is damaged."""
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    fits = all(type(getattr(owner, field.name)) is field.type for field in fields(owner))
    return owner if fits and 0 < owner.pid <= LARGEST_PID else None


def reason_to_take(found: FoundLease, me: Owner, now: float) -> str | None:
    """Why a lease that was found is nobody's any more; None: it is held.

    Args:
        now: by the file system's clock.
    """
    owner = found.owner
    if owner and owner.host == me.host and owner.kernel and owner.kernel == me.kernel:
        try:
            started = start_of_process(owner.pid)
        except OSError:
            started = -1  # not to be seen: the heartbeat decides
        if started is None or started not in (-1, owner.started):
            return "it is not running any more"
        if started == owner.started:
            if owner.pid == me.pid and owner.token not in HELD:
                return "its run in this process has ended"  # and the file could not be removed
            return None
    age = now - found.beat
    return f"its last heartbeat was {age:.0f} s ago" if age > STALE else None


class Lease:
    """A held lease; see `hold_folder`.

    Args:
        path: its file.
        owner: this process.
    """

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path, self.owner = path, owner
        self.handle = os.open(path, os.O_RDWR)
        status = os.fstat(self.handle)
        self.file = (status.st_dev, status.st_ino)
        self.fault: OSError | None = None
        self.said = False
        self.over = threading.Event()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def _beat(self) -> None:
        """In a thread: touch our file, and no other that may have come in its place."""
        while not self.over.wait(HEARTBEAT):
            try:
                os.utime(self.handle)
            except OSError as error:
                self.fault = error

    def check(self) -> None:
        """See that the lease is still ours, before something is written into the folder.

        Raises:
            RunFailed: it is not; with who has it.
        """
        if self.fault is not None and not self.said:
            self.said = True
            say(
                f"the heartbeat in {self.path} failed ({self.fault.strerror}); after {STALE:.0f} s "
                "without one another start may take the folder over"
            )
        try:
            found = read_lease(self.path)
        except OSError:
            return  # not known; what is about to be written says what is wrong
        if found is not None and found.file == self.file:
            return
        if not os.path.exists(self.path.parent):
            raise RunFailed(
                f"cannot write to folder {self.path.parent}: No such file or directory; somebody "
                "removed it during the run"
            )
        who = f"now has {found.owner}" if found and found.owner else "is gone: somebody removed it"
        raise RunFailed(
            f"{self.path.parent} is no longer this run's: its lease {who}; nothing more is "
            "written. The run's last checkpoint is what the owner goes on from"
        )

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lease up, if it is still ours."""
        if self.over.is_set():
            return
        self.over.set()
        HELD.discard(self.owner.token)
        with contextlib.suppress(OSError):  # with this process, or `HELD`, it ends in any case
            found = read_lease(self.path)
            if found is not None and found.file == self.file:
                self.path.unlink()
        os.close(self.handle)


def acquire(folder: Path, environment: Mapping[str, str] = os.environ) -> Lease:
    """Take the lease on a folder that exists.

    A job that Slurm started again waits up to `WAIT` seconds for its former self.

    Raises:
        BadInput: somebody else holds it, or the folder cannot be written.
        Stopped: a job that was started again has waited in vain.
        StoppedAtStart: a stop signal came while it waited.
    """
    me, path = this_owner(environment), folder / NAME
    own = folder / f"{NAME}-{me.token}.tmp"
    deadline, waiting = time.monotonic() + WAIT, False
    lease: Lease | None = None
    HELD.add(me.token)  # before anybody can see it
    try:
        own.write_text(json.dumps(asdict(me)))
        while True:
            if put_in_place(own, path, me):
                lease = Lease(path, me)
                return lease
            os.utime(own)
            now, found = own.stat().st_mtime, read_lease(path)
            if found is None:
                if path.is_symlink():
                    raise BadInput(f"{path} is a link to nothing; remove it")
                continue  # given up in between
            who = found.owner or "an owner whose name cannot be read"
            if reason := reason_to_take(found, me, now):
                if remove_stale(path, found, own, me):
                    say(f"taking over {folder} from {who}: {reason}")
                continue
            again = me.restart > 0 or (me.job and found.owner and found.owner.job == me.job)
            if not again:
                raise BadInput(refusal(folder, who, now - found.beat))
            if not waiting:
                say(f"waiting up to {WAIT:.0f} s for {who}, which still holds {folder}")
            waiting = True
            if number := asked_at_start():
                raise StoppedAtStart(number)
            if time.monotonic() > deadline:
                raise Stopped(
                    f"{folder} is still held by {who} after {WAIT:.0f} s; the same command goes on "
                    "once that has ended"
                )
            time.sleep(POLL)
    except OSError as error:
        raise BadInput(f"cannot write to folder {folder}: {error.strerror}") from None
    finally:
        if lease is None:
            HELD.discard(me.token)
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)


def refusal(folder: Path, who: Owner | str, age: float) -> str:
    """What to tell who may not have the folder."""
    return (
        f"{folder} is in use by {who} (heartbeat {max(age, 0):.0f} s ago); wait until it has ended "
        f"or stop it, or give another --output_dir. If it is dead, its lease ends {STALE:.0f} s "
        "after its last heartbeat"
    )


def put_in_place(own: Path, path: Path, me: Owner) -> bool:
    """Give our file the lease's name, unless that is taken.

    Raises:
        OSError: the file system fails.
    """
    try:
        os.link(own, path)
        return True
    except FileExistsError:
        # Over a network the answer to a link that was made may be lost, and the link tried again.
        found = read_lease(path)
        return bool(found and found.owner and found.owner.token == me.token)
    except OSError as error:
        if not own.exists():
            raise
        return write_in_place(path, me, error)


def write_in_place(path: Path, me: Owner, error: OSError) -> bool:
    """The same on a file system without hard links: create the file, which must be new.

    Raises:
        OSError: that does not work either.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    except OSError:
        raise error from None
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps(asdict(me)))
    return True


def remove_stale(path: Path, found: FoundLease, own: Path, me: Owner) -> bool:
    """Remove a stale lease; of several who try, one does.

    The right to remove one is itself a file, which one alone can make. So nobody takes away the
    new lease that a faster one has put in the place of the stale one.

    Args:
        path: of the lease. found: as it was judged.
        own: this process's file with its name in it, just touched.

    Raises:
        OSError: the file system fails.
    """
    right = path.with_name(f"{NAME}-takeover")
    if not put_in_place(own, right, me):
        other = read_lease(right)
        if other is not None and reason_to_take(other, me, own.stat().st_mtime):
            right.unlink(missing_ok=True)  # its maker was killed
        time.sleep(BRIEF)
        return False
    try:
        if read_lease(path) != found:  # another file, or touched since
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        right.unlink(missing_ok=True)


def sweep_leases(folder: Path) -> None:
    """Remove the files of starts that were killed while they asked for the lease."""
    with contextlib.suppress(OSError):
        now = (folder / NAME).stat().st_mtime
        for path in folder.glob(f"{NAME}-*"):
            if now - path.stat().st_mtime > STALE:  # those that wait touch theirs
                path.unlink()


@contextmanager
def hold_folder(folder: Path, procs: Processes) -> Iterator[Lease | None]:
    """Own a run folder: nobody else writes to it meanwhile. A collective.

    The main process holds the lease; the others get None, and are refused with it. Folders that
    were made for it and stay empty are removed again.

    Raises:
        BadInput, Stopped, StoppedAtStart: see `acquire`; on all processes.
    """
    lease: Lease | None = None
    refused: BadInput | Stopped | None = None
    made: list[Path] = []
    try:
        if procs.main:
            try:
                made = make_folder(folder)
                lease = acquire(folder)
                sweep_leases(folder)
                for place in (folder, folder / "pictures"):  # of owners that were killed
                    sweep(place, owned=True)
            except (BadInput, Stopped) as error:
                refused = error
            except StoppedAtStart:
                if procs.world_size == 1:
                    raise  # several learn of it together, below
        answer: Any = procs.gather(refused and (type(refused), str(refused)))[0]
        if answer is not None:
            raise answer[0](answer[1]) from None
        yield lease
    finally:
        if lease is not None:
            lease.release()
        with contextlib.suppress(OSError):  # from the first that is not empty on
            for path in reversed(made):
                path.rmdir()


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns those that were not there, from the top.

    Raises:
        BadInput: it cannot be made.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write to folder {folder}: {error.strerror}") from None
    return missing[::-1]
