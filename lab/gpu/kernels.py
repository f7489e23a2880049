"""Where a step's time goes on a device: its kernels, by kind and one by one."""

import re
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lab.bench.command import build_step
from lab.bench.contenders import Arm, parse_arm
from lab.gpu.parts import Scale, keep
from lab.gpu.speed import BATCH

# What a kernel is of, by the first pattern that its name has.
KINDS = (
    ("attention", r"flash|fmha|attention|sdpa|softmax|dot_do_o|convert_dq"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitk|addmm|aten::mm|aten::bmm"),
    ("optimiser", r"adam|multi_tensor"),
    ("fused by the compiler", r"triton"),
    ("copies", r"memcpy|memset|copy|aten::cat|CatArray"),
    ("sorting and gathering", r"sort|gather|scatter|index|radix"),
    ("norms", r"norm"),
    ("element by element, and sums", r"elementwise|vectorized|reduce|aten::"),
)
MARKED = re.compile(r"Optimizer\.|ProfilerStep|##")
MOST_NAMED = 25  # kernels that are listed
STEPS = 3
# At the batch of the other parts, so that what they compiled is found again.
PROFILED = (
    ("base", "mae,bf16,compile"),
    ("base", "mae,bf16,compile,cross=.34"),
    ("large", "mae,bf16,compile"),
    ("base", "mae,bf16"),
)


def kernels(scale: Scale) -> dict[str, Any]:
    """The kernels of some steps of each arm."""
    found: dict[str, Any] = {}
    for size, text in PROFILED[:1] if scale.tiny else PROFILED:
        base = Arm(model=f"mae_vit_{size}_patch16", batch=BATCH[size])
        if scale.tiny:
            base, text = Arm(model="mae_vit_micro_patch8", size=32, batch=4), "mae"
        found[f"{size},{text}"] = profile_arm(parse_arm(text, base), scale.device)
        keep(scale, "kernels", found)
    return found


def profile_arm(arm: Arm, device: str) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel and by kernel, and how long the device was idle."""
    on_gpu = device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        answer = build_step(0, arm, device, f"{folder}/meeting")
        answer("warm up" if on_gpu else 1)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiler:
            answer(STEPS)
    steps = STEPS + on_gpu  # on a GPU one is taken before those that count
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # A GPU's spans of marked code hold kernels that are listed themselves.
    events = [e for e in profiler.events() if e.device_type == kind]
    events = [e for e in events if not (on_gpu and MARKED.match(e.name))]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    times: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in events:
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[event.name] = times.get(event.name, 0.0) + own / 1000 / steps
        calls[event.name] = calls.get(event.name, 0) + 1
    if on_gpu:
        torch.cuda.empty_cache()
    return {
        "steps": steps,
        "busy": busy_share(spans),
        "ms_a_step": sum(times.values()),
        "by_kind": by_kind(times),
        "kernels": [
            {"ms": times[name], "calls": calls[name] / steps, "name": name[:160]}
            for name in sorted(times, key=lambda name: -times[name])[:MOST_NAMED]
        ],
    }


def by_kind(times: dict[str, float]) -> dict[str, float]:
    """Times of kernels summed by `KINDS`, the largest first."""
    sums: dict[str, float] = {}
    for name, time in times.items():
        kind = next((k for k, pattern in KINDS if re.search(pattern, name, re.I)), "other")
        sums[kind] = sums.get(kind, 0.0) + time
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def busy_share(spans: Iterable[tuple[float, float]]) -> float:
    """The part of the time from the first start to the last end in which something ran."""
    ordered = sorted(spans)
    busy, end = 0.0, ordered[0][0]
    for start, stop in ordered:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - ordered[0][0])
