"""One reader of pictures: for datasets of pairs, and for pictures that a run is asked about.

A picture is turned as its EXIF orientation says; what is transparent is laid on white; of a file of several pictures
the first one counts. All three are told.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Others are not opened: some of them start programs."""
PNG = b"\x89PNG"
DEEP = ("I", "F")
"""Pillow's modes of more than 8 bits begin so. Converting clips them to white, without an error."""
GREY = ("1", "L", "LA", "La")
ORIENTATION = 0x0112
TURNED = (2, 3, 4, 5, 6, 7, 8)
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""

Note = Callable[[str], None]
"""Takes what was done with a picture."""


@dataclass(frozen=True)
class PictureFacts:
    """What a file's head says; height and width in pixels as they are seen."""

    height: int
    width: int
    colours: int


def picture_facts(data: bytes, where: str) -> PictureFacts:
    """Size and colours (1 or 3) of a picture that is not decoded. Raises DataError, naming the file."""

    def read(opened: Image) -> PictureFacts:
        width, height = opened.size
        if opened.getexif().get(ORIENTATION) in SIDEWAYS:
            width, height = height, width
        return PictureFacts(height, width, 1 if opened.mode in GREY else 3)

    return _opened(data, where, read)


def read_picture(data: bytes, where: str, colours: int, note: Note | None = None) -> np.ndarray:
    """uint8 pixels, (height, width) for one colour, (height, width, 3) for three.

    Args:
        where: names the file in errors.
        note: is told what was done besides decoding.

    Raises:
        DataError: it cannot be decoded whole, or has more than 8 bits a pixel and colour.
    """
    tell = note or (lambda what: None)

    def read(opened: Image) -> np.ndarray:
        from PIL import ImageOps

        if data.startswith(PNG) and data[24:25] == b"\x10":
            tell("of 16 bits a colour, made 8")
        if getattr(opened, "n_frames", 1) > 1:
            tell("the first picture of several in the file")
        turned = ImageOps.exif_transpose(opened)
        if opened.getexif().get(ORIENTATION) in TURNED:
            tell("turned as its EXIF orientation says")
        laid = _on_white(turned, tell)
        if colours == 1 and opened.mode not in GREY:
            tell("made grey, as the codec is")
        return np.asarray(laid.convert("L" if colours == 1 else "RGB"))

    return _opened(data, where, read)


def _on_white(picture: Image, tell: Note) -> Image:
    """What is transparent shows white, not the colour that is hidden there."""
    from PIL import Image as images

    if not picture.has_transparency_data:
        return picture
    seen = picture.convert("RGBA")
    if seen.getchannel("A").getextrema()[0] == 255:  # opaque all over
        return picture.convert("L") if picture.mode in GREY else picture
    tell("transparent, laid on white")
    white = images.new("RGBA", seen.size, (255, 255, 255, 255))
    return images.alpha_composite(white, seen).convert("L" if picture.mode in GREY else "RGB")


def _opened(data: bytes, where: str, read: Callable[[Image], Any]) -> Any:
    """What `read` makes of the opened picture. Pillow raises whatever a damaged file leads it to."""
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    images.init()  # all plugins: those that are not loaded yet are unknown to `formats`
    try:
        if data.startswith(PNG):  # Pillow decodes pixels without a look at their checksums
            with images.open(io.BytesIO(data), formats=("PNG",)) as opened:
                opened.verify()
        with images.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.mode.startswith(DEEP):
                raise _DeepError
            return read(opened)
    except _DeepError:
        raise DataError(f"{where}: more than 8 bits a pixel and colour; convert it to 8.") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{where}: not a picture that can be read; give a PNG, a JPEG or a WebP of 8 bits a colour."
        ) from None
    except Exception as error:
        told = str(error) or type(error).__name__
        raise DataError(
            f"{where}: a picture that cannot be decoded ({told}). Make it anew, or remove it."
        ) from None


class _DeepError(Exception):
    pass
