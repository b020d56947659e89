"""Permutations that depend on a key alone.

They sort splitmix64 hashes, which are the same on every platform and in every version of numpy (numpy's generators
promise that only within limits).
"""

from __future__ import annotations

import hashlib

import numpy as np


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), a bijection of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(count: int, *key: object) -> np.ndarray:
    """A permutation of range(count), int64, that depends on `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    first, second = np.frombuffer(digest, "<u8")
    hashes = splitmix64(splitmix64(np.arange(count, dtype=np.uint64) ^ first) ^ second)
    return np.argsort(hashes, kind="stable")
