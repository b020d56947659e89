"""What a codec loses: pictures and sounds encoded and decoded again, held against themselves.

T frames, F frequencies.
"""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.prepare.pair_codecs import decoded
from data_pipelines.raw.samples import Sample
from data_pipelines.tokens.modalities import Modalities

FOLDER = "reconstruction"
SHOWN = 8
"""Pictures in the file to judge by."""
SMALL = 64
"""Pictures of fewer pixels on a side are shown enlarged."""
SECONDS = 60.0
"""Of sound that is judged at most: some codecs decode slowly."""
WINDOW_SECONDS, HOP_SECONDS = 0.032, 0.008
FLOOR_DB = -70.0
"""Below full scale: what is fainter is not heard."""
BANDS = 40
"""On the mel scale, which is how finely people hear; single frequencies of a noise differ each time."""


@dataclass(frozen=True)
class Reconstruction:
    """How well a codec gives its samples back.

    figure: pictures: peak signal-to-noise ratio in dB, higher is better; sounds: distance of mel spectra in dB, lower
        is better.
    files: an example to judge by, relative to the output folder.
    """

    modality: str
    samples: int
    figure: float
    files: tuple[str, ...]

    def describe(self) -> str:
        """One line for people."""
        if self.modality == "image":
            said = f"PSNR {self.figure:.1f} dB over {self.samples} picture(s), higher is better"
        else:
            said = f"mel-spectral distance {self.figure:.1f} dB over {self.samples} sound(s), lower is better"
        return f"{self.modality} after the codec: {said}; judge by {' and '.join(self.files)}"


def write_reconstruction(
    out: Path, modalities: Modalities, name: str, samples: list[Sample]
) -> Reconstruction:
    """Encode and decode some samples, and write one of them, or a few, into `out`/reconstruction."""
    codec: Any = modalities.codec(name)
    (out / FOLDER).mkdir(exist_ok=True)
    originals: list[np.ndarray] = []
    for sample in samples:
        originals.append(decoded(codec, name, sample))
        if name == "audio" and sum(map(len, originals)) > SECONDS * codec.sample_rate:
            break
    again = codec.decode(codec.encode(originals))
    pairs = list(zip(originals, again, strict=True))
    if name == "image":
        path = f"{FOLDER}/pictures.png"
        _write_pictures(out / path, pairs[:SHOWN])
        return Reconstruction(name, len(pairs), psnr(pairs), (path,))
    paths = (f"{FOLDER}/sound-original.wav", f"{FOLDER}/sound-reconstructed.wav")
    for path, sound in zip(paths, pairs[0], strict=True):
        _write_sound(out / path, sound, codec.sample_rate)
    distance = float(np.mean([mel_distance(*pair, codec.sample_rate) for pair in pairs]))
    return Reconstruction(name, len(pairs), distance, paths)


def psnr(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of uint8 pictures, in dB, by the mean of their squared errors; infinite for equal ones."""
    errors = [np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2) for a, b in pairs]
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(255**2 / np.mean(errors)))


def mel_distance(sound: np.ndarray, other: np.ndarray, rate: int) -> float:
    """Root mean square over mel bands of the difference in dB, averaged over frames; of the common length."""
    length = min(len(sound), len(other))
    a_TF, b_TF = (_decibels(one[:length], rate) for one in (sound, other))
    return float(np.sqrt(((a_TF - b_TF) ** 2).mean(1)).mean())


def _decibels(sound: np.ndarray, rate: int) -> np.ndarray:
    """(T, bands), not below FLOOR_DB; 0 is a sine of full scale in a band of its own."""
    window, hop = max(2, round(rate * WINDOW_SECONDS)), max(1, round(rate * HOP_SECONDS))
    filled = np.pad(sound.astype(np.float64), (0, max(0, window - len(sound))))
    cut = np.lib.stride_tricks.sliding_window_view(filled, window)[::hop]
    shape = np.hanning(window + 1)[:-1]
    magnitude_TF = np.abs(np.fft.rfft(cut * shape, axis=1)) * 2 / shape.sum()
    power_TB = np.add.reduceat(magnitude_TF**2, _band_edges(rate, magnitude_TF.shape[1]), axis=1)
    return np.maximum(10 * np.log10(np.maximum(power_TB, 1e-20)), FLOOR_DB)


def _band_edges(rate: int, frequencies: int) -> np.ndarray:
    """The first frequency's place of each band; low bands are one place wide."""
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, highest, BANDS + 1)[:-1] / 2595) - 1)
    return np.unique((hertz / (rate / 2) * frequencies).astype(np.int64))


def _write_pictures(path: Path, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Originals above, what is left of them below."""
    from PIL import Image

    scale = max(1, SMALL // max(pairs[0][0].shape[:2]))
    rows = [np.concatenate([pair[side] for pair in pairs], axis=1) for side in (0, 1)]
    sheet = np.concatenate(rows, axis=0).repeat(scale, 0).repeat(scale, 1)
    Image.fromarray(sheet).save(path)


def _write_sound(path: Path, sound: np.ndarray, rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
