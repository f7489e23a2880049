"""Who holds a run folder: a process, known beyond its number."""

import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """Who holds a lease.

    Attributes:
        token: of this one lease.
        host: name of the machine.
        kernel: boot id and process-id namespace: only where both are ours does a process id mean
            the same process. Empty where the system does not tell.
        pid, started: the process, and when it began in ticks since boot: a number is used again.
        since: when it took the lease, UTC.
        job, restart: of Slurm; "" and 0 without.
    """

    token: str
    host: str
    kernel: str
    pid: int
    started: int
    since: str
    job: str = ""
    restart: int = 0

    def __str__(self) -> str:
        job = f", job {self.job}" * bool(self.job)
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def kernel_of_this_process() -> str:
    """The running kernel and this process's namespace of process ids; "" if they cannot be had."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_of_process(pid: int) -> int | None:
    """When a process of this machine began, in ticks since boot.

    Returns:
        None: there is no such process any more, or it has ended and nobody has asked for its code.

    Raises:
        OSError: there is one, but it may not be looked at.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it is another user's, so it is there
    try:
        # The name, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        os.kill(pid, 0)  # hidden from us (PermissionError), or just gone
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def this_owner(environment: Mapping[str, str]) -> Owner:
    """This process, for a new lease."""
    try:
        started = start_of_process(os.getpid()) or 0
    except OSError:
        started = 0
    return Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        kernel=kernel_of_this_process() if started else "",
        pid=os.getpid(),
        started=started,
        since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        job=environment.get("SLURM_JOB_ID", ""),
        restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
    )
