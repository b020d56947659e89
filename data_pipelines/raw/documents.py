"""Finding the documents in a user's files: text files, JSON lines, JSON, folders of them, raw tar shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.raw.files import (
    DAMAGED_GZIP,
    NOT_UNPACKED,
    TAR_ENDINGS,
    RawFile,
    damaged_gzip,
    find_files,
    raw_files,
)
from data_pipelines.raw.json_text import has_surrogate, json_lines, parse_json, repaired
from data_pipelines.raw.report import Report, printable

__all__ = ["TAR_ENDINGS", "file_documents", "find_files", "text_documents"]
LINES_ENDINGS = (".jsonl", ".ndjson")


def file_documents(path: Path, report: Report) -> Iterator[str]:
    """The documents of one file: each line of .jsonl, each object of .json, the .txt, .json and .jsonl members of a
    .tar, else the whole file as text.

    Text must be UTF-8 (a byte order mark is removed). A name that ends in .gz or .tgz is unpacked first.

    Raises:
        DataError: a line of a .jsonl file that is not an object with a "text", with file and line number; a
            damaged tar or gzip file.
    """
    for raw in raw_files(path, path.parent, report.left_out):
        yield from text_documents(raw, report)


def text_documents(raw: RawFile, report: Report) -> Iterator[str]:
    """The documents of one raw file. Raises DataError: see `file_documents`."""
    if raw.replaced:
        report.left_out.add(raw.where, "replaced by a later member of the same name in their tar")
    elif raw.ending in NOT_UNPACKED:
        report.left_out.add(
            raw.where, f"packed in a form that is not read ({raw.ending}; unpack them, or use gzip)"
        )
    elif raw.unpacked_ending in LINES_ENDINGS:
        yield from _line_texts(raw, report)
    elif raw.unpacked_ending == ".json":
        yield from _json_texts(raw, report)
    elif raw.tar is not None and raw.unpacked_ending != ".txt":
        report.left_out.add(raw.where, f"not text ({raw.ending or 'a name without an ending'})")
    else:
        text = _decode(raw.read_unpacked(), raw.where, report)
        if text is not None:
            yield text


def _decode(data: bytes, name: str, report: Report) -> str | None:
    """The text of a document, or None (counted) where there is none."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        report.left_out.add(name, "not UTF-8 but UTF-16")
        return None
    if b"\0" in data[:8192]:
        report.left_out.add(name, "binary")
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        report.left_out.add(name, "not UTF-8")
        return None
    return text if _is_filled(text, name, report) else None


def _is_filled(text: str, name: str, report: Report) -> bool:
    if text.strip():
        return True
    report.left_out.add(name, "empty")
    return False


def _line_texts(raw: RawFile, report: Report) -> Iterator[str]:
    with raw.open_unpacked() as file:
        records = json_lines(file, lambda number: f"{raw.where}:{number}")
        count = 0
        while True:
            try:
                where, record = next(records)
            except StopIteration:
                if not count:
                    report.left_out.add(raw.where, "empty")
                return
            except DAMAGED_GZIP as error:
                raise damaged_gzip(raw.where, error) from None
            count += 1
            yield from _record_text(record, where, report)


def _json_texts(raw: RawFile, report: Report) -> Iterator[str]:
    """The "text" of an object, or of each in a list."""
    data = raw.read_unpacked()
    if not data.strip():
        report.left_out.add(raw.where, "empty")
        return
    try:
        found = parse_json(data, raw.where)
    except DataError as error:
        if "Extra data" in str(error):
            raise DataError(f"{error} If each line is one document, call it .jsonl.") from None
        raise
    if not isinstance(found, list):
        yield from _record_text(found, raw.where, report)
        return
    if not found:
        report.left_out.add(raw.where, "empty")
    for number, record in enumerate(found):
        yield from _record_text(record, f"{raw.where}, element {number}", report)


def _record_text(record: Any, where: str, report: Report) -> Iterator[str]:
    """The "text" of a JSON object; none (counted) where it is empty."""
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = printable(", ".join(sorted(record))) if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f'{where}: no string "text" in it (found: {keys}). Each document is {{"text": "..."}}.'
        )
    if has_surrogate(text):
        fixed = repaired(text)
        if "\ufffd" in fixed:
            report.changed.add(where, "with half a surrogate pair, which became U+FFFD")
        text = fixed
    if _is_filled(text, where, report):
        yield text
