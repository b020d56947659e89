"""Pictures and sounds as they come in: what is damaged is refused by name, what is changed is told, and no file decides
for all others."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image, PngImagePlugin

from data_pipelines.codecs import PatchCodec, SpectralCodec
from data_pipelines.codecs.kmeans import TooFewError
from data_pipelines.errors import DataError
from data_pipelines.prepare.pair_options import PairOptions
from data_pipelines.prepare.pairs import build_pairs
from data_pipelines.prepare.reconstruction import mel_distance, psnr
from data_pipelines.raw.pictures import picture_facts, read_picture
from data_pipelines.raw.sounds import read_sound, sound_rate

BLUE, RED = (0, 0, 255), (255, 0, 0)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def sound(
    seconds: float = 0.5, rate: int = 8000, form: str = "WAV", subtype: str | None = None, seed: int = 0
) -> bytes:
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, len(time))
    file = io.BytesIO()
    soundfile.write(file, 0.4 * np.sin(2000 * time) + noise, rate, format=form, subtype=subtype)
    return file.getvalue()


def picture(value: int, colour: bool, side: int = 4) -> bytes:
    random = np.random.default_rng(value)
    return encoded(
        Image.fromarray(random.integers(0, 256, (side, side, 3) if colour else (side, side), dtype=np.uint8))
    )


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"the file {name}")
    return folder


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_as_their_exif_says(orientation: int, form: str) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :16], upright[:, 16:] = BLUE, RED
    upright[:8, :16] = 255  # white in the upper left corner
    turned: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.rot90(np.fliplr(a)),
        6: np.rot90,
        7: lambda a: np.rot90(np.fliplr(a), -1),
        8: lambda a: np.rot90(a, -1),
    }
    stored = turned[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"quality": 95, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    )
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **options)
    told: list[str] = []
    seen = read_picture(data, "a", 3, told.append)
    assert np.abs(seen.astype(int) - upright).max() < 60
    assert told == (["turned as its EXIF orientation says"] if orientation > 1 else [])
    facts = picture_facts(data, "a")
    assert (facts.height, facts.width, facts.colours) == (16, 32, 3)


def test_what_is_transparent_shows_white_not_what_is_hidden() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0] = 255  # red, hidden
    pixels[0, 0], pixels[1, 1] = (0, 255, 0, 255), (0, 0, 0, 128)
    wanted = [[[0, 255, 0], [255] * 3], [[255] * 3, [127] * 3]]
    told: list[str] = []
    assert read_picture(encoded(Image.fromarray(pixels)), "a", 3, told.append).tolist() == wanted
    assert told == ["transparent, laid on white"]
    grey = Image.merge("LA", [Image.fromarray(np.full((2, 2), value, np.uint8)) for value in (10, 0)])
    assert read_picture(encoded(grey), "a", 1).tolist() == [[255] * 2] * 2
    assert picture_facts(encoded(grey), "a").colours == 1
    palette = Image.fromarray(np.zeros((2, 2), np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert read_picture(encoded(palette, transparency=0), "a", 3).min() == 255
    solid = pixels.copy()
    solid[..., 3] = 255
    told.clear()
    assert np.array_equal(read_picture(encoded(Image.fromarray(solid)), "a", 3, told.append), solid[..., :3])
    assert not told


def png_with(**changes: bytes) -> bytes:
    """A PNG with the data of its chunks exchanged, their checksums right."""
    data, place, out = (
        encoded(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))),
        8,
        b"\x89PNG\r\n\x1a\n",
    )
    while place < len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        body = changes.get(name.decode(), data[place + 8 : place + 8 + size])
        checksum = struct.pack(">I", PngImagePlugin._crc32(body, PngImagePlugin._crc32(name)))
        out += struct.pack(">I", len(body)) + name + body + checksum
        place += 12 + size
    return out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png_with()[:60], "a picture that cannot be decoded"),
        (png_with(IHDR=b"\0" * 4), "a picture that cannot be decoded"),  # Pillow: ValueError
        (png_with().replace(b"IDAT", b"IDA\xf0"), "(not )?a picture that"),  # SyntaxError
        (
            png_with(IHDR=struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)),
            "a picture that cannot be decoded",
        ),
        (b"no picture", "not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that can be read"),
        (encoded(Image.fromarray(np.zeros((8, 8), np.uint16))), "more than 8 bits"),
        (b"", "not a picture that can be read"),
    ],
)
def test_damaged_pictures_are_named_without_objects(data: bytes, message: str) -> None:
    for read in (lambda: read_picture(data, "x.png", 1), lambda: picture_facts(data, "x.png")):
        with pytest.raises(DataError, match=rf"x\.png: {message}") as caught:
            read()
            read_picture(data, "x.png", 1)
        assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("first", [True, False])
def test_colour_is_that_of_any_picture_whichever_comes_first(tmp_path: Path, first: bool) -> None:
    pictures = {f"{n}.png": picture(n, colour=(n == 0) == first) for n in range(8)}
    built = build_pairs(
        put(tmp_path / "in", pictures), tmp_path / "out", PairOptions("patch:16:2", tokenizer="bytes")
    )
    image = built.modalities.image
    assert isinstance(image, PatchCodec) and image.colours == 3


def test_pictures_of_two_sizes_are_both_named(tmp_path: Path) -> None:
    files = {"a.png": picture(0, True), "b.png": picture(1, True), "c.png": picture(2, True, side=6)}
    with pytest.raises(DataError, match=r"c\.png: an image of 6 x 6 pixels, .*a\.png has 4 x 4"):
        build_pairs(
            put(tmp_path / "in", files), tmp_path / "out", PairOptions("patch:8:2", tokenizer="bytes")
        )


def test_a_given_grey_codec_tells_that_colours_are_lost(tmp_path: Path) -> None:
    grey = {f"{n}.png": picture(n, False) for n in range(6)}
    build_pairs(put(tmp_path / "grey", grey), tmp_path / "a", PairOptions("patch:8:2", tokenizer="bytes"))
    colour = {f"{n}.png": picture(n, n > 3) for n in range(6)}
    options = PairOptions(vocabulary=tmp_path / "a" / "text-to-image")
    built = build_pairs(put(tmp_path / "colour", colour), tmp_path / "b", options)
    assert built.report.changed.counts == {"made grey, as the codec is": 2}


@pytest.mark.parametrize(
    ("rates", "wanted"), [((8000, 16_000, 16_000), 16_000), ((16_000, 8000, 8000, 8000), 8000)]
)
def test_the_sample_rate_is_the_most_common_one(tmp_path: Path, rates: tuple[int, ...], wanted: int) -> None:
    files = {f"{n}.wav": sound(rate=rate, seed=n) for n, rate in enumerate(rates)}
    built = build_pairs(
        put(tmp_path / "in", files), tmp_path / "out", PairOptions(None, "spectral:8", "bytes")
    )
    audio = built.modalities.audio
    assert isinstance(audio, SpectralCodec) and audio.sample_rate == wanted
    assert built.report.changed.counts == {f"resampled to {wanted:,} Hz": 1}
    chosen = PairOptions(None, "spectral:8:1:12000", "bytes", force=True)
    audio = build_pairs(tmp_path / "in", tmp_path / "out", chosen).modalities.audio
    assert isinstance(audio, SpectralCodec) and audio.sample_rate == 12_000


FORMS = [
    *(("WAV", subtype) for subtype in ("PCM_16", "PCM_24", "PCM_U8", "FLOAT", "ULAW", "IMA_ADPCM")),
    *(("WAVEX", "PCM_16"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)),
]


@pytest.mark.parametrize(("form", "subtype"), FORMS)
@pytest.mark.parametrize("channels", [1, 2])
def test_whole_sounds_are_read_and_cut_ones_refused(form: str, subtype: str | None, channels: int) -> None:
    """Half, a third, and all but a byte: none is taken for a shorter sound."""
    file = io.BytesIO()
    wave = np.random.default_rng(0).normal(0, 0.1, (8000, channels))
    soundfile.write(file, wave, 8000, format=form, subtype=subtype)
    data = file.getvalue()
    told: list[str] = []
    samples, rate = read_sound(data, "x", None, told.append)
    assert (
        rate == sound_rate(data, "x") == 8000
        and abs(len(samples) - 8000) < 600
        and samples.dtype == np.float32
    )
    assert told == (["of several channels, averaged"] if channels == 2 else [])
    for end in (len(data) // 2, len(data) // 3, len(data) - 1, len(data) - 40):
        with pytest.raises(DataError, match="x: a sound that (is not whole|cannot be decoded)") as caught:
            read_sound(data[:end], "x")
        assert "BytesIO" not in str(caught.value)


def test_other_forms_are_called_so() -> None:
    for form in ("AIFF", "W64", "RF64"):
        with pytest.raises(DataError, match=f"in the form of {form}; give WAV, FLAC, Ogg or MP3"):
            read_sound(sound(form=form), "x")


def wav_of(samples: np.ndarray, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def riff(data: bytes, size: int, promised: int | None = None) -> bytes:
    """A WAV of 16 bits whose header says `size` bytes of sound."""
    promised = 36 + size if promised is None else promised
    head = (
        b"RIFF"
        + struct.pack("<I", promised & 0xFFFFFFFF)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    )
    return head + b"data" + struct.pack("<I", size & 0xFFFFFFFF) + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav_of(np.asarray([0.1] * 99 + [np.nan])), "1 of its samples are NaN or infinite"),
        (wav_of(np.asarray([0.1, np.inf] * 99)), "99 of its samples are NaN or infinite"),
        (wav_of(np.full(900, 9000.0)), "samples up to 9000, where full scale is 1"),
        (wav_of(np.zeros(1), 96_000), "a sound of 1 samples at 96,000 Hz is too short"),
        (wav_of(np.zeros(0)), "is too short"),
        (riff(bytes(999), 999), "end inside a sample of 2"),
        (riff(bytes(1000), 2000), "promises 2,044 bytes, the file has 1,044"),
        (riff(b"\1" * 2000, 1000), "1,000 bytes stand behind its end"),
        (
            riff(b"\1" * 2000 + b"data" + struct.pack("<I", 400) + b"\2" * 400, 2000, 36 + 2000 + 8 + 400),
            "two parts of sound",
        ),
        (b"RIFF no sound", "cannot be decoded .Format not recognised"),
        (b"", "cannot be decoded"),
    ],
    ids=range(11),  # the bytes hold the time at which they were made, and workers must agree on the names
)
def test_sounds_that_say_nothing_are_named(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"z\.wav: .*({message})"):
        read_sound(data, "z.wav")


def test_zeros_behind_the_end_of_a_wav_only_fill_a_block() -> None:
    assert len(read_sound(riff(bytes(2000), 1000), "x")[0]) == 500


def test_a_wav_that_was_written_into_a_pipe_is_read_to_its_end() -> None:
    samples, rate = read_sound(riff(b"\1\0" * 500, 0xFFFFFFFF, 0xFFFFFFFF), "x")
    assert (len(samples), rate) == (500, 8000)


def test_a_flac_header_that_promises_too_much_takes_no_memory() -> None:
    data = bytearray(sound(form="FLAC"))
    data[21] |= 0x0F  # the upper bits of the number of samples
    data[22:26] = b"\xff" * 4
    with pytest.raises(DataError, match="z.flac: a sound that (is not whole|cannot be decoded)"):
        read_sound(bytes(data), "z.flac")


def test_a_damaged_ogg_page_is_no_hole_in_a_sound() -> None:
    data = bytearray(sound(seconds=4, form="OGG", subtype="VORBIS"))
    data[len(data) // 2] ^= 1
    with pytest.raises(DataError, match="its Ogg page at byte .* has a wrong checksum"):
        read_sound(bytes(data), "x")


def test_reconstructions_are_measured_and_shown(tmp_path: Path) -> None:
    files = {f"{n}.png": picture(n, True, side=8) for n in range(6)}
    built = build_pairs(
        put(tmp_path / "in", files), tmp_path / "a", PairOptions("patch:96:2", tokenizer="bytes")
    )
    (all_patches,) = built.reconstructions
    with Image.open(tmp_path / "a" / all_patches.files[0]) as sheet:
        pixels = np.asarray(sheet)
    assert all_patches.figure > 99 and np.array_equal(pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :])
    fewer = build_pairs(
        tmp_path / "in", tmp_path / "b", PairOptions("patch:4:2", tokenizer="bytes")
    ).reconstructions[0]
    assert 5 < fewer.figure < 20 and "PSNR" in fewer.describe() and "pictures.png" in fewer.describe()
    sounds = {f"{n}.wav": sound(seed=n) for n in range(5)}
    built = build_pairs(put(tmp_path / "sounds", sounds), tmp_path / "c", PairOptions(tokenizer="bytes"))
    audio = built.modalities.audio
    assert audio is not None and (audio.codebooks, audio.codebook_size) == (2, 64), "of 95 frames"
    (heard,) = built.reconstructions
    assert 0 < heard.figure < 40 and "mel-spectral distance" in heard.describe()
    original, again = (soundfile.read(tmp_path / "c" / name)[0] for name in heard.files)
    assert len(original) == 4000 and len(again) >= 4000 and np.abs(again).max() > 0.1
    with pytest.raises(TooFewError):
        build_pairs(tmp_path / "sounds", tmp_path / "d", PairOptions(None, "spectral:256:2", "bytes"))


def test_figures_of_reconstruction() -> None:
    a = np.full((4, 4), 100, np.uint8)
    assert psnr([(a, a + 5)]) == pytest.approx(20 * np.log10(255 / 5))
    wave = np.random.default_rng(0).normal(0, 0.1, 8000)
    assert mel_distance(wave, wave, 8000) == 0
    assert mel_distance(wave, wave / 10, 8000) == pytest.approx(20, abs=0.1)
