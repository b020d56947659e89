"""Reads every byte of a dataset and reports all that is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.storage.dataset import Dataset, Shard, check_shard, read_dataset
from data_pipelines.storage.index import (
    TOKEN_EXTENSIONS,
    Index,
    index_path,
    read_header,
    read_index,
    write_index,
)
from data_pipelines.storage.mapped_files import map_file
from data_pipelines.storage.shards import ShardRecord
from data_pipelines.storage.tar_walk import BLOCK, crc32, header_damage, padded, walk
from data_pipelines.tokens.document_form import check_pairs, member_documents, token_members
from data_pipelines.tokens.modalities import load_modalities
from data_pipelines.tokens.tokenizer_loading import load_tokenizer
from data_pipelines.tokens.vocabulary import Vocabulary

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def lint(folder: Path | str, progress: Progress | None = None) -> list[Damage]:
    """All damage of a dataset folder, or of a folder of raw shards.

    Checks of each shard: size, every tar header, the blocks at its end, every checksum in the index, the
    list of members; of tokenised ones also that lengths add up, ids lie in the vocabulary, and each
    document ends in the end-of-text token and holds no other; of pairs that each is one.

    Raises:
        DataError: the folder does not exist or holds no shard.
    """
    folder = Path(folder)
    show = progress or (lambda what, done, total: None)
    damage: list[Damage] = []
    dataset: Dataset | None = None
    vocabulary: Vocabulary | None = None
    if (folder / "dataset.json").exists() or not any(folder.glob("*.tar")):
        try:
            dataset = read_dataset(folder)
            load_tokenizer(folder)
            if dataset.ranges is not None:
                vocabulary = load_modalities(folder).vocabulary
        except DataError as error:
            if not any(folder.glob("*.tar")):
                raise
            damage.append(_damage(folder / "dataset.json", error))
    elif any(_is_tokenised(path) for path in folder.glob("*.idx")):
        damage.append(Damage(folder / "dataset.json", "missing, though the shards are tokenised."))
    records = {r.name: r for s in dataset.splits.values() for r in s.shards} if dataset else {}
    names = sorted({*records, *(path.stem for path in folder.glob("*.tar"))})
    for done, name in enumerate(names):
        show("checking shards", done, len(names))
        damage += _lint_shard(folder / f"{name}.tar", records.get(name), dataset, vocabulary)
    show("checking shards", len(names), len(names))
    return damage


def _is_tokenised(index: Path) -> bool:
    try:
        return read_header(index).token_bytes > 0
    except DataError:
        return False  # reported with its shard


def _damage(path: Path, error: DataError) -> Damage:
    """Damage, from an error, whose message may begin with the same path."""
    text = str(error)
    return Damage(path, text.removeprefix(f"{path}: "))


def _lint_shard(
    shard: Path, record: ShardRecord | None, dataset: Dataset | None, vocabulary: Vocabulary | None
) -> Iterator[Damage]:
    if dataset and record is None:
        yield Damage(shard, "not in dataset.json; training will not read it. Remove it, or build again.")
    if record and dataset:
        try:
            check_shard(shard, record, dataset.token_bytes)
        except DataError as error:
            yield _damage(shard, error)
    if not shard.exists() or shard.stat().st_size == 0:
        return
    tar = memoryview(map_file(shard))
    index: Index | None = None
    try:
        index = read_index(index_path(shard))
    except DataError as error:
        yield _damage(index_path(shard), error)
    try:
        members = list(walk(shard, tar))
        if index and [m.data_offset for m in members] != index.data_offset_N.tolist():
            yield Damage(shard, f"{len(members)} members, not where its index says ({index.header.members}).")
    except DataError as error:
        yield _damage(shard, error)
    if index:
        damaged = yield from _lint_members(shard, tar, index)
        if dataset and index.header.token_bytes and not damaged:
            if vocabulary is None:
                yield from _lint_tokens(shard, tar, index, dataset)
            else:
                yield from _lint_pairs(shard, vocabulary, dataset)


def _lint_members(shard: Path, tar: memoryview, index: Index) -> Generator[Damage, None, int]:
    """Compare each member with the index; returns how many are damaged."""
    damaged = 0
    columns = (index.header_offset_N, index.data_offset_N, index.size_N, index.header_crc_N, index.crc_N)
    for number, (header, data, size, header_crc, crc) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        what = []
        if data + size > len(tar):
            what.append(f"lies beyond the end of the shard ({len(tar)} bytes)")
        else:
            damage = header_damage(bytes(tar[data - BLOCK : data]))
            if damage or crc32(tar[header:data]) != header_crc:
                what.append(f"{damage or 'a changed tar header'} at byte {header}")
            if crc32(tar[data : data + size]) != crc:
                what.append(f"damaged data in bytes {data} to {data + size} (checksum)")
            if any(bytes(tar[data + size : data + padded(size)])):
                what.append(f"padding after byte {data + size} is not zero")
        for text in what:
            damaged += 1
            yield Damage(shard, f"member {number} (.{index.extensions[index.extension_N[number]]}): {text}")
    return damaged


def _lint_tokens(shard: Path, tar: memoryview, index: Index, dataset: Dataset) -> Iterator[Damage]:
    """Check ids and ends of documents, one member at a time."""
    kind = np.dtype(f"<u{index.header.token_bytes}")
    ends = index.first_piece_D1[1:].astype(np.int64) - 1  # the last piece of each document
    last = np.sort(index.piece_start_P[ends].astype(np.int64) + index.piece_length_P[ends] - 1)
    name = TOKEN_EXTENSIONS[index.header.token_bytes]
    for member in range(index.header.members):
        if index.extensions[index.extension_N[member]] != name:
            continue
        offset, size = int(index.data_offset_N[member]), int(index.size_N[member])
        ids = np.frombuffer(tar, kind, size // kind.itemsize, offset)
        first = offset // kind.itemsize
        wanted = last[(last >= first) & (last < first + len(ids))] - first
        outside = np.flatnonzero(ids >= dataset.vocabulary)
        if len(outside):
            token = int(ids[outside[0]])
            text = f"{len(outside)} ids outside the vocabulary of {dataset.vocabulary}, the first is {token}"
            yield Damage(shard, f"member {member}: {text}, token {outside[0]} of the member.")
        found = np.flatnonzero(ids == dataset.eot)
        missing, extra = np.setdiff1d(wanted, found), np.setdiff1d(found, wanted)
        extra = extra[np.append(ids, 0)[extra + 1] != dataset.eot]  # others fill the end of a slot
        if len(missing):
            yield Damage(shard, f"member {member}: {len(missing)} documents do not end in id {dataset.eot}.")
        if len(extra):
            yield Damage(shard, f"member {member}: {len(extra)} end-of-text ids inside documents.")


def _lint_pairs(shard: Path, vocabulary: Vocabulary, dataset: Dataset) -> Iterator[Damage]:
    """Check that documents are text or pairs, one member at a time; of each the first damage."""
    records = {r.name: r for split in dataset.splits.values() for r in split.shards}
    opened = Shard(dataset, records[shard.stem]).open()
    for member in token_members(opened):
        try:
            check_pairs(member_documents(opened, member), vocabulary)
        except DataError as error:
            yield _damage(shard, error)


def rebuild_indices(folder: Path | str, progress: Progress | None = None) -> int:
    """Build the index of every shard in a folder again; returns how many.

    Raises:
        DataError: no shard; a damaged shard; or a shard whose content is not what dataset.json was written
            for (its old index is left as it was).
    """
    folder = Path(folder)
    show = progress or (lambda what, done, total: None)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{folder}: no .tar files here.")
    records: dict[str, ShardRecord] = {}
    if (folder / "dataset.json").exists():
        records = {r.name: r for split in read_dataset(folder).splits.values() for r in split.shards}
    for done, shard in enumerate(shards):
        show("indexing", done, len(shards))
        write_index(shard, records[shard.stem].content_id if shard.stem in records else None)
    show("indexing", len(shards), len(shards))
    return len(shards)


def damage_json(damage: list[Damage]) -> str:
    """The damage as JSON, for programs."""
    return json.dumps(
        [{"path": str(one.path), "what": one.what} for one in damage], indent=1, allow_nan=False
    )
