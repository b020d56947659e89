"""Samples with a caption and an image or a sound, from webdataset shards or folders of files.

The files of a sample share a key, the path up to the first dot of its last part: `7.txt`, `7.png`, `7.flac`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.raw.files import NOT_UNPACKED, RawFile, Source, is_tar, raw_files
from data_pipelines.raw.json_text import parse_json, repaired
from data_pipelines.raw.pictures import PictureFacts, picture_facts, read_picture
from data_pipelines.raw.report import Tally, printable
from data_pipelines.raw.sounds import read_sound, sound_rate

IMAGES = ("png", "jpg", "jpeg", "webp")
SOUNDS = ("wav", "flac", "ogg", "mp3")
CAPTIONS = ("txt", "json")
CODES = tuple(f"{name}.u{bits}" for name in ("image", "audio") for bits in (16, 32))
KNOWN = (*CAPTIONS, *IMAGES, *SOUNDS, *CODES)
KINDS = {
    "caption": CAPTIONS,
    "image": (*IMAGES, *(code for code in CODES if code.startswith("image"))),
    "sound": (*SOUNDS, *(code for code in CODES if code.startswith("audio"))),
}
"""Of each a sample has one; the first of these, where there are several."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """One sample, its files not read yet.

    where: file, or shard and key, for messages.
    key: with its folder, from the source's or in the tar.
    files: by extension.
    """

    where: str
    key: str
    files: dict[str, RawFile]

    def extension(self, modality: str) -> str | None:
        """What its image or audio is stored as; None where it has none."""
        return next((e for e in KINDS["image" if modality == "image" else "sound"] if e in self.files), None)

    @property
    def modalities(self) -> list[str]:
        """image, audio: those it has."""
        return [name for name in ("image", "audio") if self.extension(name)]

    def codes_only(self, modality: str) -> bool:
        """Whether it is stored as codes."""
        return self.extension(modality) in CODES

    def file(self, modality: str) -> RawFile:
        """The file of its image or audio, which it must have."""
        extension = self.extension(modality)
        assert extension is not None, f"{self.where} has no {modality}"
        return self.files[extension]

    def caption(self, note: Note | None = None) -> str:
        """Its text, without blanks at the ends; half a surrogate pair in it is U+FFFD.

        Raises:
            DataError: there is none, it is empty, or not UTF-8; naming the file and the key.
        """
        found = next((e for e in CAPTIONS if e in self.files), None)
        if found is None:
            what = " and ".join(self.modalities)
            base = self.key.rpartition("/")[2]
            raise DataError(
                f"{self.where}: {'an' if what[:1] in 'ia' else 'a'} {what} without its caption; put a {base}.txt "
                f"or a {base}.json beside it, or remove it."
            )
        data, where = self.files[found].read(), self.files[found].where
        if found == "json":
            text = _json_caption(parse_json(data, where), where)
        else:
            try:
                text = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: a caption that is not UTF-8 ({error}).") from None
        if not text.strip():
            raise DataError(f"{where}: its caption is empty. Write one, or remove the sample.")
        fixed = repaired(text.strip())
        if note and fixed != text.strip() and "\ufffd" in fixed:
            note("with half a surrogate pair, which became U+FFFD")
        return fixed

    def codes(self, modality: str, codebooks: int) -> np.ndarray | None:
        """Stored codes, int64: (T,), or (K, T) from several codebooks; None where it has a real image or sound.

        Raises:
            DataError: not a whole number of frames.
        """
        extension = self.extension(modality)
        if extension not in CODES:
            return None
        data = self.files[extension].read()
        kind = np.dtype(f"<u{int(extension[-2:]) // 8}")
        if len(data) == 0 or len(data) % (kind.itemsize * codebooks):
            raise DataError(
                f"{self.where}: its {extension} has {len(data)} bytes, not a whole number of {codebooks} x T codes "
                f"of {kind.itemsize} bytes."
            )
        codes = np.frombuffer(data, kind).astype(np.int64)
        return codes if codebooks == 1 else codes.reshape(codebooks, -1)

    def picture_facts(self) -> PictureFacts:
        """Size and colours of its image. Raises DataError, naming the file."""
        file = self.file("image")
        return picture_facts(file.read(), file.where)

    def image(self, colours: int, note: Note | None = None) -> np.ndarray:
        """uint8 pixels, of 1 or 3 colours. Raises DataError where it cannot be decoded, naming the file."""
        file = self.file("image")
        return read_picture(file.read(), file.where, colours, note)

    def sound_rate(self) -> int:
        """Samples per second as its sound is stored. Raises DataError, naming the file."""
        file = self.file("audio")
        return sound_rate(file.read(), file.where)

    def sound(self, sample_rate: int | None = None, note: Note | None = None) -> tuple[np.ndarray, int]:
        """(float32 samples of one channel, samples per second), resampled to `sample_rate` if that is given.

        Raises:
            DataError: it cannot be decoded whole, or the audio packages are not installed.
        """
        file = self.file("audio")
        return read_sound(file.read(), file.where, sample_rate, note)

    def held(self) -> Sample:
        """The same with its files in memory where they are from a tar that was unpacked for them, so that it need not
        stay there whole."""
        held = {name: _held(raw) for name, raw in self.files.items()}
        return replace(self, files=held)


def _held(raw: RawFile) -> RawFile:
    if raw.tar is None or raw.tar.suffix.lower() == ".tar":
        return raw
    data = raw.read()
    return replace(raw, opened=lambda: io.BytesIO(data))


def _json_caption(record: object, where: str) -> str:
    caption = record.get("caption", record.get("text")) if isinstance(record, dict) else None
    if not isinstance(caption, str):
        raise DataError(f'{where}: no string "caption" in its json.')
    return caption


@dataclass
class Found:
    """How many samples there were: in tars, and in files of their own."""

    tars: int = 0
    in_tars: int = 0
    loose: int = 0

    def describe(self) -> str:
        """One line for people; "" where there is nothing to say."""
        if not (self.in_tars and self.loose):
            return ""
        return f"read {self.in_tars:,} sample(s) of {self.tars:,} tar(s) and {self.loose:,} of loose files beside them"


def read_samples(
    source: Source, left_out: Tally | None = None, found: Found | None = None
) -> Iterator[Sample]:
    """The samples of a source: of its tars, then of its other files, in the order of their names.

    Args:
        left_out: counts what is in no sample.
        found: counts the samples.

    Raises:
        DataError: a damaged tar, one in which the files of a sample do not stand together, or a file twice.
    """
    left_out, found = left_out or Tally(), found or Found()
    loose: dict[str, list[RawFile]] = {}
    for path in source.files:
        if is_tar(path):
            found.tars += 1
            for sample in _tar_samples(path, left_out):
                found.in_tars += 1
                yield sample
        else:
            for raw in raw_files(path, source.root, left_out):
                if _is_known(raw, left_out):
                    loose.setdefault(raw.key, []).append(raw)
    for key, files in loose.items():
        found.loose += 1
        yield _sample(files[0].where, key, files, left_out)


def _is_known(raw: RawFile, left_out: Tally) -> bool:
    """Whether a file can belong to a sample; it is counted where not."""
    if raw.extension in KNOWN:
        return True
    if raw.ending in (*NOT_UNPACKED, ".gz"):
        reason = f"packed in a form that is not read ({raw.ending}; unpack them)"
    elif raw.ending[1:] in KNOWN or raw.extension.endswith(CODES):
        reason = "with a dot before the ending, which a KEY must not have (rename them)"
    else:
        reason = f"neither caption nor image, sound or codes ({raw.ending or 'names without an ending'})"
    left_out.add(raw.where, reason)
    return False


def _sample(where: str, key: str, files: list[RawFile], left_out: Tally) -> Sample:
    """One sample of the files with its key. Raises DataError where one is there twice."""
    by_extension: dict[str, RawFile] = {}
    for raw in files:
        if raw.extension in by_extension:
            other = by_extension[raw.extension].where
            where = "with the same name" if other == raw.where else f"the other is {other}"
            raise DataError(
                f"{raw.where}: key {printable(key)} has two files .{raw.extension}, {where}. Remove one, or rename it."
            )
        by_extension[raw.extension] = raw
    for kind, extensions in KINDS.items():
        several = [extension for extension in extensions if extension in by_extension]
        for extension in several[1:]:
            reason = f"a second {kind} of a sample (.{several[0]} is taken, not .{extension})"
            left_out.add(by_extension.pop(extension).where, reason)
    return Sample(where, key, by_extension)


def _tar_samples(path: Path, left_out: Tally) -> Iterator[Sample]:
    """The samples of a shard: members next to each other with equal keys."""
    key, members, seen = "", list[RawFile](), set[str]()
    for raw in raw_files(path, path.parent, left_out):
        if not _is_known(raw, left_out):
            continue
        if raw.key != key and members:
            yield _closed(path, key, members, left_out)
            members = []
        if not members and raw.key in seen:
            raise _unsorted(path, raw.key)
        key = raw.key
        seen.add(key)
        members.append(raw)
    if members:
        yield _closed(path, key, members, left_out)


def _closed(path: Path, key: str, members: list[RawFile], left_out: Tally) -> Sample:
    """The sample of a key's members. Raises DataError if one that lacks something has the rest elsewhere in the tar."""
    sample = _sample(printable(f"{path}:{key}"), key, members, left_out)
    if not sample.modalities or not any(extension in CAPTIONS for extension in sample.files):
        files = (raw for raw in raw_files(path, path.parent, Tally()) if raw.extension in KNOWN)
        if sum(raw.key == key for raw in files) > len(members):
            raise _unsorted(path, key)
    return sample


def _unsorted(path: Path, key: str) -> DataError:
    return DataError(
        f"{path}: the files of key {printable(key)} do not stand next to each other. Pack the tar again in the order "
        "of names (`tar --sort=name`); if the key is in it twice, rename one."
    )
