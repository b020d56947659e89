"""Which source a row comes from: exact shares, in closed form."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data_pipelines.errors import DataError

MAX_PATTERN = 65_536
ROUNDED_PATTERN = 10_000


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in proportion to `weights`.

    0.7, 0.2, 0.1 gives 7, 2, 1, and 1/3, 2/3 gives 1, 2. Weights whose common denominator would be above
    65,536 are rounded to shares of 1/10,000, at least one each.

    Raises:
        DataError: a weight is not a positive number.
    """
    if not weights or any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise DataError(f"mixing weights {list(weights)}: every weight must be a positive number.")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    if sum(whole) // math.gcd(*whole) > MAX_PATTERN:
        whole = _rounded([fraction / sum(exact) for fraction in exact])
    divisor = math.gcd(*whole)
    return tuple(number // divisor for number in whole)


def _rounded(shares: list[Fraction]) -> list[int]:
    """Integers close to `shares`: by small denominators if those differ by under 1e-9, else in 1/10,000."""
    near = [share.limit_denominator(1000) for share in shares]
    scale = math.lcm(*(share.denominator for share in near))
    # A share under 1/2000 may come near 0, but every source keeps some rows.
    usable = scale <= MAX_PATTERN and all(near)
    if usable and all(abs(a - b) < 1e-9 for a, b in zip(near, shares, strict=True)):
        return [int(share * scale) for share in near]
    return [max(1, round(share * ROUNDED_PATTERN)) for share in shares]


def mixing_pattern(weights: Sequence[int]) -> np.ndarray:
    """The repeating sequence of sources: of each sum(weights) rows, exactly weights[i] come from source i.

    The j-th row of source i may lie in slots [floor(jP/w), ceil((j+1)P/w)) of a pattern of P slots, and the
    earliest deadline goes first. Such a schedule always exists and this rule finds it (one processor, unit
    jobs), so after any number t of rows the count of source i differs from t w/P by less than one; taking
    the largest deficit each time does not promise that for three or more sources.
    """
    total = sum(weights)
    waiting = [(0, source, 0) for source in range(len(weights))]  # (first slot, source, its j-th row)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, j)
    pattern = np.empty(total, np.int64)
    for slot in range(total):
        while waiting and waiting[0][0] <= slot:
            _, source, j = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(j + 1) * total // weights[source]), source, j))
        deadline, source, j = heapq.heappop(ready)
        assert slot < deadline, "a source came too late in the mixing pattern"
        pattern[slot] = source
        if j + 1 < weights[source]:
            heapq.heappush(waiting, ((j + 1) * total // weights[source], source, j + 1))
    return pattern


class Mixture:
    """Row number -> (source, how many rows of that source came before)."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = integer_weights(weights)
        self._pattern = mixing_pattern(self.weights)
        self._earlier = np.empty_like(self._pattern)
        for source in range(len(self.weights)):
            here = self._pattern == source
            self._earlier[here] = np.arange(self.weights[source])

    def draws(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, k) of each row: the row is the k-th of its source, counted from 0. int64."""
        cycle, slot = np.divmod(rows, len(self._pattern))
        source = self._pattern[slot]
        return source, cycle * np.asarray(self.weights)[source] + self._earlier[slot]
