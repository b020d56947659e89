"""The sidecar index of a shard: `train-000000.idx` beside `train-000000.tar`.

A fixed header and little-endian arrays, read through a memory map. Per member: where its header and its data
lie, its size, the CRC-32 of both, its extension. For a tokenised shard also its *pieces*: runs of tokens that
belong to one document and lie next to each other in the tar. A document is one piece, unless it is longer
than a member; then its pieces follow each other, and only the last one ends in the end-of-text token.

Token positions are counted from the start of the tar in tokens: members start at multiples of 512 bytes, so
the whole tar can be viewed as one array of tokens.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.storage.mapped_files import map_file
from data_pipelines.storage.tar_walk import Member, crc32, walk
from data_pipelines.typed import typed

MAGIC = b"TRIPTIDX"
VERSION = 1
PROBE_BYTES = 4096
TOKEN_EXTENSIONS = {2: "tokens.u16", 4: "tokens.u32"}
# magic, version, bytes per token, tar bytes, content id, probe, members, pieces, documents, extension bytes,
# CRC of the arrays, CRC of this header
_HEADER = struct.Struct("<8sIIQ16s16sQQQQII")
_MEMBER_ARRAYS = (
    ("header_offset", "<u8"),
    ("data_offset", "<u8"),
    ("size", "<u8"),
    ("crc", "<u4"),
    ("header_crc", "<u4"),
    ("extension", "<u4"),
)


@dataclass(frozen=True)
class IndexHeader:
    """What an index says about its shard before its arrays are read."""

    token_bytes: int  # 0 for a raw shard, else 2 or 4
    tar_bytes: int
    content_id: str  # of every member's place, size and checksum
    probe: str  # of the tar's first and last bytes
    members: int
    pieces: int
    documents: int
    extension_bytes: int
    arrays_crc: int

    @property
    def array_bytes(self) -> int:
        """Length of the arrays after the header."""
        per_member = sum(np.dtype(kind).itemsize for _, kind in _MEMBER_ARRAYS)
        tokens = self.pieces * 12 + (self.documents + 1) * 8 if self.token_bytes else 0
        return self.members * per_member + tokens + self.extension_bytes


@dataclass(frozen=True)
class Index:
    """An opened index. N members, P pieces, D documents."""

    header: IndexHeader
    header_offset_N: np.ndarray
    data_offset_N: np.ndarray
    size_N: np.ndarray
    crc_N: np.ndarray
    header_crc_N: np.ndarray
    extension_N: np.ndarray  # number in `extensions`
    piece_start_P: np.ndarray  # in tokens from the start of the tar
    piece_length_P: np.ndarray  # in tokens
    first_piece_D1: np.ndarray  # document d holds pieces [first_piece[d], first_piece[d + 1])
    extensions: tuple[str, ...]

    def document_tokens(self) -> np.ndarray:
        """Tokens of each document, end-of-text included. (D,) int64."""
        if self.header.documents == 0:
            return np.zeros(0, np.int64)
        return np.add.reduceat(self.piece_length_P, self.first_piece_D1[:-1].astype(np.int64), dtype=np.int64)


def index_path(shard: Path) -> Path:
    """Where the index of `shard` lies."""
    return shard.with_suffix(".idx")


def probe(tar: mmap.mmap) -> bytes:
    """A short digest of a tar's first and last bytes: tells shards of equal size apart without reading
    them."""
    return hashlib.blake2b(tar[:PROBE_BYTES] + tar[-PROBE_BYTES:], digest_size=16).digest()


def build_index(shard: Path) -> bytes:
    """The bytes of the index of `shard`, found by walking and reading the whole tar.

    Raises:
        DataError: the tar is damaged, or its tokens and lengths do not agree.
    """
    tar = map_file(shard)
    view = memoryview(tar)
    members = list(walk(shard, view))
    extensions = sorted({member.extension for member in members})
    columns = {
        "header_offset": [m.header_offset for m in members],
        "data_offset": [m.data_offset for m in members],
        "size": [m.size for m in members],
        "crc": [crc32(view[m.data_offset : m.data_offset + m.size]) for m in members],
        "header_crc": [crc32(view[m.header_offset : m.data_offset]) for m in members],
        "extension": [extensions.index(m.extension) for m in members],
    }
    arrays = b"".join(np.asarray(columns[name], kind).tobytes() for name, kind in _MEMBER_ARRAYS)
    content_id = hashlib.blake2b(arrays, digest_size=16).digest()
    token_bytes, pieces, first_piece = _pieces(shard, view, members)
    if token_bytes:
        arrays += np.asarray([start for start, _ in pieces], "<u8").tobytes()
        arrays += np.asarray([length for _, length in pieces], "<u4").tobytes()
        arrays += np.asarray(first_piece, "<u8").tobytes()
    names = "\n".join(extensions).encode()
    arrays += names
    counts = (len(members), len(pieces), len(first_piece) - 1, len(names))
    fields = (MAGIC, VERSION, token_bytes, len(tar), content_id, probe(tar), *counts, zlib.crc32(arrays))
    head = _HEADER.pack(*fields, 0)[:-4]
    view.release()
    tar.close()
    return head + struct.pack("<I", zlib.crc32(head)) + arrays


def _pieces(
    shard: Path, view: memoryview, members: list[Member]
) -> tuple[int, list[tuple[int, int]], list[int]]:
    """(bytes per token, pieces as (start, length), first piece of each document) of a tokenised shard.

    A member's lengths are those of the documents that begin in it; a document that does not fit goes on in
    the next member, which then lists one length fewer.
    """
    lengths = {m.key: m for m in members if m.extension == "lengths.u32"}
    pieces: list[tuple[int, int]] = []
    first_piece: list[int] = []
    token_bytes, missing = 0, 0  # missing: tokens of the last document that the next members hold
    for member in members:
        if member.extension not in TOKEN_EXTENSIONS.values():
            continue
        item = int(member.extension[-2:]) // 8
        twin = lengths.get(member.key)
        if token_bytes not in (0, item) or twin is None:
            reason = (
                "has no lengths.u32 beside it" if twin is None else "has another token width than the shard"
            )
            raise DataError(f"{shard}: member {member.name} {reason}; build the dataset again.")
        token_bytes, here, start = item, member.size // item, member.data_offset // item
        left = 0
        begun = np.frombuffer(view, "<u4", twin.size // 4, twin.data_offset).tolist()
        for place, length in enumerate([missing, *begun] if missing else begun):
            if not (missing and place == 0):
                first_piece.append(len(pieces))
            part = min(length, here)
            pieces.append((start, part))
            start, here, left = start + part, here - part, length - part
            if part == 0 or (left and here == 0 and place + 1 < len(begun) + bool(missing)):
                raise DataError(f"{shard}: {twin.name} lists more than {member.name} holds; build it again.")
        if here:
            raise DataError(f"{shard}: {member.name} holds more than {twin.name} lists; build it again.")
        missing = left
    if missing:
        raise DataError(f"{shard}: {missing} tokens of its last document are missing; build the shard again.")
    return token_bytes, pieces, [*first_piece, len(pieces)]


def write_index(shard: Path, content_id: str | None = None) -> IndexHeader:
    """Build and write the index beside `shard` (through a temporary file, so that it is whole or absent).

    Args:
        content_id: what the shard's content must be; None takes it as it is.

    Raises:
        DataError: the tar is damaged, or holds something else.
    """
    target = index_path(shard)
    temporary = target.with_suffix(".idx.part")
    temporary.write_bytes(build_index(shard))
    header = read_header(temporary)
    if content_id not in (None, header.content_id):
        temporary.unlink()
        raise DataError(
            f"{shard}: its content is not what dataset.json was written for, so a new index would only hide "
            "the damage. Copy the shard again from its origin, or build the dataset again."
        )
    temporary.replace(target)
    return header


def read_header(path: Path) -> IndexHeader:
    """Read and check the fixed part of an index.

    Raises:
        DataError: missing, not an index, another version, damaged or of the wrong length.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            length = file.seek(0, 2)
    except FileNotFoundError:
        raise DataError(f"{path}: the index is missing. {_build(path)} builds it from the shard.") from None
    again = f"{_build(path)} builds it again."
    if len(head) < _HEADER.size or head[:8] != MAGIC:
        raise DataError(f"{path}: not a shard index (its magic bytes are wrong). {again}")
    fields = _HEADER.unpack(head)
    if fields[1] != VERSION:
        raise DataError(f"{path}: index version {fields[1]}; this program reads version {VERSION}. {again}")
    if fields[11] != zlib.crc32(head[:-4]):
        raise DataError(f"{path}: the index header is damaged (checksum). {again}")
    header = IndexHeader(fields[2], fields[3], fields[4].hex(), fields[5].hex(), *fields[6:11])
    if length != _HEADER.size + header.array_bytes:
        raise DataError(
            f"{path}: the index has {length} bytes, {_HEADER.size + header.array_bytes} wanted. {again}"
        )
    return header


