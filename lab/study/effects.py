"""Effects and their intervals: paired by seed, Student's t, corrected after Holm.

A value is one run's outcome; runs of the same seed share its data order and noise, so what is
compared is compared within a seed first, and the seeds are the sample.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from util.errors import needs

LEVEL = 0.95
BySeed = dict[int, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval.

    Attributes:
        mean: of the values.
        low, high: of the 95 % t-interval; None where there are fewer than two values.
        p: two-sided, of the mean being 0; None as above.
        n: values.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int


def quantile(n: int, level: float = LEVEL) -> float:
    """Student's t with n - 1 degrees of freedom, two-sided."""
    return float(needs("scipy.stats", "scipy").t.ppf(0.5 + level / 2, n - 1))


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean and t-interval of independent values, and whether they are other than 0.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to estimate from")
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Estimate(mean, None, None, None, n)
    error = statistics.stdev(values) / math.sqrt(n)
    half = quantile(n, level) * error
    if error == 0:  # all alike: certain, as far as these values can tell
        return Estimate(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    p = 2 * float(needs("scipy.stats", "scipy").t.sf(abs(mean) / error, n - 1))
    return Estimate(mean, mean - half, mean + half, p, n)


def prediction(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Where one more run lies, in 95 of 100 cases; None: fewer than two values.

    Not the interval of the mean, which is narrower: a single run also has its own spread.
    """
    n = len(values)
    if n < 2:
        return None
    half = quantile(n, level) * statistics.stdev(values) * math.sqrt(1 + 1 / n)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def detectable(samples: Sequence[Sequence[float]], power: float = 0.8) -> float | None:
    """The difference that a single test at 95 % finds in so many of 100 cases; None: no samples.

    Of the pooled deviation of samples of one size, each about its own mean: t at 97.5 % and at the
    power, times the standard error.
    """
    if not samples:
        return None
    n = len(samples[0])
    pooled = math.sqrt(statistics.fmean(statistics.variance(values) for values in samples))
    return (quantile(n) + quantile(n, 2 * power - 1)) * pooled / math.sqrt(n)


def contrast(values: Mapping[str, BySeed], signs: Mapping[str, int]) -> BySeed:
    """By seed, the mean over arms of sign + minus the mean over arms of sign -.

    Args:
        values: arm to seed to outcome.
        signs: arm to +1 or -1, as many of each.

    Returns:
        of the seeds that all arms have.
    """
    seeds = set.intersection(*(set(values.get(arm, {})) for arm in signs))
    half = len(signs) / 2
    return {
        seed: sum(sign * values[arm][seed] for arm, sign in signs.items()) / half
        for seed in sorted(seeds)
    }


def contrast_signs(
    levels: Mapping[str, Mapping[str, str]], factors: Sequence[str]
) -> dict[str, int]:
    """The signs of a main effect (one factor) or an interaction (several) of a factorial on/off.

    An interaction of two is half the difference of one's effect with the other on and off.
    """
    return {
        arm: math.prod(1 if own[factor] == "on" else -1 for factor in factors)
        for arm, own in levels.items()
    }


def differences(one: BySeed, other: BySeed) -> BySeed:
    """By seed, for the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values of a family of tests (Holm 1979); None stays, and does not count.

    At most alpha of the families that are all null have one below alpha.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted


def corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `p_holm` over those of the same `family`."""
    for family in dict.fromkeys(row["family"] for row in rows):
        members = [row for row in rows if row["family"] == family]
        for row, p in zip(members, holm([row["p"] for row in members]), strict=True):
            row["p_holm"] = p
    return rows
