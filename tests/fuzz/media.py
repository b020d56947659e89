"""Fuzzers of pictures and sounds."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.raw.pictures import picture_facts, read_picture
from data_pipelines.raw.sounds import read_sound, sound_rate
from tests.fuzz.base import Fuzzer, chosen, mutated, refusals_name, require


def pictures(seed: int, folder: Path) -> None:
    """A damaged PNG gives its pixels or is refused, for it has checksums; other formats give pixels or are refused."""
    from PIL import Image

    random = np.random.default_rng(seed)
    mode, form = chosen(
        random,
        [
            *(("L", form) for form in ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")),
            *(("RGB", form) for form in ("PNG", "JPEG", "BMP", "WEBP", "TIFF")),
            *((mode, "PNG") for mode in ("1", "LA", "RGBA", "P", "I;16")),
            ("CMYK", "JPEG"),
        ],
    )
    channels = {"LA": 2, "RGB": 3, "P": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    shape = (12, 8) if channels == 1 else (12, 8, channels)
    pixels = random.integers(0, 256, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    picture = (
        Image.fromarray(pixels)
        if mode not in ("1", "P", "CMYK")
        else Image.fromarray(pixels[..., :3] if channels > 1 else pixels).convert(mode)
    )
    options: dict[str, Any] = {}
    orientation = int(random.integers(1, 9))
    if form in ("PNG", "JPEG", "WEBP") and random.random() < 0.5:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, form, **options)
    whole = file.getvalue()
    damaged = random.random() < 0.7
    data = mutated(whole, random) if damaged else whole
    colours = chosen(random, [1, 3])
    with refusals_name("a.png"):
        found = read_picture(data, "a.png", colours)
        facts = picture_facts(data, "a.png")
    require(
        found.dtype == np.uint8 and found.ndim == (2 if colours == 1 else 3), f"{found.dtype} {found.shape}"
    )
    require(found.shape[:2] == (facts.height, facts.width), f"{found.shape}, told {facts}")
    if not damaged:
        turned = "exif" in options and orientation >= 5
        require(
            found.shape[:2] == ((8, 12) if turned else (12, 8)), f"{found.shape} of orientation {orientation}"
        )
    if form == "PNG" and data[:4] == b"\x89PNG":
        require(
            np.array_equal(found, read_picture(whole, "a.png", colours)), "a damaged PNG gives other pixels"
        )


SOUNDS = (
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_U8"),
    ("FLAC", None),
    ("OGG", "VORBIS"),
    ("MP3", None),
)


@cache
def _sound(form: str, subtype: str | None, rate: int) -> bytes:
    import soundfile

    time = np.arange(rate // 4) / rate
    noise = np.random.default_rng(0).normal(0, 0.01, len(time))
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2000 * time) + noise, rate, format=form, subtype=subtype)
    return file.getvalue()


def sounds(seed: int, folder: Path) -> None:
    """A cut sound is refused; a damaged one keeps its length and rate or is refused, and where there are checksums, its
    samples."""
    random = np.random.default_rng(seed)
    (form, subtype), rate = chosen(random, list(SOUNDS)), chosen(random, [8000, 16_000])
    whole = _sound(form, subtype, rate)
    kind = int(random.integers(4))
    data = [whole, whole[: int(random.integers(len(whole)))], mutated(whole, random), mutated(whole, random)][
        kind
    ]
    with refusals_name("a.wav"):
        told = sound_rate(data, "a.wav")
        found, found_rate = read_sound(data, "a.wav")
        again, _ = read_sound(data, "a.wav", 12_000)
    wanted, _ = read_sound(whole, "b.wav")
    require(kind != 1 or data == whole, f"{len(data)} of {len(whole)} bytes were taken for a whole {form}")
    require(found.dtype == np.float32 and bool(np.isfinite(found).all()), f"{found.dtype}, or not finite")
    if form != "MP3":
        require(told == found_rate == rate, f"{found_rate} Hz, told {told}, was {rate}")
        require(len(found) == len(wanted), f"{len(found)} samples of {len(wanted)}")
    require(abs(len(again) - len(found) * 12_000 / found_rate) <= 1, f"resampled to {len(again)}")
    if form in ("FLAC", "OGG"):
        require(np.array_equal(found, wanted), f"a damaged {form} gives other samples")


FUZZERS = [Fuzzer("pictures", pictures), Fuzzer("sounds", sounds)]
