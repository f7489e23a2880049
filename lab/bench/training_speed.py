"""Training as a whole: who waits for whom, and how far the losses of two arms are apart."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from lab.bench.limits import stopwatch
from lab.bench.measuring import ratios, show_rates, summary, table, take_turns
from util.progress import say
from util.train.logger import StepReport
from util.train.memory import keep_freed_memory

SMOOTHED = 20  # steps of the moving mean
# Trains on the batches of an iterable, and hands each step's report over.
Train = Callable[[Iterable[Any], Callable[[StepReport], bool]], Any]


def measure_together(
    train: Train,
    loader: Iterable[Any],
    steps: int,
    images: int,
    *,
    device: torch.device,
    repeats: int,
    warmup: int,
) -> dict[str, Any]:
    """Step alone, data alone, and both together, in turns; the table is printed.

    Args:
        loader: gives `steps` batches, `images` in all, in each iteration.
        repeats, warmup: turns that count, and turns before them.

    Returns:
        rows, the share of the time that the training process waits, and the bottleneck.
    """
    keep_freed_memory(device)  # as in a run
    kept = next(iter(loader))
    seconds_of, waited = stopwatch(device), [0.0]

    def note(report: StepReport) -> bool:
        waited[0] += report.waited
        return False

    def step_alone() -> float:
        return images / seconds_of(lambda: train([kept] * steps, note))

    def data_alone() -> float:
        return images / seconds_of(lambda: [None for _ in loader])

    shares: list[float] = []

    def together() -> float:
        waited[0] = 0.0
        seconds = seconds_of(lambda: train(loader, note))
        shares.append(waited[0] / seconds)
        return images / seconds

    turns = {"step alone": step_alone, "data alone": data_alone, "together": together}
    found = take_turns(turns, repeats, warmup)
    rows = [
        {"arm": name, "images_per_s": summary(rates), "ratio": ratios(rates, found["together"])}
        for name, rates in found.items()
    ]
    waiting = summary(shares[warmup:])
    show_rates(rows)
    slower = min(("step alone", "data alone"), key=lambda name: summary(found[name])["median"])
    bottleneck = slower.split()[0]
    shared = ", and both share its cores" if device.type == "cpu" else ""
    say(
        f"the bottleneck is the {bottleneck}; the training process waits for data "
        f"{waiting['median']:.1%} of the time{shared}"
    )
    return {"rows": rows, "waiting": waiting, "bottleneck": bottleneck}


# ---- Loss curves ---------------------------------------------------------------------------------


def compare_curves(curves: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """How far each curve is from the first one, raw and as a moving mean; the table is printed."""
    base = next(iter(curves.values()))
    rows = [
        {
            "arm": name,
            "steps": len(curve),
            "first loss": curve[0],
            "last loss": curve[-1],
            "largest difference": f"{apart(curve, base):.3%}",
            f"of means over {SMOOTHED}": f"{apart(smooth(curve), smooth(base)):.3%}",
        }
        for name, curve in curves.items()
    ]
    say(table(rows))
    return rows


def smooth(curve: Sequence[float]) -> list[float]:
    """Means over `SMOOTHED` steps in a row; of all, where there are fewer."""
    width = min(SMOOTHED, len(curve))
    return [sum(curve[i : i + width]) / width for i in range(len(curve) - width + 1)]


def apart(curve: Sequence[float], base: Sequence[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(curve, base, strict=True))
