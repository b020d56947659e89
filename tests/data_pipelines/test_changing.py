"""Shards that change while they are read: every batch is of bytes that were checked, or an error names the file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.errors import DataError
from data_pipelines.rows.cut_rows import RowReader, Source, open_sources
from data_pipelines.storage.dataset import open_dataset, write_dataset
from data_pipelines.storage.index import index_path, read_index
from data_pipelines.storage.mapped_files import EXIT_DATA_ERROR
from data_pipelines.storage.shards import TokenShardWriter
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from tests.data_pipelines.helpers import make_dataset

SHARD = "train-000000.tar"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_dataset(folder, [3_000] * 100, shard_bytes=200_000, validation=2)
    return folder


@pytest.fixture
def folder(tmp_path: Path, original: Path) -> Path:
    shutil.copytree(original, tmp_path / "data")
    return tmp_path / "data"


def reader(folder: Path) -> RowReader:
    return RowReader(open_sources([Source(folder)]), 256, seed=0)


def overwrite(shard: Path, offset: int, data: bytes) -> None:
    """In place: the file keeps its inode and its size."""
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def data_of(shard: Path, member: int = 1) -> int:
    return int(read_index(index_path(shard)).data_offset_N[member])


def test_bytes_that_are_flipped_after_they_were_read_are_found(folder: Path) -> None:
    rows = reader(folder)
    rows.batch(range(8))
    rows.batch(range(1000))  # all members have been checked
    shards = sorted(folder.glob("train-*.tar"))
    overwrite(shards[1], data_of(shards[1]) + 2000, b"\xff\xff" * 20)
    with pytest.raises(DataError, match=rf"{shards[1].name}: the data of member 1 .* is damaged"):
        rows.batch(range(1000))


def test_a_change_during_the_copy_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipelines.rows import packing

    rows = reader(folder)
    rows.batch(range(1000))
    copy = packing._copy

    def hurt(runs: Any) -> np.ndarray:
        overwrite(folder / SHARD, data_of(folder / SHARD) + 500, b"\x07")
        return copy(runs)

    monkeypatch.setattr(packing, "_copy", hurt)
    with pytest.raises(DataError, match=rf"{SHARD}: the data of member 1"):
        rows.batch(range(1000))


def test_a_shard_that_is_written_to_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipelines.rows import packing

    rows, times = reader(folder), iter(range(1, 100))
    copy = packing._copy

    def touched(runs: Any) -> np.ndarray:
        os.utime(folder / SHARD, ns=(0, next(times) * 10**9))
        return copy(runs)

    monkeypatch.setattr(packing, "_copy", touched)
    with pytest.raises(DataError, match=rf"{SHARD}: it is written to while it is read"):
        rows.batch(range(1000))


def test_the_same_bytes_under_another_time_or_inode_go_on(folder: Path) -> None:
    rows = reader(folder)
    before = rows.batch(range(1000))
    (folder / SHARD).touch()
    shutil.copy(folder / "train-000001.tar", folder / "copy")
    (folder / "copy").replace(folder / "train-000001.tar")
    after = rows.batch(range(1000))
    assert torch.equal(before.sequences, after.sequences)


def test_another_shard_in_its_place(folder: Path) -> None:
    rows = reader(folder)
    rows.batch(range(8))
    shutil.copy(folder / "train-000001.tar", folder / "other")
    (folder / "other").replace(folder / SHARD)
    with pytest.raises(DataError, match=rf"{SHARD}: "):
        rows.batch(range(1000))


def test_a_removed_shard_is_told_and_read_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = reader(folder)
    before = rows.batch(range(1000))
    (folder / SHARD).unlink()
    assert torch.equal(rows.batch(range(1000)).sequences, before.sequences)
    rows.batch(range(1000))
    told = [record for record in caplog.records if "removed while it is read" in record.message]
    assert len(told) == 1 and SHARD in told[0].message


def test_an_index_that_is_cut_after_it_was_read_harms_nothing(folder: Path) -> None:
    rows = reader(folder)
    before = rows.batch(range(1000))
    for path in folder.glob("train-*.idx"):
        os.truncate(path, 10)
    assert torch.equal(rows.batch(range(1000)).sequences, before.sequences)


CUT = """
import os, sys
from pathlib import Path
from tests.data_pipelines.test_changing import SHARD, reader

folder = Path(sys.argv[1])
rows = reader(folder)
rows.batch(range(1000))
if sys.argv[2] == "fork" and os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
os.truncate(folder / SHARD, int(sys.argv[3]))
rows.batch(range(1000))
print("read on")
"""


@pytest.mark.parametrize("how", ["here", "fork"])
@pytest.mark.parametrize("size", [0, 50_000])
def test_a_shard_that_is_cut_short_is_named_and_the_process_ends(folder: Path, how: str, size: int) -> None:
    command = [sys.executable, "-c", CUT, str(folder), how, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_DATA_ERROR, done
    assert done.stderr.startswith(f"error: {folder / SHARD}: truncated while it was read: {size} bytes of ")
    assert "Traceback" not in done.stderr and "read on" not in done.stdout


def test_another_bus_error_stays_one() -> None:
    code = "from data_pipelines.storage.mapped_files import map_file\nfrom pathlib import Path\nimport os, signal\n"
    code += "map_file(Path('pyproject.toml'))\nos.kill(os.getpid(), signal.SIGBUS)\nos.kill(os.getpid(), signal.SIGBUS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -7 and "truncated" not in done.stderr


def test_ids_beyond_the_vocabulary_are_found_when_a_member_is_checked(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    writer = TokenShardWriter(tmp_path / "data", "train", 2, 64_000_000)
    for _ in range(4):
        ids = np.arange(100, dtype=np.uint16)
        ids[50] = 300  # with a right checksum: whoever built it was wrong
        writer.write(ids, 100)
    write_dataset(tmp_path / "data", {"train": writer.close()}, BytesTokenizer().save(tmp_path))
    open_dataset(tmp_path / "data")
    rows = RowReader(open_sources([Source(tmp_path / "data")]), 16, seed=0)
    with pytest.raises(
        DataError, match="train-000000.tar: member 1: id 300 is outside of the vocabulary of 257"
    ):
        rows.batch(range(8))
