"""A tokenised dataset: a folder with `dataset.json`, shards and their indices.

Opening checks that every file is there and is the one that `dataset.json` was written for; member checksums
are checked when a member is read for the first time.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.index import Index, index_path, map_file, probe, read_header, read_index
from data_pipelines.shards import ShardRecord
from data_pipelines.tarwalk import crc32

FORMAT = "triptych-tokens"
VERSION = 1
BUILD_AGAIN = "Copy it again from its origin, or build the dataset again with `triptych data build`."


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
    (folder / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")
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
            f"{folder}: no such dataset folder. `{shlex.join(['triptych', 'data', 'demo', '--out', str(folder)])}` "
            "makes one to try; `triptych data build --help` says how to make one from your text."
        )
    if not path.is_file():
        raise DataError(
            f"{path}: missing, so {folder} is not a tokenised dataset. `triptych data build "
            "--help` says how to make one from text, `triptych data tokenize --help` from raw shards."
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
        splits = {
            name: Split.of([ShardRecord(**shard) for shard in split["shards"]])
            for name, split in content["splits"].items()
        }
        return Dataset(
            folder,
            splits,
            content["tokenizer"],
            int(content["token_bytes"]),
            content["fingerprint"],
            content.get("ranges"),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error!r}). {BUILD_AGAIN}") from None


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
            f"`{shlex.join(['triptych', 'data', 'index', str(shard.parent)])}` builds the indices again."
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
    damaged = [problem for n in range(index.header.members) if (problem := member_problem(tar, index, n))]
    if len(damaged) == index.header.members:
        return f"{shard}: this is another shard than the one its index was built from. {BUILD_AGAIN}"
    what = damaged[0] if damaged else "bytes that belong to no member are damaged"
    return f"{shard}: {what}. {BUILD_AGAIN}"


def member_problem(tar: memoryview, index: Index, member: int) -> str | None:
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

    def index(self) -> Index:
        """Map the index, its arrays' checksum checked."""
        return read_index(index_path(self.path))

    def open(self) -> OpenShard:
        """Map index and tokens."""
        index = self.index()
        tar = map_file(self.path)
        if len(tar) != index.header.tar_bytes:
            raise DataError(f"{self.path}: its size changed since it was opened. {BUILD_AGAIN}")
        if probe(tar).hex() != index.header.probe:
            raise DataError(_what_differs(self.path))
        if self._checked is None:
            self._checked = bytearray(index.header.members)
        return OpenShard(self.path, index, memoryview(tar), self._kind, self._checked)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None}


class OpenShard:
    """A mapped shard: its tokens as one array, and the checks of each member on first touch."""

    def __init__(
        self, path: Path, index: Index, tar: memoryview, kind: np.dtype[Any], checked: bytearray
    ) -> None:
        self.path, self.index, self.checked = path, index, checked
        self._tar = tar
        whole = len(tar) // kind.itemsize * kind.itemsize
        self.tokens = np.frombuffer(tar[:whole], kind)  # the tar itself seen as tokens, headers and all
        self.token_buffer = self.tokens.data  # the same, for slices
        self._item = kind.itemsize

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
        self._check_member(member)

    def _check_member(self, member: int) -> None:
        if member < 0 or self.checked[member]:
            return
        problem = member_problem(self._tar, self.index, member)
        if problem:
            raise DataError(f"{self.path}: {problem}. {BUILD_AGAIN}")
        self.checked[member] = 1
