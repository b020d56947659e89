"""Judges of what a model makes: a classifier of digits, a tone detector, a checker of sentences.

N images, M other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.digits.images import LEVELS, Digits, import_sklearn, load_digits
from data_pipelines.digits.sentences import is_number_word, is_sentence, is_true_sentence
from data_pipelines.digits.tones import detect_digit

__all__ = [
    "ImageJudge",
    "detect_digit",
    "is_number_word",
    "is_sentence",
    "is_true_sentence",
    "nearest_neighbour_distance",
    "within_class_distance",
]


class ImageJudge:
    """A support vector classifier fitted on the real, unwarped training digits.

    accuracy: its own, on the real test digits.

    Raises:
        DataError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        digits = load_digits()
        train, test = digits["train"], digits["test"]
        self._classifier: Any = import_sklearn("svm").SVC(kernel="rbf", C=10, gamma=1e-3)
        self._classifier.fit(_flat(train.images_N), train.labels_N)
        self.accuracy = self.score(test)

    def __call__(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """The digits (N,) of uint8 images (N, 8, 8)."""
        return np.asarray(self._classifier.predict(_flat(np.asarray(images))))

    def score(self, digits: Digits) -> float:
        """Which share of images it reads as their label."""
        return float((self(digits.images_N) == digits.labels_N).mean())


def within_class_distance(images: Sequence[np.ndarray] | np.ndarray, labels_N: np.ndarray) -> float:
    """The mean distance between two images of the same digit, over digits: how varied images are.

    Distances are Euclidean, in the 16 levels of the original images.
    """
    flat, means = _flat(np.asarray(images)), []
    for digit in np.unique(labels_N):
        mine = flat[np.asarray(labels_N) == digit]
        if len(mine) > 1:
            means.append(_distances(mine, mine).sum() / (len(mine) * (len(mine) - 1)))
    return float(np.mean(means))


def nearest_neighbour_distance(
    images: Sequence[np.ndarray] | np.ndarray, others: Sequence[np.ndarray] | np.ndarray
) -> np.ndarray:
    """The distance (N,) of each image to the nearest of `others`, in the same unit: 0 is a copy."""
    return np.asarray(_distances(_flat(np.asarray(images)), _flat(np.asarray(others))).min(1))


def _flat(images_N: np.ndarray) -> np.ndarray:
    return images_N.reshape(len(images_N), -1).astype(np.float64) * (LEVELS / 255)


def _distances(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    squares = (a_ND**2).sum(1)[:, None] + (b_MD**2).sum(1) - 2 * a_ND @ b_MD.T
    return np.asarray(np.sqrt(np.maximum(squares, 0)))
