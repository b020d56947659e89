"""The handwritten digits that ship inside scikit-learn: 1,797 images of 8 x 8, split, and warped for training.

N images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.permutation import permutation

SIDE = 8
LEVELS = 16
"""The images count from 0 to 16."""
TEST, VALIDATION = 360, 180
FINER = 4
"""Points a side that a pixel of a warped image is averaged over."""


@dataclass(frozen=True)
class Digits:
    """images_N: (N, 8, 8) uint8, 0 to 255. labels_N: 0 to 9."""

    images_N: np.ndarray
    labels_N: np.ndarray


@dataclass(frozen=True)
class Warp:
    """The largest turn (degrees), change of size (a share), and shift (pixels); each is drawn evenly up to it.

    noise: standard deviation of what is added to each pixel that has ink, in levels. It makes neighbouring codes of a
        tokenizer stand for each other, which else share nothing.
    """

    turn: float
    scale: float
    shift: float
    noise: float = 0.0


WEAK = Warp(7, 0.06, 0.2)
"""For images that are to be made: they must look like digits."""
MODERATE = Warp(10, 0.10, 0.4, noise=1.0)
"""For images that are to be read."""


def import_sklearn(name: str) -> Any:
    """A module of scikit-learn. Raises DataError that names the extra where it is not installed."""
    import importlib

    try:
        return importlib.import_module(f"sklearn.{name}")
    except ImportError as error:
        raise DataError(
            f"the digits demo needs scikit-learn ({error}): pip install 'triptych[demo]'."
        ) from None


def load_digits() -> dict[str, Digits]:
    """train (1,257), validation (180) and test (360), with all digits in proportion; the same every time.

    Raises:
        DataError: scikit-learn is not installed.
    """
    found = import_sklearn("datasets").load_digits()
    images = np.rint(found.images * (255 / LEVELS)).astype(np.uint8)
    labels = found.target.astype(np.int64)
    # Each image stands at its share of its digit's images; cut there, every part has all digits in proportion.
    share = np.empty(len(labels))
    for digit in range(10):
        mine = np.flatnonzero(labels == digit)
        share[mine[permutation(len(mine), "digits", digit)]] = (np.arange(len(mine)) + 0.5) / len(mine)
    order = np.argsort(share, kind="stable")
    cuts = {
        "train": order[TEST + VALIDATION :],
        "validation": order[TEST : TEST + VALIDATION],
        "test": order[:TEST],
    }
    return {split: Digits(images[numbers], labels[numbers]) for split, numbers in cuts.items()}


def augment(digits: Digits, copies: int, warp: Warp, seed: int) -> Digits:
    """Each image `copies` times: once as it is, the others turned, scaled and shifted by chance."""
    random = np.random.default_rng(seed)
    images = [digits.images_N]
    for _ in range(copies - 1):
        images.append(_warped(digits.images_N, warp, random))
    return Digits(np.concatenate(images), np.tile(digits.labels_N, copies))


def _warped(images_N: np.ndarray, warp: Warp, random: np.random.Generator) -> np.ndarray:
    """Each pixel is the mean over FINER x FINER points, looked up where they come from; black outside."""
    count = len(images_N)
    turn = np.deg2rad(random.uniform(-warp.turn, warp.turn, count))
    scale = 1 + random.uniform(-warp.scale, warp.scale, count)
    shift = random.uniform(-warp.shift, warp.shift, (2, count))
    centre = SIDE / 2
    along = (np.arange(SIDE * FINER) + 0.5) / FINER - centre
    x, y = (part.reshape(-1) for part in np.meshgrid(along, along))
    cosine, sine = np.cos(turn) / scale, np.sin(turn) / scale
    from_x = cosine[:, None] * x + sine[:, None] * y + centre - shift[0][:, None]
    from_y = cosine[:, None] * y - sine[:, None] * x + centre - shift[1][:, None]
    column, row = np.floor(from_x).astype(np.int64), np.floor(from_y).astype(np.int64)
    inside = (column >= 0) & (column < SIDE) & (row >= 0) & (row < SIDE)
    looked_up = images_N[np.arange(count)[:, None], row.clip(0, SIDE - 1), column.clip(0, SIDE - 1)] * inside
    fine = looked_up.reshape(count, SIDE, FINER, SIDE, FINER).astype(np.float64)
    warped = fine.mean((2, 4))
    warped += random.normal(0, warp.noise * 255 / LEVELS, warped.shape) * (warped > 0)
    return np.rint(warped.clip(0, 255)).astype(np.uint8)
