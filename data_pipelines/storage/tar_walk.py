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
    kind: bytes = b"0"  # the type flag: a file, b"1" a hard link, b"2" a symbolic link ...
    link: str = ""  # what a link points to
    sparse: bool = False  # its data are stored without their holes

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


def header_damage(block: bytes) -> str | None:
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
    """A tar number: octal text, or big-endian binary where the first bit is set (sizes over 8 GiB).

    Raises ValueError.
    """
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(block: bytes) -> str:
    name, prefix = _text(block[:100]), _text(block[345:500])
    return f"{prefix}/{name}" if prefix and block[257:263] == b"ustar\0" else name


def _pax_records(data: bytes) -> dict[str, str]:
    """The records of a pax header; what follows a damaged one is not there."""
    found: dict[str, str] = {}
    while data:
        length = data.split(b" ", 1)[0]
        if not length.isdigit() or len(length) > 20 or not len(length) < int(length) <= len(data):
            break
        record, data = data[: int(length)], data[int(length) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return found


def walk(path: Path, tar: bytes | memoryview) -> Iterator[Member]:
    """Yield the regular files of a tar in order.

    `tar` holds the whole file (a memory map is best); `path` is only for messages.

    Raises:
        DataError: at the first damaged header, member cut short, or missing end, naming file and offset.
    """
    return (member for member in walk_all(path, tar) if member.kind in REGULAR)


REGULAR = b"0\0007"
"""Type flags of files; 7 is a contiguous one, which nobody stores otherwise."""


WITHOUT_DATA = b"123456"
"""Links, devices, folders: some programs write a size there, of what a hard link points to."""


def walk_all(path: Path, tar: bytes | memoryview) -> Iterator[Member]:
    """As `walk`, with folders, links and whatever else a tar may hold; `kind` says which.

    Raises:
        DataError: see `walk`.
    """
    view = memoryview(tar)
    offset, first_header = 0, -1
    said: dict[str, str] = {}  # by the headers before a member: GNU long names, pax records
    while True:
        block = bytes(view[offset : offset + BLOCK])
        if not any(block) and len(block) == BLOCK:
            _check_end(path, view, offset)
            return
        damage = header_damage(block)
        if damage:
            raise DataError(f"{path}: {damage} at byte {offset}. {_MEND}")
        first_header = offset if first_header < 0 else first_header
        kind = block[156:157]
        size, data = _size(path, block, offset, said), offset + BLOCK
        if kind == b"S":
            data = _after_sparse_headers(path, view, block, data)
        if data + padded(size) > len(view):
            raise DataError(
                f"{path}: truncated: the member {_name(block)!r} at byte {offset} needs {size} bytes, "
                f"the file ends after {max(0, len(view) - data)}. {_MEND}"
            )
        if kind in b"LKx":  # they describe the member that follows
            content = bytes(view[data : data + size])
            if kind == b"x":
                said |= _pax_records(content)
            else:
                said["path" if kind == b"L" else "linkpath"] = _text(content)
        elif kind != b"g":
            yield Member(first_header, data, size, *_facts(block, said))
            first_header, said = -1, {}
        offset = data + padded(size)


def _size(path: Path, block: bytes, offset: int, said: dict[str, str]) -> int:
    """Bytes that a member takes in the tar."""
    try:
        own = "size" not in said or block[156:157] in b"LKxg"
        size = _number(block[124:136]) if own else int(said["size"])
    except ValueError:
        size = -1
    if size < 0:
        raise DataError(f"{path}: a header whose size is not a number at byte {offset}. {_MEND}")
    return 0 if block[156:157] in WITHOUT_DATA else size


def _facts(block: bytes, said: dict[str, str]) -> tuple[str, bytes, str, bool]:
    """Name, kind, link and whether it is sparse."""
    kind = block[156:157]
    sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in said)
    name = said.get("GNU.sparse.name") or said.get("path") or _name(block)
    return name, kind, said.get("linkpath") or _text(block[157:257]), sparse


def _after_sparse_headers(path: Path, view: memoryview, block: bytes, data: int) -> int:
    """Where the data of an old GNU sparse member begin: after the blocks that go on with its map."""
    more = block[482]
    while more:
        if data + BLOCK > len(view):
            raise DataError(f"{path}: the file ends inside the map of a sparse member. {_MEND}")
        more, data = view[data + 504], data + BLOCK
    return data


_MEND = "Copy the shard again from its origin or build the dataset again; `data lint` of it lists all damage."


def _check_end(path: Path, view: memoryview, offset: int) -> None:
    tail = view[offset:]
    if len(tail) < 2 * BLOCK:
        raise DataError(f"{path}: truncated: the two zero blocks at its end are missing. {_MEND}")
    if any(bytes(tail)):
        raise DataError(f"{path}: a zeroed header at byte {offset}, with data after it. {_MEND}")


def crc32(data: bytes | memoryview) -> int:
    """CRC-32 of `data`, as stored in the index."""
    return zlib.crc32(data)
