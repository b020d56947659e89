"""The sounds: dual tones of telephone keys (ITU-T Q.23) with noise, 8 kHz. N clips."""

from __future__ import annotations

import numpy as np

SAMPLE_RATE = 8000
CLIP = 1656
"""Samples: eight frames of 256 every 200."""
ROWS = (697.0, 770.0, 852.0, 941.0)
COLUMNS = (1209.0, 1336.0, 1477.0, 1633.0)
KEYS = ("123A", "456B", "789C", "*0#D")
BLOCK = 200
"""Samples of a detector's block: 25 ms."""
NO_DIGIT = -1


def make_tones(digits_N: np.ndarray, seed: int) -> np.ndarray:
    """A clip for each digit, (N, CLIP) float32.

    By chance: length (100 to 207 ms), onset, both frequencies (1.5 %), level (12 dB), difference of the two tones
    (2 dB either way), phases, and noise 8 to 25 dB below.
    """
    random = np.random.default_rng(seed)
    count = len(digits_N)
    place = np.asarray([_key_of(digit) for digit in range(10)])[digits_N]
    frequency = np.stack([np.asarray(ROWS)[place[:, 0]], np.asarray(COLUMNS)[place[:, 1]]])
    frequency = frequency * (1 + random.uniform(-0.015, 0.015, (2, count)))
    level = 0.45 * 10 ** (random.uniform(-12, 0, count) / 20)
    twist = 10 ** (random.uniform(-2, 2, count) / 40)
    amplitude = level * np.stack([twist, 1 / twist])
    length = random.integers(SAMPLE_RATE // 10, CLIP + 1, count)
    onset = np.floor(random.uniform(0, 1, count) * (CLIP - length + 1)).astype(np.int64)
    time = np.arange(CLIP)
    sounding = (time >= onset[:, None]) & (time < (onset + length)[:, None])
    phase = random.uniform(0, 2 * np.pi, (2, count))
    waves = amplitude[..., None] * np.sin(
        2 * np.pi * frequency[..., None] * time / SAMPLE_RATE + phase[..., None]
    )
    power = (amplitude**2).sum(0) / 2
    noise = np.sqrt(power / 10 ** (random.uniform(8, 25, count) / 10))
    clips = waves.sum(0) * sounding + noise[:, None] * random.normal(size=(count, CLIP))
    return np.clip(clips, -1, 1).astype(np.float32)


def detect_digit(sound: np.ndarray) -> int:
    """The digit of a clip by Goertzel's filters, or NO_DIGIT for a key that has none.

    In blocks of 25 ms, the powers at the eight frequencies are summed over the clip; the strongest row and column
    win. What Goertzel's recursion gives is the power of the block's Fourier sum at a frequency, taken here directly.

    Args:
        sound: (samples,) at SAMPLE_RATE, at least one block.
    """
    blocks = sound[: len(sound) // BLOCK * BLOCK].reshape(-1, BLOCK).astype(np.float64)
    angle = 2 * np.pi * np.arange(BLOCK)[:, None] * np.asarray([*ROWS, *COLUMNS]) / SAMPLE_RATE
    power = ((blocks @ np.cos(angle)) ** 2 + (blocks @ np.sin(angle)) ** 2).sum(0)
    key = KEYS[int(power[:4].argmax())][int(power[4:].argmax())]
    return int(key) if key.isdigit() else NO_DIGIT


def _key_of(digit: int) -> tuple[int, int]:
    row = next(number for number, keys in enumerate(KEYS) if str(digit) in keys)
    return row, KEYS[row].index(str(digit))
