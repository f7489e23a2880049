"""What every benchmark does: take turns, keep all repeats, say on what machine, print and write."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from util.files import write_text
from util.progress import say
from util.train.memory import SETTINGS

PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow", "datasets")
# What decides a processor's rate of matrix products.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
ROOT = Path(__file__).resolve().parents[2]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """n, median, quartiles (inclusive, as numpy's), smallest and largest of the repeats.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no repeats to sum up")
    low = middle = high = values[0]
    if len(values) > 1:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "n": len(values),
        "median": middle,
        "q1": low,
        "q3": high,
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def take_turns(
    arms: Mapping[str, Callable[[], float]], repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Measure all arms once, then all again: A B C A B C ...

    What else the machine does then meets all of them alike, and the ratio of two arms in the same
    turn is worth more than the ratio of two rates.

    Args:
        arms: name to what measures one repeat, in the order of a turn.
        repeats: turns that are kept.
        warmup: turns before those, whose numbers are dropped.

    Returns:
        name to `repeats` numbers.
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-warmup, repeats):
        for name, measure in arms.items():
            value = measure()
            if turn >= 0:
                found[name].append(value)
    return found


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """`summary` of the ratios of two arms, turn by turn."""
    return summary([a / b for a, b in zip(values, base, strict=True)])


# How torch waits for its threads, whether it asks for large pages, and what decides for malloc.
ENVIRONMENT = ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", *SETTINGS)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on: processor, cores, memory, GPU, load, versions, commit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name, flags = _processor()
    found: dict[str, Any] = {
        "processor": name,
        "matrix_instructions": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "device": str(device),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _commit(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gb"] = round(properties.total_memory / 2**30, 1)
    return found


def _processor() -> tuple[str, set[str]]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    return name, flags


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this code, with a + where files differ from it; None outside a repository."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine_lines(about: Mapping[str, Any]) -> list[str]:
    """`machine` for the reader."""
    where = (
        f"{about['processor']}, {about['cores']} cores ({', '.join(about['matrix_instructions'])})"
    )
    if "gpu" in about:
        where += f"; {about['gpu']}, {about['gpu_memory_gb']} GiB"
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    environment = " ".join(f"{k}={v}" for k, v in about["environment"].items())
    return [
        f"{where}; {about['memory_gb']} GiB; load before {about['load_before']:.2f}",
        f"python {about['python']}, {versions}; commit {about['commit']}",
        *([environment] if environment else []),
    ]


def peak_resident() -> int:
    """Bytes: the most that this process has had in memory (VmHWM; of Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def private_memory(pid: int) -> int:
    """Bytes of a process that it shares with no other (Linux)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as aligned text; a column that no row has is left out, a missing cell is empty."""
    names = list(columns or dict.fromkeys(key for row in rows for key in row))
    names = [name for name in names if any(name in row for row in rows)]
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(figure: Mapping[str, Any]) -> str:
    """Smallest and largest repeat, for a table."""
    return f"{_cell(float(figure['min']))}-{_cell(float(figure['max']))}"


def show_rates(rows: Sequence[dict[str, Any]]) -> None:
    """A table of rates and their ratios."""
    shown = [
        {
            "arm": row["arm"],
            "n": row["images_per_s"]["n"],
            "images/s": row["images_per_s"]["median"],
            "min-max": spread(row["images_per_s"]),
            "a core": row.get("images_per_s_and_core", {}).get("median"),
            "ratio": row["ratio"]["median"],
            "ratio min-max": spread(row["ratio"]),
        }
        for row in rows
    ]
    say(table(shown))


def save_json(path: str | None, what: str, about: Mapping[str, Any], result: Any) -> None:
    """Write a benchmark with all its repeats; None: nowhere."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        about = {**about, "load_after": os.getloadavg()[0]}
        text = json.dumps({"benchmark": what, "machine": about, "result": result}, indent=1)
        write_text(Path(path), text + "\n")
