"""What tests ask of run folders: weights, records, and where two of them differ."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.signals import STOP_SIGNALS, TERMINAL_SIGNALS
from util.train.checkpoint import LAST, load_file
from util.train.logger import MACHINE


@contextmanager
def signals_kept() -> Iterator[None]:
    """Put the handlers back: a command that has ended ignores signals, a test run should not."""
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, *TERMINAL_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def weights(folder: Path, name: str = LAST) -> dict[str, Tensor]:
    """The model's state in a checkpoint of a run folder."""
    return load_file(folder / name)["model"]


def metrics_file(folder: Path, task: str = "pretrain") -> Path:
    """Where a run of that task writes its records."""
    return folder / ("metrics.jsonl" if task == "pretrain" else f"metrics-{task}.jsonl")


def records(folder: Path, kind: str, task: str = "pretrain") -> list[dict[str, Any]]:
    """Records of one kind; a line that is being written is left out."""
    path, found = metrics_file(folder, task), []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [r for r in found if r["kind"] == kind]


def of_training(folder: Path, task: str, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """Records in order of kind, without what they say of the machine."""
    return [
        {k: v for k, v in record.items() if k not in MACHINE}
        for kind in kinds
        for record in records(folder, kind, task)
    ]


def different(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two states differ, bit for bit; the log's length is the machine's."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = {*a, *b} - {"log_bytes"}
        return [x for k in keys for x in different(a.get(k), b.get(k), f"{at}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [x for i in range(len(a)) for x in different(a[i], b[i], f"{at}/{i}")]
    return [] if type(a) is type(b) and a == b else [at]
