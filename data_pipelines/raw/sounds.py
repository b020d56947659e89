"""One reader of sounds: for datasets of pairs, and for sounds that a run is asked about.

Plain WAV files of 16 bits need no other package; everything else is read by soundfile and resampled by soxr.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.raw.sound_files import damage, plain_wav

LEAST_SECONDS = 0.01
RATES = (1000, 768_000)
LOUDEST = 8.0
"""Full scale is 1; MP3s reach a little more. Far above, somebody wrote whole numbers as floats."""
BLOCK = 1 << 20
"""Samples that are read at a time, so that a header's promise takes no memory."""

FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
"""Those of which it is known what they promise; libsndfile takes half of an AIFF or a Wave64 for a whole one."""
UNKNOWN_FRAMES = 2**62
"""What libsndfile says of a FLAC file that does not say how long it is."""

Note = Callable[[str], None]


def sound_rate(data: bytes, where: str) -> int:
    """Samples per second of a sound that is not decoded. Raises DataError, naming the file."""
    plain = plain_wav(data)
    if plain is not None:
        return plain[0]
    return int(_with_soundfile(data, where, lambda file: file.samplerate))


def read_sound(
    data: bytes, where: str, sample_rate: int | None = None, note: Note | None = None
) -> tuple[np.ndarray, int]:
    """(float32 samples of one channel, samples per second), resampled to `sample_rate` if that is given.

    Channels are averaged.

    Args:
        where: names the file in errors.
        note: is told what was done besides decoding.

    Raises:
        DataError: it is not whole, cannot be decoded, is too short, holds what is no number, or the audio packages are
            not installed.
    """
    tell = note or (lambda what: None)
    broken = damage(data)
    if broken:
        raise DataError(f"{where}: a sound that is not whole: {broken}. Copy or make it anew, or remove it.")
    plain = plain_wav(data)
    if plain is not None:
        rate, channels, body = plain
        samples = (np.frombuffer(body, "<i2") / 32768).astype(np.float32).reshape(-1, channels)
    else:
        samples, rate = _with_soundfile(data, where, lambda file: _decoded(file, where))
    if samples.shape[1] > 1:
        tell("of several channels, averaged")
    with np.errstate(all="ignore"):
        mono = samples.mean(1, dtype=np.float64).astype(np.float32)
    _check_values(mono, rate, where)
    if sample_rate is None or sample_rate == rate:
        return mono, rate
    tell(f"resampled to {sample_rate:,} Hz")
    return _resampled(mono, rate, sample_rate, where), sample_rate


def _check_values(mono: np.ndarray, rate: int, where: str) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError(
            f"{where}: {rate:,} samples a second; {RATES[0]:,} to {RATES[1]:,} are read. Resample it."
        )
    if len(mono) < max(1, LEAST_SECONDS * rate):
        raise DataError(
            f"{where}: a sound of {len(mono)} samples at {rate:,} Hz is too short; it must have {LEAST_SECONDS:g} s or "
            "more. Remove it."
        )
    wrong = len(mono) - int(np.isfinite(mono).sum())
    if wrong:
        raise DataError(
            f"{where}: {wrong:,} of its samples are NaN or infinite. Make the sound anew, or remove it."
        )
    peak = float(np.abs(mono).max())
    if peak > LOUDEST:
        raise DataError(
            f"{where}: samples up to {peak:g}, where full scale is 1. Divide them, or store whole numbers."
        )


def _resampled(mono: np.ndarray, rate: int, wanted: int, where: str) -> np.ndarray:
    try:
        import soxr
    except ImportError as error:
        raise _not_installed(error, where) from None
    try:
        return soxr.resample(mono, rate, wanted).astype(np.float32)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{where}: cannot be resampled from {rate:,} to {wanted:,} Hz ({error}).") from None


def _with_soundfile(data: bytes, where: str, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of the opened sound."""
    try:
        import soundfile
    except ImportError as error:
        raise _not_installed(error, where) from None
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return read(file)
    except DataError:
        raise
    except soundfile.LibsndfileError as error:
        told = error.error_string.strip(" .") or "damaged"
        raise DataError(
            f"{where}: a sound that cannot be decoded ({told}). Give a whole WAV, FLAC, Ogg or MP3, or remove it."
        ) from None
    except Exception as error:  # soundfile raises RuntimeError, TypeError and others for damaged files
        raise DataError(
            f"{where}: a sound that cannot be decoded ({type(error).__name__}). Make it anew, or remove it."
        ) from None


def _decoded(file: Any, where: str) -> tuple[np.ndarray, int]:
    """(samples, channels) float32 and the rate. Raises DataError where the file holds fewer than it promises."""
    if file.format not in FORMATS:
        raise DataError(f"{where}: a sound in the form of {file.format}; give WAV, FLAC, Ogg or MP3.")
    blocks, count = [], 0
    size = max(1, BLOCK // max(1, file.channels))
    while True:
        block = file.read(min(size, max(1, file.frames)), dtype="float32", always_2d=True)
        if not len(block):
            break
        blocks.append(block)
        count += len(block)
    if count != file.frames < UNKNOWN_FRAMES:
        raise DataError(
            f"{where}: a sound that is not whole: its header promises {file.frames:,} samples, the file holds "
            f"{count:,}. Copy or make it anew, or remove it."
        )
    samples = np.concatenate(blocks) if blocks else np.zeros((0, file.channels), np.float32)
    return samples, int(file.samplerate)


def _not_installed(error: ImportError, where: str) -> DataError:
    return DataError(
        f"{where}: reading it needs soundfile and soxr ({error}): pip install 'triptych[audio]', or convert it with "
        "`ffmpeg -i FILE -ac 1 -ar RATE -c:a pcm_s16le OUT.wav`."
    )
