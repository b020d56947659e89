"""Random numbers that are functions of counters: equal for any rank, batch size, worker and resume."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: splitmix64's step, and the rotation whose multiples are spread most evenly."""
SQRT2 = np.uint64(0x6A09E667F3BCC908)
"""2^64 (sqrt(2) - 1): a second rotation, in no simple relation to the first."""


def key(*names: object) -> np.uint64:
    """A 64-bit key of names and numbers."""
    text = "\0".join(str(name) for name in names)
    return np.uint64(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little"))


def hashed(start: np.uint64 | np.ndarray, *counters: np.ndarray) -> np.ndarray:
    """uint64 hashes of a key and counters, which are broadcast against each other.

    Each counter is mixed in by splitmix64 (Steele, Lea and Flood 2014).
    """
    state = np.asarray(start, np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = _mix(state + (np.asarray(counter).astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return state


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(bits: np.ndarray) -> np.ndarray:
    """Numbers in (0, 1), float64, from 64 random bits each."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def stratified(start: np.uint64 | np.ndarray, draw: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Numbers in (0, 1) that fill it evenly over any stretch of draws: a Kronecker sequence,
    u = shift + draw x golden ratio + document x sqrt(2), modulo 1, in 64-bit whole numbers.

    start: the shift, a random number of 64 bits, which makes each u uniform by itself.
    """
    with np.errstate(over="ignore"):
        turned = np.asarray(draw).astype(np.uint64) * GOLDEN + np.asarray(document).astype(np.uint64) * SQRT2
        return uniform(np.asarray(start, np.uint64) + turned)
