"""Sounds as frames of a log-magnitude spectrum, each the sum of the nearest centroids of K codebooks.

Decoding takes the phases from Griffin-Lim (Griffin, Lim 1984). T frames, F frequencies of the band, K codebooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.codecs.base import fingerprint, read_codec, write_codec
from data_pipelines.codecs.kmeans import kmeans, nearest
from data_pipelines.errors import DataError

FLOOR = 1e-3
"""Added to magnitudes before the logarithm: what is fainter does not count."""
TRAINED_CLIPS = 4096


@dataclass(frozen=True)
class Frames:
    """How a sound is cut into frames. Samples and hertz."""

    sample_rate: int = 8000
    window: int = 256
    hop: int = 200
    low_hz: float = 0.0
    high_hz: float = 4000.0

    def __post_init__(self) -> None:
        if not 1 <= self.hop <= self.window or self.window > self.sample_rate:
            raise DataError(
                f"frames of {self.window} samples every {self.hop} at {self.sample_rate} Hz: the step must be 1 to "
                "the window, and the window at most a second."
            )
        if not 0 <= self.low_hz < self.high_hz <= self.sample_rate / 2:
            raise DataError(
                f"a band of {self.low_hz} to {self.high_hz} Hz: it must lie within 0 to {self.sample_rate / 2}."
            )

    @property
    def band(self) -> slice:
        """The places of the band's frequencies in a spectrum."""
        width = self.sample_rate / self.window
        return slice(int(np.ceil(self.low_hz / width)), int(np.floor(self.high_hz / width)) + 1)

    def count(self, samples: int) -> int:
        """Frames of a sound: all of it, the last one filled with silence."""
        return 1 + max(0, -(-(samples - self.window) // self.hop))

    def length(self, count: int) -> int:
        """Samples of `count` frames."""
        return self.window + (count - 1) * self.hop


class SpectralCodec:
    """(Residual) k-means on log-magnitude spectra.

    Args:
        centroids: (K, codebook_size, F) float32; level k is the residual of the levels before.
        iterations: of Griffin-Lim.
    """

    modality = "audio"

    def __init__(self, frames: Frames, centroids: np.ndarray, iterations: int = 12) -> None:
        self.frames, self.centroids, self.iterations = frames, centroids, iterations
        self.codebooks, self.codebook_size = centroids.shape[:2]
        self.sample_rate = frames.sample_rate
        self.grid: tuple[int, int] | None = None

    @classmethod
    def train(
        cls, sounds: Sequence[np.ndarray], codes: int, frames: Frames, codebooks: int = 1, seed: int = 0
    ) -> SpectralCodec:
        """Learn the codebooks.

        Raises:
            DataError: no sounds, or too few different frames.
        """
        if not sounds:
            raise DataError("no sounds to train a spectral codec on.")
        step = max(1, len(sounds) // TRAINED_CLIPS)
        left = np.concatenate([log_magnitudes(sound, frames) for sound in sounds[::step]])
        levels = []
        for level in range(codebooks):
            what = f"audio frames of {frames.window} samples" + (f", level {level}" if level else "")
            levels.append(kmeans(left, codes, seed + level, what))
            number, _ = nearest(left, levels[-1].astype(np.float64))
            left = left - levels[-1][number]
        return cls(frames, np.stack(levels))

    @classmethod
    def load(cls, folder: Path) -> SpectralCodec:
        """Raises DataError for missing or damaged files."""
        config, weights = read_codec(folder)
        return cls(Frames(**config["frames"]), weights["centroids"], config["iterations"])

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._config(), {"centroids": self.centroids})

    def encode(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each sound (T,) int64, or (K, T) from several codebooks.

        Raises:
            DataError: a sound that is not float32 with one channel, or is empty.
        """
        for number, sound in enumerate(samples):
            if sound.ndim != 1 or sound.dtype != np.float32 or not len(sound):
                raise DataError(
                    f"sound {number} is {sound.dtype} {sound.shape}; this codec takes float32 (samples,)."
                )
        spectra = [log_magnitudes(sound, self.frames) for sound in samples]
        if not spectra:
            return []
        left = np.concatenate(spectra)
        levels = []
        for centroids in self.centroids:
            codes_N, _ = nearest(left, centroids.astype(np.float64))
            left = left - centroids[codes_N]
            levels.append(codes_N)
        cuts = np.cumsum([len(spectrum) for spectrum in spectra])[:-1]
        return [
            codes if self.codebooks > 1 else codes[0] for codes in np.split(np.stack(levels), cuts, axis=1)
        ]

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Sounds of window + (T - 1) hop samples, float32 in [-1, 1].

        Raises:
            DataError: codes of another shape or outside of the codebook.
        """
        return [self._sound(np.atleast_2d(np.asarray(one))) for one in codes]

    def describe(self) -> str:
        rate = self.frames.sample_rate / self.frames.hop
        books = f"{self.codebooks} x " if self.codebooks > 1 else ""
        return f"spectral frames ({books}{self.codebook_size:,} codes, {rate:g} a second, {self.sample_rate:,} Hz)"

    def save(self, folder: Path) -> None:
        write_codec(folder, self._config(), {"centroids": self.centroids})

    def _config(self) -> dict[str, Any]:
        return {"kind": "spectral", "frames": asdict(self.frames), "iterations": self.iterations}

    def _sound(self, codes_KT: np.ndarray) -> np.ndarray:
        good = codes_KT.shape[0] == self.codebooks and codes_KT.shape[1] > 0
        if not good or codes_KT.min() < 0 or codes_KT.max() >= self.codebook_size:
            raise DataError(
                f"audio codes of shape {codes_KT.shape}: {self.codebooks} codebooks with codes below "
                f"{self.codebook_size} make a sound."
            )
        spectrum_TF = np.zeros((codes_KT.shape[1], self.centroids.shape[2]))
        for level, codes in zip(self.centroids, codes_KT, strict=True):
            spectrum_TF += level[codes]
        magnitudes = np.zeros((codes_KT.shape[1], self.frames.window // 2 + 1))
        magnitudes[:, self.frames.band] = np.maximum(np.exp(spectrum_TF) - FLOOR, 0)
        sound = _griffin_lim(magnitudes, self.frames, self.iterations)
        return np.clip(sound, -1, 1).astype(np.float32)


def _hann(frames: Frames) -> np.ndarray:
    return np.hanning(frames.window + 1)[:-1]


def _spectra(sound: np.ndarray, frames: Frames) -> np.ndarray:
    """Complex spectra of all frames, (T, window / 2 + 1), scaled so that a sine of amplitude a peaks at a / 2."""
    count, window = frames.count(len(sound)), _hann(frames)
    filled = np.zeros(frames.length(count))
    filled[: len(sound)] = sound
    cut = np.stack([filled[i * frames.hop : i * frames.hop + frames.window] for i in range(count)])
    return np.fft.rfft(cut * window, axis=1) / window.sum()


def log_magnitudes(sound: np.ndarray, frames: Frames) -> np.ndarray:
    """(T, F) float64."""
    return np.log(np.abs(_spectra(sound.astype(np.float64), frames))[:, frames.band] + FLOOR)


def _overlap_add(spectra: np.ndarray, frames: Frames) -> np.ndarray:
    """The sound whose frames are nearest to `spectra` (least squares)."""
    window = _hann(frames)
    pieces = np.fft.irfft(spectra * window.sum(), frames.window, axis=1)
    sound, weight = np.zeros(frames.length(len(spectra))), np.zeros(frames.length(len(spectra)))
    for number, piece in enumerate(pieces):
        place = slice(number * frames.hop, number * frames.hop + frames.window)
        sound[place] += piece * window
        weight[place] += window**2
    return sound / np.maximum(weight, 1e-2)  # at the ends the window is nearly 0


def _griffin_lim(magnitudes: np.ndarray, frames: Frames, iterations: int) -> np.ndarray:
    """A sound with these magnitudes, its phases found by turns in time and in frequency."""
    # The same first phases every time: decoding is a function of the codes.
    angles = np.random.default_rng(0).uniform(-np.pi, np.pi, magnitudes.shape)
    spectra = magnitudes * np.exp(1j * angles)
    for _ in range(iterations):
        again = _spectra(_overlap_add(spectra, frames), frames)
        spectra = magnitudes * np.exp(1j * np.angle(again))
    return _overlap_add(spectra, frames)
