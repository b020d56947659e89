"""Samples with a caption and an image or a sound, from webdataset shards or folders of files.

The files of a sample share a key, the path up to the first dot of its last part: `7.txt`, `7.png`, `7.flac`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.documents import find_files
from data_pipelines.errors import DataError
from data_pipelines.mapped import map_file
from data_pipelines.tarwalk import walk

IMAGES = ("png", "jpg", "jpeg", "webp")
SOUNDS = ("wav", "flac", "ogg", "mp3")
CAPTIONS = ("txt", "json")
CODES = tuple(f"{name}.u{bits}" for name in ("image", "audio") for bits in (16, 32))
DEEP = ("I", "F")
"""Pillow's modes of more than 8 bits begin so. Converting clips them to white, without an error."""
KNOWN = (*CAPTIONS, *IMAGES, *SOUNDS, *CODES)


@dataclass(frozen=True)
class Sample:
    """One sample, its files not read yet.

    where: file, or shard and key, for messages.
    parts: by extension.
    """

    where: str
    key: str
    parts: dict[str, Callable[[], bytes]]

    def extension(self, modality: str) -> str | None:
        """What its image or audio is stored as; None where it has none."""
        files = IMAGES if modality == "image" else SOUNDS
        return next((e for e in (*files, *CODES) if e in self.parts and _modality_of(e) == modality), None)

    @property
    def modalities(self) -> list[str]:
        """image, audio: those it has."""
        return [name for name in ("image", "audio") if self.extension(name)]

    def codes_only(self, modality: str) -> bool:
        """Whether it is stored as codes."""
        return self.extension(modality) in CODES

    def caption(self) -> str:
        """Its text, without blanks at the ends.

        Raises:
            DataError: there is none, it is empty, or not UTF-8; naming the file and the key.
        """
        found = next((e for e in CAPTIONS if e in self.parts), None)
        if found is None:
            what = " and ".join(self.modalities)
            raise DataError(
                f"{self.where}: {'an' if what[:1] in 'ia' else 'a'} {what} without its caption; put a {self.key}.txt "
                f"or a {self.key}.json beside it, or remove it."
            )
        try:
            text = self.parts[found]().decode("utf-8-sig")
            if found == "json":
                text = _json_caption(text, self.where)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where}: its {found} is not UTF-8 ({error}).") from None
        if not text.strip():
            raise DataError(f"{self.where}: its caption is empty. Write one, or remove the sample.")
        return text.strip()

    def codes(self, modality: str, codebooks: int) -> np.ndarray | None:
        """Stored codes, int64: (T,), or (K, T) from several codebooks; None where it has a real image or sound.

        Raises:
            DataError: not a whole number of frames.
        """
        extension = self.extension(modality)
        if extension not in CODES:
            return None
        data = self.parts[extension]()
        kind = np.dtype(f"<u{int(extension[-2:]) // 8}")
        if len(data) == 0 or len(data) % (kind.itemsize * codebooks):
            raise DataError(
                f"{self.where}: its {extension} has {len(data)} bytes, not a whole number of {codebooks} x T codes "
                f"of {kind.itemsize} bytes."
            )
        codes = np.frombuffer(data, kind).astype(np.int64)
        return codes if codebooks == 1 else codes.reshape(codebooks, -1)

    def image(self, colours: int | None = None) -> np.ndarray:
        """uint8 pixels.

        Args:
            colours: 1 or 3; None leaves grey images grey and makes all others RGB.

        Raises:
            DataError: it cannot be decoded.
        """
        from PIL import Image

        extension = self.extension("image")
        assert extension is not None, f"{self.where} has no image"
        try:
            with Image.open(io.BytesIO(self.parts[extension]())) as opened:
                if opened.mode.startswith(DEEP):
                    raise ValueError("more than 8 bits a pixel and colour; convert it to 8")
                grey = colours == 1 or (colours is None and opened.mode in ("1", "L"))
                return np.asarray(opened.convert("L" if grey else "RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.where}: its {extension} cannot be decoded ({error}).") from None

    def sound(self, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
        """(float32 samples of one channel, samples per second), resampled to `sample_rate` if that is given.

        Raises:
            DataError: it cannot be decoded, or the audio packages are not installed.
        """
        try:
            import soundfile
            import soxr
        except ImportError as error:
            raise DataError(
                f"reading sounds needs soundfile and soxr ({error}): pip install 'triptych[audio]'."
            ) from None
        extension = self.extension("audio")
        assert extension is not None, f"{self.where} has no sound"
        try:
            samples, rate = soundfile.read(
                io.BytesIO(self.parts[extension]()), dtype="float32", always_2d=True
            )
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise DataError(f"{self.where}: its {extension} cannot be decoded ({error}).") from None
        mono = samples.mean(1).astype(np.float32)
        if not len(mono):
            raise DataError(f"{self.where}: its {extension} is empty.")
        if sample_rate is None or sample_rate == rate:
            return mono, int(rate)
        return soxr.resample(mono, rate, sample_rate).astype(np.float32), sample_rate


def _modality_of(extension: str) -> str:
    if extension in CODES:
        return extension.split(".")[0]
    return "image" if extension in IMAGES else "audio"


def _json_caption(text: str, where: str) -> str:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: its json is not JSON ({error}).") from None
    caption = record.get("caption", record.get("text")) if isinstance(record, dict) else None
    if not isinstance(caption, str):
        raise DataError(f'{where}: no string "caption" in its json.')
    return caption


def read_samples(source: Path, out: Path | None = None) -> Iterator[Sample]:
    """The samples of a .tar, or of a folder of .tar shards or of files, in the order of their names.

    Raises:
        DataError: nothing to read, or a damaged tar.
    """
    files = find_files(source, out)
    shards = [path for path in files if path.suffix == ".tar"]
    if shards:
        for path in shards:
            yield from _tar_samples(path)
    else:
        yield from _folder_samples(files)


def _folder_samples(files: list[Path]) -> Iterator[Sample]:
    grouped: dict[str, dict[str, Callable[[], bytes]]] = {}
    first: dict[str, Path] = {}
    for path in files:
        name, _, extension = path.name.partition(".")
        if extension.lower() in KNOWN:
            key = str(path.parent / name)
            first.setdefault(key, path)
            grouped.setdefault(key, {})[extension.lower()] = path.read_bytes
    for key, parts in grouped.items():
        yield Sample(str(first[key]), Path(key).name, parts)


def _tar_samples(path: Path) -> Iterator[Sample]:
    """The samples of a shard: members next to each other with equal keys."""
    view = memoryview(map_file(path))
    key = ""
    parts: dict[str, Callable[[], bytes]] = {}
    for member in walk(path, view):
        extension = member.extension.lower()
        if extension not in KNOWN:
            continue
        if member.key != key and parts:
            yield Sample(f"{path}:{key}", key, parts)
            parts = {}
        key = member.key
        parts[extension] = _reader(view, member.data_offset, member.size)
    if parts:
        yield Sample(f"{path}:{key}", key, parts)


def _reader(view: memoryview, offset: int, size: int) -> Callable[[], bytes]:
    return lambda: bytes(view[offset : offset + size])
