"""Finding the documents in a user's files: text files, JSON lines, folders of them, raw tar shards."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_pipelines.errors import DataError
from data_pipelines.mapped import map_file
from data_pipelines.tarwalk import walk

LISTED = 20
DAMAGED_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


@dataclass
class Skipped:
    """What was left out, and why: counts, and the first few names."""

    counts: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Count one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.names) < LISTED:
            self.names.append(f"{_printable(name)}: {reason}")


def _printable(name: str) -> str:
    """A name that is not UTF-8, in a form that can be printed."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def find_files(source: Path, out: Path | None = None) -> list[Path]:
    """The files of a folder and its subfolders in the order of their names; or the one file.

    Names that begin with a dot are left out, and so is the output folder `out` where it lies in `source`;
    symbolic links to folders are not followed.

    Raises:
        DataError: there is no such file or folder, or nothing in it.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder.")
    found: list[Path] = []
    left_out = out.resolve() if out else None
    if source.resolve() == left_out:
        raise DataError(f"{source}: the same folder as the output folder; choose another --out.")
    for folder, folders, files in os.walk(source):
        inside = (name for name in folders if not name.startswith("."))
        folders[:] = sorted(name for name in inside if (Path(folder) / name).resolve() != left_out)
        found += [Path(folder) / name for name in files if not name.startswith(".")]
    if not found:
        raise DataError(f"{source}: the folder holds no files. Give a folder with text files, or a file.")
    return sorted(path for path in found if path.is_file())


def file_documents(path: Path, skipped: Skipped) -> Iterator[str]:
    """The documents of one file: each line of .jsonl, each .json or .txt member of .tar, else the whole file.

    Text must be UTF-8 (a byte order mark is removed). A name that ends in .gz or .tgz is decompressed first.

    Raises:
        DataError: a line of a .jsonl file that is not an object with a "text", with file and line number; a
            damaged tar or gzip file.
    """
    name = path.name.removesuffix(".gz")
    if path.name.endswith(TAR_ENDINGS):
        yield from tar_documents(path, skipped)
    elif name.endswith((".jsonl", ".ndjson")):
        yield from _json_lines(path, skipped)
    else:
        with _open(path) as file:
            text = _decode(_read(path, file), str(path), skipped)
        if text is not None:
            yield text


def _is_gzip(path: Path) -> bool:
    return path.name.endswith((".gz", ".tgz"))


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if _is_gzip(path) else path.open("rb")  # type: ignore[return-value]


def _read(path: Path, file: IO[bytes]) -> bytes:
    try:
        return file.read()
    except DAMAGED_GZIP as error:
        raise DataError(f"{path}: damaged gzip file ({error}). Copy it again, or leave it out.") from None


def _decode(data: bytes, name: str, skipped: Skipped) -> str | None:
    """The text of a document, or None (counted) where there is none."""
    if b"\0" in data[:8192]:
        skipped.add(name, "binary")
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped.add(name, "not UTF-8")
        return None
    if not text.strip():
        skipped.add(name, "empty")
        return None
    return text


def _json_lines(path: Path, skipped: Skipped) -> Iterator[str]:
    with _open(path) as file:
        lines = enumerate(file, 1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except DAMAGED_GZIP as error:
                raise DataError(f"{path}: damaged gzip file ({error}). Copy it again.") from None
            if line.strip():
                where = f"{path}:{number}"
                text = _json_text(line, where)
                if text.strip():
                    yield text
                else:
                    skipped.add(where, "empty")


def _json_text(data: bytes, where: str) -> str:
    """The "text" of a JSON object."""
    try:
        record: Any = json.loads(data)
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deep. Mend or remove the line.") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise DataError(f"{where}: not JSON ({error}). Mend or remove the line.") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f'{where}: no string "text" in it (found: {keys}). Each document is {{"text": "..."}}.'
        )
    # An unpaired surrogate (\ud800 alone) is legal JSON but not text.
    return (
        text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _has_surrogate(text) else text
    )


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else False


def _unpacked(path: Path) -> bytes:
    with _open(path) as file:
        return _read(path, file)


def tar_documents(path: Path, skipped: Skipped) -> Iterator[str]:
    """The documents of a raw webdataset shard: members .txt (the text) and .json (an object with a "text").

    Raises:
        DataError: the tar is damaged, or a .json member has no text.
    """
    view = memoryview(_unpacked(path) if _is_gzip(path) else map_file(path))
    for member in walk(path, view):
        data = bytes(view[member.data_offset : member.data_offset + member.size])
        where = _printable(f"{path}:{member.name}")
        if member.extension == "json":
            text = _json_text(data, where)
            if text.strip():
                yield text
            else:
                skipped.add(where, "empty")
        elif member.extension == "txt":
            decoded = _decode(data, where, skipped)
            if decoded is not None:
                yield decoded
        else:
            skipped.add(where, f"not text (.{member.extension})")
