"""Datasets that were damaged or edited: what is read from them is what was written, or an error names the file."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.inspection.lint import lint
from data_pipelines.rows.cut_rows import RowReader, Source, open_sources
from data_pipelines.storage.dataset import _fingerprint
from data_pipelines.storage.index import _HEADER
from data_pipelines.tokens.tokenizer_loading import load_tokenizer
from tests.data_pipelines.helpers import make_dataset
from tests.fuzz.base import Finding, Fuzzer, chosen, mutated, refusals_name, require

LENGTH, ROWS = 16, 40
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    1e400,
    float("nan"),
    "",
    "x",
    "../..",
    [],
    {},
    [[]],
    {"a": None},
)


@cache
def _original() -> Path:
    """One small dataset for all cases of a process; its folder goes with the machine's temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-dataset-")) / "data"
    make_dataset(folder, [30, 7, 1, 120, 64], shard_bytes=300, validation=2)
    return folder


@cache
def _rows() -> torch.Tensor:
    return _read(_original())


def _read(folder: Path) -> torch.Tensor:
    """As training does it: tokenizer, splits, rows of two epochs and more."""
    load_tokenizer(folder)
    open_sources([Source(folder)], split="validation")
    reader = RowReader(open_sources([Source(folder)]), LENGTH, seed=3)
    return reader.batch(range(ROWS)).sequences


def _copied(folder: Path) -> Path:
    shutil.copytree(_original(), folder / "data")
    return folder / "data"


def _check(folder: Path, *, same: bool) -> None:
    """Read it, and lint it, which must come to an end whatever it finds."""
    lint(folder)
    found = _read(folder)
    if same and not torch.equal(found, _rows()):
        raise Finding("other tokens are read than were written, and nothing was said")


def _damaged(pattern: str, seed: int, folder: Path) -> None:
    """Bytes of a file are changed, as a disk or a copy does it."""
    random = np.random.default_rng(seed)
    data = _copied(folder)
    path = chosen(random, sorted(data.glob(pattern)))
    path.write_bytes(mutated(path.read_bytes(), random))
    # What is wrong with an index or a shard may show in the other of the two.
    with refusals_name(path.stem):
        _check(data, same=True)


def description(seed: int, folder: Path) -> None:
    _damaged("dataset.json", seed, folder)


def edited_description(seed: int, folder: Path) -> None:
    """Values of dataset.json are others, and its fingerprint is right for them."""
    random = np.random.default_rng(seed)
    data = _copied(folder)
    content = json.loads((data / "dataset.json").read_text())
    for _ in range(int(random.integers(1, 3))):
        _edit(content, random)
    content["fingerprint"] = _fingerprint(content) if isinstance(content, dict) else None
    (data / "dataset.json").write_text(json.dumps(content))
    with refusals_name(data):
        _check(data, same=False)


def _edit(value: Any, random: np.random.Generator) -> None:
    """Change, remove or add something inside of a JSON value."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = chosen(random, keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and random.random() < 0.8:
            value = inner
            continue
        what = int(random.integers(4))
        if what == 0:
            del value[key]
        elif what == 1 and isinstance(inner, int):
            value[key] = inner + int(random.integers(-3, 4))
        elif what == 2 and isinstance(inner, str):
            value[key] = inner[1:] or "y"
        else:
            value[key] = chosen(random, ODD)
        return


def index(seed: int, folder: Path) -> None:
    _damaged("*.idx", seed, folder)


def forged_index(seed: int, folder: Path) -> None:
    """Numbers in an index are others, and all its checksums are right for them."""
    random = np.random.default_rng(seed)
    data = _copied(folder)
    path = chosen(random, sorted(data.glob("train-*.idx")))
    content = bytearray(path.read_bytes())
    arrays = len(content) - _HEADER.size
    if random.random() < 0.3:
        fields = list(_HEADER.unpack(content[: _HEADER.size]))
        place = int(random.integers(6, 10))  # counts of members, pieces, documents, bytes of extensions
        fields[place] = chosen(random, [0, 1, fields[place] + 1, 2**40, 2**63])
        content[: _HEADER.size] = _HEADER.pack(*fields)
    else:
        place = _HEADER.size + 4 * int(random.integers(arrays // 4))
        content[place : place + 4] = struct.pack(
            "<I", int(random.integers(2**32)) >> int(random.integers(32))
        )
    fields = list(_HEADER.unpack(content[: _HEADER.size]))
    fields[10] = zlib.crc32(content[_HEADER.size :])
    head = _HEADER.pack(*fields)[:-4]
    content[: _HEADER.size] = head + struct.pack("<I", zlib.crc32(head))
    path.write_bytes(content)
    with refusals_name(path.stem):
        _check(data, same=True)


def shard(seed: int, folder: Path) -> None:
    _damaged("*.tar", seed, folder)


def swapped(seed: int, folder: Path) -> None:
    """Files of the dataset stand in the places of others, or are of another dataset."""
    random = np.random.default_rng(seed)
    data = _copied(folder)
    files = sorted(path for path in data.iterdir() if path.suffix in (".tar", ".idx"))
    one, other = chosen(random, files), chosen(random, files)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    if random.random() < 0.5:
        other.write_bytes(content)
    with refusals_name(one.stem, other.stem):
        _check(data, same=True)


def changing(seed: int, folder: Path) -> None:
    """A shard is changed after it was read for the first time, in place or by another file of its name."""
    random = np.random.default_rng(seed)
    data = _copied(folder)
    reader = RowReader(open_sources([Source(data)]), LENGTH, seed=3)
    reader.batch(range(int(random.integers(1, ROWS))))
    path = chosen(random, sorted(data.glob("train-*.tar")))
    content = mutated(path.read_bytes(), random)
    if random.random() < 0.5:
        (folder / "new").write_bytes(content)
        (folder / "new").replace(path)
    elif (
        len(content) >= path.stat().st_size
    ):  # one that is cut short in place ends the process: tested elsewhere
        with path.open("r+b") as file:
            file.write(content)
    with refusals_name(path.stem):
        require(
            torch.equal(reader.batch(range(ROWS)).sequences, _rows()),
            "other tokens are read than were written, and nothing was said",
        )


FUZZERS = [
    Fuzzer("dataset-json", description),
    Fuzzer("dataset-json-edited", edited_description),
    Fuzzer("dataset-index", index),
    Fuzzer("dataset-index-forged", forged_index),
    Fuzzer("dataset-shard", shard),
    Fuzzer("dataset-swapped", swapped),
    Fuzzer("dataset-changing", changing),
]
