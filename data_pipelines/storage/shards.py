"""Writing tokenised shards, through webdataset's own tar writer.

A sample of a tokenised shard is `KEY.lengths.u32` (tokens of each document that begins in it, end-of-text
included) and `KEY.tokens.u16` or `.u32` (up to 262,144 tokens, documents one after the other). A document
longer than that goes on in the next samples of the same shard.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.storage.index import TOKEN_EXTENSIONS, IndexHeader, write_index

MEMBER_TOKENS = 262_144


@dataclass(frozen=True)
class ShardRecord:
    """What `dataset.json` says about one shard."""

    name: str  # without extension
    bytes: int
    documents: int
    tokens: int
    text_bytes: int  # UTF-8 bytes of the documents: for bits per byte
    content_id: str

    def to_dict(self) -> dict[str, Any]:
        """As stored in dataset.json."""
        return dict(vars(self))


def write_tar(path: Path, samples: list[dict[str, Any]]) -> None:
    """Write `samples` (`__key__` and bytes per extension) as one reproducible USTAR file."""
    with TarFile(path) as tar:
        for sample in samples:
            tar.write(sample)


class TarFile:
    """webdataset's TarWriter on a file that is fsynced when closed. Owners and times are fixed: equal samples
    give equal bytes."""

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # not needed for reading

        self.path = path
        self._file = path.open("wb")
        self._writer = TarWriter(
            self._file, user="triptych", group="triptych", mtime=0, compress=False, encoder=False
        )

    def write(self, sample: dict[str, Any]) -> None:
        """Append one sample."""
        self._writer.write(sample)

    def close(self) -> None:
        """Write the tar's end and bring the file to the disk."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> TarFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class _Open:
    """The shard being written."""

    tar: TarFile
    samples: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    buffer: list[np.ndarray] = field(default_factory=list)  # token runs not written yet
    buffered: int = 0
    begun: list[int] = field(default_factory=list)  # lengths of the documents that begin in the buffer


class TokenShardWriter:
    """Writes the documents of one split to shards of about `shard_bytes` and indexes each of them."""

    def __init__(self, folder: Path, split: str, token_bytes: int, shard_bytes: int) -> None:
        self.folder, self.split = folder, split
        self.token_bytes, self.shard_bytes = token_bytes, shard_bytes
        self.records: list[ShardRecord] = []
        self._open: _Open | None = None

    def write(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document: its token ids with the end-of-text token, and the length of its text."""
        shard = self._open = self._open or self._begin()
        if shard.buffered and shard.buffered + len(tokens) > MEMBER_TOKENS:
            self._flush(shard)
        shard.begun.append(len(tokens))
        rest = tokens
        while len(rest) > MEMBER_TOKENS:
            shard.buffer, shard.buffered, rest = [rest[:MEMBER_TOKENS]], MEMBER_TOKENS, rest[MEMBER_TOKENS:]
            self._flush(shard)
        shard.buffer.append(rest)
        shard.buffered += len(rest)
        shard.documents += 1
        shard.tokens += len(tokens)
        shard.text_bytes += text_bytes
        if shard.tokens * self.token_bytes >= self.shard_bytes:
            self._finish(shard)

    def close(self) -> list[ShardRecord]:
        """Finish the last shard and return the records of all."""
        if self._open:
            self._finish(self._open)
        return self.records

    def _begin(self) -> _Open:
        return _Open(TarFile(self.folder / f"{self.split}-{len(self.records):06d}.tar"))

    def _flush(self, shard: _Open) -> None:
        tokens = np.concatenate(shard.buffer).astype(f"<u{self.token_bytes}")
        sample = {
            "__key__": f"{shard.samples:09d}",
            "lengths.u32": np.asarray(shard.begun, "<u4").tobytes(),
            TOKEN_EXTENSIONS[self.token_bytes]: tokens.tobytes(),
        }
        shard.tar.write(sample)
        shard.samples += 1
        shard.buffer, shard.buffered, shard.begun = [], 0, []

    def _finish(self, shard: _Open) -> None:
        if shard.buffered:
            self._flush(shard)
        shard.tar.close()
        header: IndexHeader = write_index(shard.tar.path)
        assert header.documents == shard.documents, "the index and the writer count documents differently"
        self.records.append(
            ShardRecord(
                shard.tar.path.stem,
                header.tar_bytes,
                shard.documents,
                shard.tokens,
                shard.text_bytes,
                header.content_id,
            )
        )
        self._open = None
