"""Pictures and sounds as files, read as `triptych data pairs` reads them."""

from __future__ import annotations

import logging
import math
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.codecs.base import AudioCodec, ImageCodec
from data_pipelines.errors import DataError
from data_pipelines.raw.pictures import read_picture
from data_pipelines.raw.sounds import read_sound as decode_sound
from pretrain.errors import UserError

logger = logging.getLogger(__name__)

PCM_16 = 32767


def read_image(path: Path, codec: ImageCodec) -> np.ndarray:
    """A picture as the codec takes it: uint8, (height, width), or (height, width, 3) for three colours.

    It is turned as its EXIF orientation says, what is transparent is laid on white, colours are converted to the
    codec's number; the size must be right. Raises UserError, naming the file.
    """
    picture = _read(path, lambda data, note: read_picture(data, str(path), codec.colours, note))
    height, width = picture.shape[:2]
    if (height, width) != (codec.height, codec.width):
        raise UserError(
            f"{path}: {width} x {height} pixels; this run's images are {codec.width} x {codec.height}, resize it first"
        )
    return picture


def _read(path: Path, decode: Callable[[bytes, Callable[[str], None]], np.ndarray]) -> np.ndarray:
    """What `decode` makes of a file's bytes; what it does besides is told."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        return decode(data, lambda what: logger.warning("%s: %s", path, what))
    except DataError as error:
        raise UserError(str(error)) from None


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

    WAV, and with the audio packages FLAC, Ogg and MP3 too; channels are averaged, the rate becomes the codec's.
    """
    return _read(path, lambda data, note: decode_sound(data, str(path), codec.sample_rate, note)[0])


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
