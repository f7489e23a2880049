"""The parts of the kit, and how one is run: in a process of its own, for so many seconds.

A part that fails, hangs or lacks a package leaves a result that says so, and the next one begins.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from util.files import write_text

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5  # seconds between a polite end and the other
TAIL = 3000  # characters of a part's output that its result keeps where it failed


@dataclass(frozen=True)
class Scale:
    """What the parts run on, and how large they are.

    Attributes:
        device: cuda or cpu.
        tiny: the smallest size at which every branch is taken, for a machine without a GPU.
        folder: for files of the parts; packed sets, runs, JSON.
    """

    device: str
    tiny: bool
    folder: Path


Run = Callable[[Scale], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One question to the GPU.

    Attributes:
        name: of it.
        question: what it answers, for the table.
        limit: seconds.
        module: whose function `name` runs it.
        needs: packages without which it is skipped.
        gpu_only: it has no meaning on a CPU.
        timed: it measures time, and so needs the machine for itself.
    """

    name: str
    question: str
    limit: float
    module: str
    needs: Sequence[str] = ()
    gpu_only: bool = False
    timed: bool = True


# The most important first. Limits are of one H100 with 16 cores, where compiling ViT-B took most of
# a minute; what is not reached is said.
PARTS = (
    Part("parity", "equal to transformers' ViTMAE, TF32 off and on", 120, "checks",
         ["transformers"], timed=False),
    Part("precisions", "bf16 and fp16 follow fp32; an overflow skips a step", 120, "checks",
         timed=False),
    Part("resume", "a stopped run goes on to the same bits, also compiled", 150, "checks",
         timed=False),
    Part("no_waits", "no step waits for the device", 120, "checks", gpu_only=True, timed=False),
    Part("steps", "images a second beside the peers", 260, "speed"),
    Part("kernels", "where a step's time goes", 120, "kernels"),
    Part("attention", "which kernel of attention is the fastest, by shape", 40, "attention"),
    Part("data", "images a second from files, and who waits", 110, "speed"),
    Part("switches", "what each switch gives", 150, "speed"),
    Part("batches", "which batch is the best", 150, "speed"),
    Part("modes", "what a search for the fastest kernels gives", 150, "speed"),
)  # fmt: skip


@dataclass
class Result:
    """What became of a part.

    Attributes:
        name: of the part.
        status: done, failed, out of time, skipped or not reached.
        seconds: that it took.
        why: of anything but done.
        found: what it found.
    """

    name: str
    status: str
    seconds: float = 0.0
    why: str = ""
    found: dict[str, Any] = field(default_factory=dict)


def absent(part: Part, scale: Scale) -> str:
    """Why a part is skipped here; empty: it is not."""
    if part.gpu_only and scale.device != "cuda":
        return "it needs a GPU"
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def run_part(part: Part, scale: Scale, seconds: float, more: Mapping[str, str]) -> Result:
    """Run a part in a process of its own, for at most so many seconds.

    Args:
        more: environment variables.
    """
    if why := absent(part, scale):
        return Result(part.name, "skipped", why=why)
    if seconds <= 0:
        return Result(part.name, "not reached", why="the time was over")
    answer = scale.folder / f"{part.name}.json"
    answer.unlink(missing_ok=True)
    words = [sys.executable, "-m", "lab.gpu", "--part", part.name, "--device", scale.device]
    words += ["--folder", str(scale.folder), *(["--tiny"] if scale.tiny else [])]
    log = scale.folder / f"{part.name}.log"
    began = time.monotonic()
    with log.open("wb") as out:
        child = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | dict(more), stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            end_group(child)
    took = time.monotonic() - began
    found = json.loads(answer.read_text()) if answer.is_file() else {}
    if code == 0:
        return Result(part.name, "done", took, found=found)
    tail = log.read_text(errors="replace")[-TAIL:]
    if code is None:
        return Result(part.name, "out of time", took, f"after {seconds:.0f} s\n{tail}", found)
    return Result(part.name, "failed", took, f"exit code {code}\n{tail}", found)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def save(path: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """All results so far, whole."""
    content = {"machine": about, "parts": [asdict(result) for result in results]}
    write_text(path, json.dumps(content, indent=1) + "\n")


def keep(scale: Scale, name: str, found: dict[str, Any]) -> None:
    """What a part has so far: if it runs out of time, this is what is left of it."""
    write_text(scale.folder / f"{name}.json", json.dumps(found))
