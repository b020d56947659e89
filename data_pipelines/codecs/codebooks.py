"""Several codebooks in one line of tokens: frame by frame (time-major), with an optional delay pattern.

Frame t of level l becomes token t K + l, and its id l x size + code: every level has its own ids. With the delay
pattern (Copet et al. 2023, MusicGen) level l stands l frames later, so that what refines a frame follows what it
refines. The places before its first and after its last frame hold the level's fill code, one more than the codebook
has; a vocabulary with delay therefore counts codebook_size + 1 ids per level.

K codebooks, T frames.
"""

from __future__ import annotations

import numpy as np

from data_pipelines.errors import DataError


def level_size(codebook_size: int, delay: bool) -> int:
    """Ids of one level: its codes and, with delay, the fill."""
    return codebook_size + int(delay)


def fill_mask(frames: int, codebooks: int) -> np.ndarray:
    """(T + K - 1, K) bool: the places of a delayed pattern of `frames` = T frames that hold the fill code."""
    place = np.arange(frames + codebooks - 1)[:, None] - np.arange(codebooks)
    return (place < 0) | (place >= frames)


def flatten(codes_KT: np.ndarray, codebook_size: int, delay: bool) -> np.ndarray:
    """One line of codes, int64: (T K,), or ((T + K - 1) K,) with delay.

    Raises:
        DataError: a code is outside of its codebook.
    """
    codes_KT = np.atleast_2d(codes_KT).astype(np.int64)
    count, frames = codes_KT.shape
    if codes_KT.size and (codes_KT.min() < 0 or codes_KT.max() >= codebook_size):
        wrong = codes_KT[(codes_KT < 0) | (codes_KT >= codebook_size)][0]
        raise DataError(
            f"code {wrong} is outside of 0 to {codebook_size - 1}; encode it with this dataset's codec."
        )
    pattern_TK = codes_KT.T
    if delay and frames:
        pattern_TK = np.full((frames + count - 1, count), codebook_size)
        for level in range(count):
            pattern_TK[level : level + frames, level] = codes_KT[level]
    return (pattern_TK + level_size(codebook_size, delay) * np.arange(count)).reshape(-1)


def unflatten(line: np.ndarray, codebooks: int, codebook_size: int, delay: bool) -> np.ndarray:
    """The opposite of `flatten`: (K, T) int64. What stands in places of the fill code is not looked at.

    Raises:
        DataError: not whole frames, fewer frames than the delay takes, or a code of another level or the fill code
            where a frame belongs.
    """
    line = np.asarray(line, np.int64)
    if len(line) % codebooks:
        raise DataError(f"{len(line)} audio tokens are no whole frames of {codebooks} codebooks.")
    pattern_TK = line.reshape(-1, codebooks) - level_size(codebook_size, delay) * np.arange(codebooks)
    frames = len(pattern_TK)
    if delay:
        frames = max(0, frames - codebooks + 1)
        if frames == 0 and len(line):
            raise DataError(f"{len(line)} audio tokens are too few for the delay of {codebooks} codebooks.")
    codes_KT = np.stack([pattern_TK[level * delay :, level][:frames] for level in range(codebooks)])
    wrong = np.argwhere((codes_KT < 0) | (codes_KT >= codebook_size))
    if len(wrong):
        level, frame = wrong[0].tolist()
        raise DataError(
            f"frame {frame}, codebook {level}: {int(codes_KT[level, frame])} is outside of 0 to {codebook_size - 1}."
        )
    return codes_KT