def read_index(path: Path) -> Index:
    """Read an index and check the checksum of its arrays. It is not mapped: whatever becomes of the file, what was
    checked stays.

    Raises:
        DataError: as `read_header`, or the arrays are damaged.
    """
    header = read_header(path)
    view = memoryview(path.read_bytes())[_HEADER.size :]
    if len(view) != header.array_bytes or zlib.crc32(view) != header.arrays_crc:
        again = f"{_build(path)} builds it again."
        raise DataError(f"{path}: the index is damaged (checksum of its arrays). {again}")
    place = 0

    def take(kind: str, count: int) -> np.ndarray:
        nonlocal place
        array = np.frombuffer(view, kind, count, place)
        place += array.nbytes
        return array

    columns = {name: take(kind, header.members) for name, kind in _MEMBER_ARRAYS}
    tokenised = bool(header.token_bytes)
    start = take("<u8", header.pieces if tokenised else 0)
    length = take("<u4", header.pieces if tokenised else 0)
    first = take("<u8", header.documents + 1 if tokenised else 0)
    extensions = (
        tuple(bytes(view[place:]).decode(errors="replace").split("\n")) if header.extension_bytes else ()
    )
    index = Index(
        header=header,
        header_offset_N=columns["header_offset"],
        data_offset_N=columns["data_offset"],
        size_N=columns["size"],
        crc_N=columns["crc"],
        header_crc_N=columns["header_crc"],
        extension_N=columns["extension"],
        piece_start_P=start,
        piece_length_P=length,
        first_piece_D1=first,
        extensions=extensions,
    )
    damage = _what_cannot_be(index)
    if damage:
        again = f"{_build(path)} builds it again."
        raise DataError(f"{path}: {damage}, though its checksums are right. {again}")
    return index


