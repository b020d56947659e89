"""A strict walk over the headers of a USTAR file.

The standard library's tar reader takes a damaged header for the end of the archive and reports nothing, so
half a shard can vanish. This walk checks each header's checksum and insists on the two zero blocks at the
end.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.errors import DataError

BLOCK = 512


@dataclass(frozen=True)
class Member:
    """One file inside a tar. Offsets are bytes from the start of the tar."""

    header_offset: int  # of the first header block, long-name blocks included
    data_offset: int
    size: int
    name: str

    @property
    def key(self) -> str:
        """What groups members into a sample: the path up to the first dot of its last part."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.split(".", 1)[0]

    @property
    def extension(self) -> str:
        """What follows the first dot of the last part of the path: `tokens.u16`, `json`."""
        return self.name.rpartition("/")[2].partition(".")[2]

    @property
    def end(self) -> int:
        """Offset of the block after the member's padding."""
        return self.data_offset + padded(self.size)


def padded(size: int) -> int:
    """`size` rounded up to whole tar blocks."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def header_problem(block: bytes) -> str | None:
    """Why `block` is not a tar header, or None if it is one."""
    if len(block) < BLOCK:
        return f"the file ends inside a header ({len(block)} of {BLOCK} bytes)"
    if not any(block):
        return "a zeroed header"
    try:
        stored = int(block[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return "a header whose checksum field is not a number"
    if stored != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        return "a header whose checksum is wrong"
    return None


def _number(field: bytes) -> int:
    """A tar number: octal text, or big-endian binary where the first bit is set (sizes over 8 GiB)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    prefix = block[345:500].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return f"{prefix}/{name}" if prefix and block[257:262] == b"ustar" else name


def _pax_path(data: bytes) -> str | None:
    """The `path` record of a pax header, or None."""
    while data:
        length = data.split(b" ", 1)[0]
        if not length.isdigit():
            return None
        record, data = data[: int(length)], data[int(length) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
    return None


def walk(path: Path, tar: bytes | memoryview) -> Iterator[Member]:
    """Yield the regular files of a tar in order.

    `tar` holds the whole file (a memory map is best); `path` is only for messages.

    Raises:
        DataError: at the first damaged header, member cut short, or missing end, naming file and offset.
    """
    view = memoryview(tar)
    offset, first_header, long_name = 0, -1, None
    while True:
        block = bytes(view[offset : offset + BLOCK])
        if not any(block) and len(block) == BLOCK:
            _check_end(path, view, offset)
            return
        problem = header_problem(block)
        if problem:
            raise DataError(f"{path}: {problem} at byte {offset}. {_MEND}")
        first_header = offset if first_header < 0 else first_header
        kind, size, data = block[156:157], _number(block[124:136]), offset + BLOCK
        if data + padded(size) > len(view):
            raise DataError(
                f"{path}: truncated: the member {_name(block)!r} at byte {offset} needs {size} bytes, "
                f"the file ends after {len(view) - data}. {_MEND}"
            )
        if kind in b"Lx":  # GNU long name, pax header: they describe the member that follows
            content = bytes(view[data : data + size])
            gnu_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            long_name = gnu_name if kind == b"L" else _pax_path(content) or long_name
        elif kind in b"0\0":
            yield Member(first_header, data, size, long_name or _name(block))
        if kind not in b"LxgK":
            first_header, long_name = -1, None
        offset = data + padded(size)


_MEND = (
    "Copy the shard again from its origin or build the dataset again; `triptych data lint` lists all damage."
)


def _check_end(path: Path, view: memoryview, offset: int) -> None:
    tail = view[offset:]
    if len(tail) < 2 * BLOCK:
        raise DataError(f"{path}: truncated: the two zero blocks at its end are missing. {_MEND}")
    if any(bytes(tail)):
        raise DataError(f"{path}: a zeroed header at byte {offset}, with data after it. {_MEND}")


def crc32(data: bytes | memoryview) -> int:
    """CRC-32 of `data`, as stored in the index."""
    return zlib.crc32(data)
