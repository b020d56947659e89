"""k-means, the same for a seed on any number of threads: every sum is taken in a fixed order, without BLAS.

N points, K centroids, D dimensions.
"""

from __future__ import annotations

import hashlib

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.permutation import permutation, splitmix64


class TooFewError(DataError):
    """Fewer different points than centroids."""


CHUNK = 32_768
"""Distances that are held at a time: they stay in a core's cache."""


def nearest(points_ND: np.ndarray, centroids_KD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each point, (N,) int64, and the squared distance to it, (N,) float64."""
    number_N = np.empty(len(points_ND), np.int64)
    distance_N = np.empty(len(points_ND))
    step = max(1, CHUNK // len(centroids_KD))
    for start in range(0, len(points_ND), step):
        distance_NK = _distances(points_ND[start : start + step], centroids_KD)
        number = distance_NK.argmin(1)
        number_N[start : start + step] = number
        distance_N[start : start + step] = distance_NK[np.arange(len(number)), number]
    return number_N, distance_N


def _distances(points_ND: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """Squared distances (N, K), summed over dimensions one after the other."""
    total_NK = np.zeros((len(points_ND), len(centroids_KD)))
    part_NK = np.empty_like(total_NK)
    for point_N, centroid_K in zip(points_ND.T, centroids_KD.T, strict=True):
        np.subtract(point_N[:, None], centroid_K, out=part_NK)
        part_NK *= part_NK
        total_NK += part_NK
    return total_NK


def kmeans(
    points_ND: np.ndarray, count: int, seed: int, what: str, rounds: int = 20, most: int = 20_000
) -> np.ndarray:
    """Centroids (K, D), float32: Lloyd's rounds after k-means++ (Arthur, Vassilvitskii 2007).

    Args:
        count: K.
        what: names the points in the error.
        most: points that are used; more are thinned out.

    Raises:
        TooFewError: fewer than K different points.
    """
    chosen = np.sort(permutation(len(points_ND), "k-means", seed)[:most])
    points_ND = np.asarray(points_ND, np.float64)[chosen]
    if not np.isfinite(points_ND).all():
        raise DataError(f"{what}: some are NaN or infinite.")
    different = len(np.unique(points_ND, axis=0))
    if different < count:
        raise TooFewError(
            f"{what}: only {different} different ones in {len(points_ND)}, too few for a codebook of {count}. "
            f"Use at most {different} codes, or give more data."
        )
    centroids_KD = _spread(points_ND, count, seed)
    for _ in range(rounds):
        number_N, distance_N = nearest(points_ND, centroids_KD)
        size_K = np.bincount(number_N, minlength=count)
        columns = [np.bincount(number_N, column_N, count) for column_N in points_ND.T]
        moved_KD = np.stack(columns, 1) / np.maximum(size_K, 1)[:, None]
        empty = np.flatnonzero(size_K == 0)
        # A centroid that has lost all points goes where the points are farthest from theirs.
        moved_KD[empty] = points_ND[np.argsort(-distance_N, kind="stable")[: len(empty)]]
        if np.array_equal(moved_KD, centroids_KD):
            break
        centroids_KD = moved_KD
    return centroids_KD.astype(np.float32)


def _spread(points_ND: np.ndarray, count: int, seed: int) -> np.ndarray:
    """First centroids: each is a point drawn in proportion to its squared distance from those before."""
    digest = hashlib.blake2b(f"k-means++/{seed}".encode(), digest_size=8).digest()
    hashes_K = splitmix64(np.arange(count, dtype=np.uint64) ^ np.frombuffer(digest, "<u8")[0])
    uniform_K = (hashes_K >> np.uint64(11)).astype(np.float64) / 2**53
    chosen = [int(uniform_K[0] * len(points_ND))]
    distance_N = _distances(points_ND, points_ND[chosen])[:, 0]
    for uniform in uniform_K[1:].tolist():
        cumulative_N = np.cumsum(distance_N)
        chosen.append(int(np.searchsorted(cumulative_N, uniform * cumulative_N[-1], side="right")))
        distance_N = np.minimum(distance_N, _distances(points_ND, points_ND[chosen[-1:]])[:, 0])
    return points_ND[chosen]