def _what_cannot_be(index: Index) -> str | None:
    """Why these numbers are of no shard: whoever wrote them was wrong, or meant harm. None if they may be."""
    header = index.header
    begin, size = index.data_offset_N, index.size_N
    end = begin + size  # of uint64: one that runs over comes out small
    if bool((index.extension_N >= max(1, len(index.extensions))).any()):
        return "a member's extension is none of its list"
    if bool((index.header_offset_N >= begin).any() or (end < begin).any() or (end > header.tar_bytes).any()):
        return "a member lies outside of the shard"
    if not header.token_bytes:
        return None
    if header.token_bytes not in TOKEN_EXTENSIONS:
        return f"{header.token_bytes} bytes per token"
    name = TOKEN_EXTENSIONS[header.token_bytes]
    is_tokens = np.asarray([extension == name for extension in index.extensions], np.bool_)[index.extension_N]
    item, length = np.uint64(header.token_bytes), index.piece_length_P.astype(np.uint64)
    first, last = begin[is_tokens] // item, end[is_tokens] // item
    # Pieces fill the members of tokens one after the other, without a gap.
    before = np.concatenate([np.zeros(1, np.uint64), np.cumsum(length)])
    held = np.concatenate([np.zeros(1, np.uint64), np.cumsum(last - first)])
    member = np.searchsorted(held, before[:-1], side="right") - 1
    if before[-1] != held[-1] or not length.all():
        return "its pieces are not as long as its members"
    if bool((index.piece_start_P != first[member] + before[:-1] - held[member]).any()):
        return "a piece is not where the one before it ends"
    if bool((before[1:] > held[member + 1]).any()):
        return "a piece is longer than what is left of its member"
    pieces = index.first_piece_D1
    if pieces[0] != 0 or pieces[-1] != header.pieces or bool((pieces[1:] <= pieces[:-1]).any()):
        return "its documents are not made of its pieces"
    return None


def _build(path: Path) -> str:
    """The command that builds an index, as a shell takes it."""
    return f"`{typed('data', 'index', path.parent)}`"
