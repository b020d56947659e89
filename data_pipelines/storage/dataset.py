"""A tokenised dataset: a folder with `dataset.json`, shards and their indices.

Opening checks that every file is there and is the one that `dataset.json` was written for; member checksums
are checked when a member is read for the first time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.storage.index import Index, index_path, probe, read_header, read_index
from data_pipelines.storage.mapped_files import map_file
from data_pipelines.storage.shards import ShardRecord
from data_pipelines.storage.tar_walk import crc32
from data_pipelines.typed import typed

logger = logging.getLogger(__name__)

FORMAT = "triptych-tokens"
VERSION = 1
MOST_IDS = 2**31
BUILD_AGAIN = "Copy it again from its origin, or build the dataset again."


@dataclass(frozen=True)
class Split:
    """The shards of one split and their sums."""

    shards: tuple[ShardRecord, ...]
    documents: int
    tokens: int
    text_bytes: int

    @classmethod
    def of(cls, shards: list[ShardRecord]) -> Split:
        """The split that holds `shards`."""
        sums = (sum(getattr(s, key) for s in shards) for key in ("documents", "tokens", "text_bytes"))
        return cls(tuple(shards), *sums)


@dataclass(frozen=True)
class Dataset:
    """An opened dataset folder."""

    path: Path
    splits: dict[str, Split]
    tokenizer: dict[str, Any]  # kind, file, fingerprint, vocabulary, eot
    token_bytes: int
    fingerprint: str
    ranges: dict[str, Any] | None = None  # fingerprint and size of vocabulary.json; None: text alone

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int((self.tokenizer if self.ranges is None else self.ranges)["vocabulary"])

    @property
    def eot(self) -> int:
        """The id that ends each document."""
        return int(self.tokenizer["eot"])

    def split(self, name: str) -> Split:
        """The split called `name`.

        Raises:
            DataError: there is none, or it holds no token.
        """
        found = self.splits.get(name)
        if found is None or found.tokens == 0:
            have = ", ".join(key for key, value in self.splits.items() if value.tokens) or "none"
            state = "is empty" if found else "does not exist"
            raise DataError(f"{self.path}: the split {name!r} {state} (splits with data: {have}).")
        return found


def write_dataset(
    folder: Path,
    splits: dict[str, list[ShardRecord]],
    tokenizer: dict[str, Any],
    ranges: dict[str, Any] | None = None,
) -> str:
    """Write `dataset.json` and return the dataset's fingerprint.

    Args:
        tokenizer: the entry that the text tokenizer's `save` gave.
        ranges: `Vocabulary.describe()` of the vocabulary.json beside it; None for text alone.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": tokenizer,
        "token_bytes": token_bytes(int((ranges or tokenizer)["vocabulary"])),
        "splits": {},
    }
    if ranges is not None:
        content["ranges"] = ranges
    for name, shards in splits.items():
        split = Split.of(shards)
        sums = {"documents": split.documents, "tokens": split.tokens, "text_bytes": split.text_bytes}
        content["splits"][name] = {**sums, "shards": [shard.to_dict() for shard in shards]}
    content["fingerprint"] = _fingerprint(content)
    (folder / "dataset.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return str(content["fingerprint"])


def token_bytes(vocabulary: int) -> int:
    """Bytes that one token id takes on disk."""
    return 2 if vocabulary <= 65_536 else 4


def _fingerprint(content: dict[str, Any]) -> str:
    plain = {key: value for key, value in content.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_dataset(folder: Path) -> Dataset:
    """Read `dataset.json` without looking at the shards.

    Raises:
        DataError: folder or file missing, not a dataset, another version, edited by hand.
    """
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such dataset folder. `{typed('data', 'demo', '--out', folder)}` "
            f"makes one to try; `{typed('data', 'build', '--help')}` says how to make one from your text."
        )
    if not path.is_file():
        raise DataError(
            f"{path}: missing, so {folder} is not a tokenised dataset. `{typed('data', 'build', '--help')}` "
            f"says how to make one from text, `{typed('data', 'tokenize', '--help')}` from raw shards."
        )
    try:
        content = json.loads(path.read_bytes())
        if content.get("format") != FORMAT:
            raise DataError(f"{path}: its format is {content.get('format')!r}, not {FORMAT!r}. {BUILD_AGAIN}")
        if content["version"] != VERSION:
            raise DataError(
                f"{path}: format version {content['version']}; this program reads version {VERSION}. "
                f"{BUILD_AGAIN}"
            )
        if content["fingerprint"] != _fingerprint(content):
            raise DataError(f"{path}: its fingerprint does not fit its content: it was edited. {BUILD_AGAIN}")
        splits = {name: _split_of(name, split) for name, split in content["splits"].items()}
        _check_tokenizer(content)
        return Dataset(
            folder,
            splits,
            content["tokenizer"],
            content["token_bytes"],
            content["fingerprint"],
            content.get("ranges"),
        )
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = str(error) if type(error) in (ValueError, TypeError) else repr(error)
        raise DataError(f"{path}: cannot be read ({what}). {BUILD_AGAIN}") from None


def _split_of(name: str, content: dict[str, Any]) -> Split:
    """Raises ValueError or TypeError for what no build writes."""
    records = [ShardRecord(**shard) for shard in content["shards"]]
    for record in records:
        for field in dataclasses.fields(record):
            _take(
                f"{name}.shards.{field.name}",
                getattr(record, field.name),
                str if field.type == "str" else int,
            )
        if Path(record.name).name != record.name:
            raise ValueError(f"the shard {record.name!r} is not in the folder")
    split = Split.of(records)
    for key in ("documents", "tokens", "text_bytes"):
        if content[key] != getattr(split, key):
            raise ValueError(f"{name} has {content[key]} {key}, its shards {getattr(split, key)}")
    return split


def _check_tokenizer(content: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError for what no build writes."""
    tokenizer, ranges = content["tokenizer"], content.get("ranges")
    for key in ("kind", "fingerprint"):
        _take(f"tokenizer.{key}", tokenizer[key], str)
    if tokenizer["kind"] != "bytes":
        _take("tokenizer.file", tokenizer["file"], str)
    vocabulary: int = _take("tokenizer.vocabulary", tokenizer["vocabulary"], int)
    if ranges is not None:
        _take("ranges.fingerprint", ranges["fingerprint"], str)
        vocabulary = _take("ranges.vocabulary", ranges["vocabulary"], int)
    eot: int = _take("tokenizer.eot", tokenizer["eot"], int)
    if not eot < vocabulary <= MOST_IDS:
        raise ValueError(f"the end-of-text id {tokenizer['eot']} is outside of a vocabulary of {vocabulary}")
    if _take("token_bytes", content["token_bytes"], int) != token_bytes(vocabulary):
        raise ValueError(f"token_bytes is {content['token_bytes']} for a vocabulary of {vocabulary}")


def _take(name: str, value: Any, kind: type) -> Any:
    """`value`, if it is a text, or a count."""
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise TypeError(f"{name} is {str(value)[:40]!r}")
    return value


def open_dataset(folder: Path | str) -> Dataset:
    """Read `dataset.json` and check every shard and index against it (their sizes and identities, not yet
    every byte: `triptych data lint` reads all of it).

    Raises:
        DataError: naming the file and what to do.
    """
    dataset = read_dataset(Path(folder))
    for split in dataset.splits.values():
        for record in split.shards:
            check_shard(dataset.path / f"{record.name}.tar", record, dataset.token_bytes)
    return dataset


def check_shard(shard: Path, record: ShardRecord, token_bytes: int) -> None:
    """Check a shard's size and first and last bytes against its index, and the index against
    `dataset.json`."""
    try:
        size = shard.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{shard}: the shard is missing. {BUILD_AGAIN}") from None
    if size == 0:
        raise DataError(f"{shard}: the shard is empty (0 bytes, {record.bytes} wanted). {BUILD_AGAIN}")
    header = read_header(index_path(shard))
    if header.content_id != record.content_id or header.token_bytes != token_bytes:
        raise DataError(
            f"{index_path(shard)}: this is the index of another shard than dataset.json names. "
            f"`{typed('data', 'index', shard.parent)}` builds the indices again."
        )
    if size != header.tar_bytes:
        state = "truncated" if size < header.tar_bytes else "too long"
        raise DataError(f"{shard}: {state}: {size} bytes, its index says {header.tar_bytes}. {BUILD_AGAIN}")
    with shard.open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, size - 4096))
        found = hashlib.blake2b(head + file.read(), digest_size=16).hexdigest()
    if found != header.probe:
        raise DataError(_what_differs(shard))


def _what_differs(shard: Path) -> str:
    """Say what is wrong with a shard whose first or last bytes are not those its index was built from."""
    index, tar = read_index(index_path(shard)), memoryview(map_file(shard))
    damaged = [damage for n in range(index.header.members) if (damage := member_damage(tar, index, n))]
    if len(damaged) == index.header.members:
        return f"{shard}: this is another shard than the one its index was built from. {BUILD_AGAIN}"
    what = damaged[0] if damaged else "bytes that belong to no member are damaged"
    return f"{shard}: {what}. {BUILD_AGAIN}"


def member_damage(tar: memoryview, index: Index, member: int) -> str | None:
    """Compare one member's header and data with the index's checksums; None if both are right."""
    header, data = int(index.header_offset_N[member]), int(index.data_offset_N[member])
    end = data + int(index.size_N[member])
    for start, stop, wanted, what in (
        (header, data, int(index.header_crc_N[member]), "tar header"),
        (data, end, int(index.crc_N[member]), "data"),
    ):
        if crc32(tar[start:stop]) != wanted:
            name = index.extensions[int(index.extension_N[member])]
            return (
                f"the {what} of member {member} (.{name}, bytes {start} to {stop}) is damaged: its "
                "checksum is not the index's"
            )
    return None


class Shard:
    """One tokenised shard of a dataset, mapped into memory on demand. Thread-safe."""

    def __init__(self, dataset: Dataset, record: ShardRecord) -> None:
        self.path = dataset.path / f"{record.name}.tar"
        self.record = record
        self.vocabulary = dataset.vocabulary
        self._kind = np.dtype(f"<u{dataset.token_bytes}")
        self._checked: bytearray | None = None  # per member: 1 if its bytes were found right
        self._seen: Sign | None = None  # of the file in which they were

    def index(self) -> Index:
        """Map the index, its arrays' checksum checked."""
        return read_index(index_path(self.path))

    def open(self) -> OpenShard:
        """Read the index and map the tokens. Members are checked again if the file is not the one they were found
        right in."""
        index = self.index()
        found = (index.header.documents, int(index.piece_length_P.sum(dtype=np.uint64)))
        if found != (self.record.documents, self.record.tokens):
            raise DataError(
                f"{index_path(self.path)}: {found[0]} documents of {found[1]} tokens, and dataset.json has "
                f"{self.record.documents} of {self.record.tokens}. {BUILD_AGAIN}"
            )
        if self._checked is None:
            self._checked = bytearray(index.header.members)
        opened = OpenShard(self.path, index, self._kind, self.vocabulary, self._checked)
        if self._seen != opened.sign:
            opened.forget()
        self._seen = opened.sign
        return opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None, "_seen": None}


MOST_REPLACED = 3
Sign = tuple[int, int, int]
"""Size, time of the last change and inode of a file: while it is the same, so are the bytes."""


def sign_of(path: Path) -> Sign:
    found = os.stat(path)  # noqa: PTH116  # half the time of Path.stat, after each batch and for every shard
    return found.st_size, found.st_mtime_ns, found.st_ino


class OpenShard:
    """A mapped shard: its tokens as one array, and the checks of each member on first touch.

    Attributes:
        tokens: the tar itself seen as tokens, headers and all.
        token_buffer: the same, for slices.
        vocabulary: how many ids there are.
        checked: per member, 1 if its bytes were found right.
        sign: of the file that is mapped.
    """

    def __init__(
        self, path: Path, index: Index, kind: np.dtype[Any], vocabulary: int, checked: bytearray
    ) -> None:
        self.path, self.index, self.vocabulary, self.checked = path, index, vocabulary, checked
        self._kind, self._item = kind, kind.itemsize
        self._is_gone, self._replaced = False, 0
        self._map()

    def _map(self) -> None:
        self.sign = sign_of(self.path)  # before the mapping: a change in between is a change
        tar = map_file(self.path)
        wanted = self.index.header.tar_bytes
        if len(tar) != wanted:
            state = "truncated" if len(tar) < wanted else "grown"
            raise DataError(
                f"{self.path}: {state} since it was opened: {len(tar)} bytes, not {wanted}. {BUILD_AGAIN}"
            )
        if probe(tar).hex() != self.index.header.probe:
            raise DataError(_what_differs(self.path))
        self._tar = memoryview(tar)
        whole = len(tar) // self._item * self._item
        self.tokens = np.frombuffer(self._tar[:whole], self._kind)
        self.token_buffer = self.tokens.data

    def has_changed(self) -> bool:
        """Whether the file is another than the one that is mapped, or was written to. One that was removed still is
        what it was, here: that is told once."""
        if self._is_gone:
            return False
        try:
            now = sign_of(self.path)
            if now[:2] != self.sign[:2]:
                return True
            # What is mapped is the old file, as it was. There are storages whose inodes mean nothing: a shard that is
            # replaced by one of the same size and time again and again is not followed any more.
            self._replaced += now != self.sign
            return now != self.sign and self._replaced <= MOST_REPLACED
        except FileNotFoundError:
            self._is_gone = True
            logger.warning(
                "%s: removed while it is read; this process has it still, the next one will not", self.path
            )
        except OSError:  # a storage that is away for a moment says nothing about the bytes
            pass
        return False

    def follow(self) -> None:
        """Map the file again as it is now, and have all members checked again.

        Raises:
            DataError: it is not the shard that the index is of.
        """
        self._map()
        self.forget()

    def forget(self) -> None:
        """Have all members checked again."""
        self.checked[:] = bytes(len(self.checked))

    def piece_members(self) -> np.ndarray:
        """Which member each piece lies in. (P,) int32."""
        begins = self.index.data_offset_N // np.uint64(self._item)
        return (np.searchsorted(begins, self.index.piece_start_P, side="right") - 1).astype(np.int32)

    def check(self, member: int) -> None:
        """Compare a tokens member, and the lengths before it in its sample, with the index's checksums;
        `checked` remembers which were right.

        Raises:
            DataError: a byte of a header or of the data is not what it was, with shard, member and offset.
        """
        self._check_member(member - 1)
        if not self.checked[member]:
            self._check_member(member)
            self._check_ids(member)

    def _check_member(self, member: int) -> None:
        if member < 0 or self.checked[member]:
            return
        damage = member_damage(self._tar, self.index, member)
        if damage:
            raise DataError(f"{self.path}: {damage}. {BUILD_AGAIN}")
        self.checked[member] = 1

    def _check_ids(self, member: int) -> None:
        begin = int(self.index.data_offset_N[member]) // self._item
        ids = self.tokens[begin : begin + int(self.index.size_N[member]) // self._item]
        if len(ids) and int(ids.max()) >= self.vocabulary:
            self.checked[member] = 0
            raise DataError(
                f"{self.path}: member {member}: id {int(ids.max())} is outside of the vocabulary of {self.vocabulary} "
                f"ids. {BUILD_AGAIN}"
            )
