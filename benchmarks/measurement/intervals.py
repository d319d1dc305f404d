"""What several runs say together: paired differences with their confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student


def paired_difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of one − other, pair by pair, and half the width of its 95 % confidence interval (Student's t)."""
    apart = [a - b for a, b in zip(one, other, strict=True)]
    if len(apart) < 2:
        return statistics.mean(apart), math.nan
    half = float(student.ppf(0.975, len(apart) - 1)) * statistics.stdev(apart) / math.sqrt(len(apart))
    return statistics.mean(apart), half
