"""Pictures and sounds as files: PNG and whatever else Pillow reads, and WAV."""

from __future__ import annotations

import math
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.codecs.base import AudioCodec, ImageCodec
from data_pipelines.pair_sources import DEEP
from pretrain.errors import UserError

PCM_16 = 32767


def read_image(path: Path, codec: ImageCodec) -> np.ndarray:
    """A picture as the codec takes it: uint8, (height, width), or (height, width, 3) for three colours.

    Colours are converted to the codec's number; the size must be right. Raises UserError, naming the file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(DEEP):
                raise UserError(f"{path}: more than 8 bits a pixel and colour; convert it to 8")
            picture = opened.convert("L" if codec.colours == 1 else "RGB")
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture that Pillow can read; give a PNG or a JPEG") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if picture.size != (codec.width, codec.height):
        raise UserError(
            f"{path}: {picture.width} x {picture.height} pixels; this run's images are {codec.width} x {codec.height}, "
            "resize it first"
        )
    return np.asarray(picture, np.uint8)


def write_image(path: Path, image: np.ndarray) -> None:
    """image: uint8, (height, width) or (height, width, 3). The file's name says the format; PNG loses nothing.

    Raises UserError, naming the file.
    """
    from PIL import Image

    check_image_name(path)
    try:
        Image.fromarray(image).save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def check_image_name(path: Path) -> None:
    """Raises UserError where no format has this ending."""
    from PIL import Image

    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{path}: Pillow writes no format of this name; write to a .png")


def contact_sheet(images: Sequence[np.ndarray], scale: int = 4, columns: int | None = None) -> np.ndarray:
    """Pictures of one size side by side on white, each pixel `scale` x `scale`, as one picture."""
    enlarged = [image.repeat(scale, 0).repeat(scale, 1) for image in images]
    columns = columns or math.ceil(math.sqrt(len(images)))
    height, width = enlarged[0].shape[:2]
    gap = 2
    rows = -(-len(images) // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, *enlarged[0].shape[2:])
    sheet = np.full(shape, 255, np.uint8)
    for number, image in enumerate(enlarged):
        top = gap + number // columns * (height + gap)
        left = gap + number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def read_sound(path: Path, codec: AudioCodec) -> np.ndarray:
    """A sound as the codec takes it: float32 in [-1, 1], (samples,). Raises UserError, naming the file.

    WAV with 16 bits, one channel and the codec's rate.
    """
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise UserError(f"{path}: not a WAV file of plain samples ({error}); {_convert(codec)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if (rate, channels, width) != (codec.sample_rate, 1, 2):
        raise UserError(
            f"{path}: {8 * width} bits, {channels} channels, {rate:,} samples a second; this run has 16 bits, "
            f"one channel and {codec.sample_rate:,} samples a second; {_convert(codec)}"
        )
    return (np.frombuffer(data, "<i2") / (PCM_16 + 1)).astype(np.float32)


def write_sound(path: Path, sound: np.ndarray, sample_rate: int) -> None:
    """sound: float32 in [-1, 1], (samples,). Writes a WAV file of 16 bits. Raises UserError, naming the file."""
    check_sound_name(path)
    samples = np.round(np.clip(sound, -1, 1) * PCM_16).astype("<i2")
    try:
        with path.open("wb") as opened, wave.open(opened, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(samples.tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def check_sound_name(path: Path) -> None:
    """Raises UserError for another ending than WAV's."""
    if path.suffix.lower() != ".wav":
        raise UserError(f"{path}: sounds are written as WAV; write to a .wav")


def _convert(codec: AudioCodec) -> str:
    return f"`ffmpeg -i FILE -ac 1 -ar {codec.sample_rate} -c:a pcm_s16le OUT.wav` makes one of it"
