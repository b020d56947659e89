"""The batch stream: the same for any ranks, workers, prefetch depth, and from any cursor."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.rows.cut_rows import RowReader, Source, open_sources
from data_pipelines.stream.batch import Cursor
from data_pipelines.stream.stream import open_stream
from tests.data_pipelines.helpers import FIELDS, joined, make_dataset, same

quick = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> RowReader:
    root = tmp_path_factory.mktemp("stream")
    make_dataset(root / "a", [5, 17, 40, 3, 9, 100], shard_bytes=80, seed=1)
    make_dataset(root / "b", [30, 2, 2, 8], shard_bytes=60, seed=2)
    sources = open_sources([Source(root / "a", 3), Source(root / "b", 1)])
    return RowReader(sources, 12, seed=7, window_shards=2)


def collect(reader: RowReader, rows: int, steps: int, **options: Any) -> list[Any]:
    with open_stream(reader, rows, steps=steps, **options) as stream:
        return list(stream)


@given(world=st.sampled_from([1, 2, 3, 4, 6, 12]), prefetch=st.integers(1, 5))
@quick
def test_ranks_together_serve_the_rows_of_one(reader: RowReader, world: int, prefetch: int) -> None:
    alone = collect(reader, 12, 3)
    ranks = [collect(reader, 12, 3, rank=r, world=world, prefetch=prefetch) for r in range(world)]
    for step, whole in enumerate(alone):
        parts = [batches[step] for batches in ranks]
        assert all(torch.equal(joined(parts)[field], getattr(whole, field)) for field in FIELDS)
        assert {part.cursor for part in parts} == {whole.cursor}
        assert whole.cursor.row == (step + 1) * 12


@pytest.mark.parametrize(("workers", "prefetch", "world"), [(1, 3, 1), (2, 1, 2)])
def test_worker_processes_change_nothing(reader: RowReader, workers: int, prefetch: int, world: int) -> None:
    plain = collect(reader, 8, 5, world=world, rank=world - 1)
    worked = collect(reader, 8, 5, world=world, rank=world - 1, workers=workers, prefetch=prefetch)
    assert len(plain) == len(worked) == 5
    assert all(same(a, b) for a, b in zip(plain, worked, strict=True))


@given(stop=st.integers(0, 6), rows=st.sampled_from([1, 4, 6]), world=st.sampled_from([1, 2]))
@quick
def test_a_resume_from_any_cursor_equals_the_uninterrupted_stream(
    reader: RowReader, stop: int, rows: int, world: int
) -> None:
    rows *= world
    whole = collect(reader, rows, 7, world=world)
    before = collect(reader, rows, stop, world=world)
    cursor = Cursor.from_dict(before[-1].cursor.to_dict()) if before else None
    after = collect(reader, rows, 7 - stop, world=world, start=cursor)
    assert all(same(a, b) for a, b in zip(whole, before + after, strict=True))


def test_a_resume_on_another_number_of_ranks_and_rows_serves_the_next_rows(reader: RowReader) -> None:
    cursor = collect(reader, 6, 2)[-1].cursor
    ranks = [collect(reader, 8, 2, start=cursor, rank=r, world=2) for r in range(2)]
    served = [row for step in range(2) for batches in ranks for row in batches[step].rows.tolist()]
    assert served == list(range(12, 28))


def test_a_cursor_of_other_data_is_refused(reader: RowReader) -> None:
    other = RowReader(reader.sources, 12, seed=8, window_shards=2)
    cursor = collect(other, 4, 1)[-1].cursor
    with pytest.raises(DataError, match=f"(?s){cursor.fingerprint[:12]}.*{reader.fingerprint[:12]}"):
        open_stream(reader, 4, start=cursor)


@pytest.mark.parametrize("change", [{"row": -1}, {"row": "3"}, {"fingerprint": None}])
def test_a_broken_cursor_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="cursor"):
        Cursor.from_dict({"row": 3, "fingerprint": "x", **change})


def test_rows_that_the_ranks_cannot_share_are_refused(reader: RowReader) -> None:
    with pytest.raises(DataError, match="multiple of 3"):
        open_stream(reader, 8, world=3)


def test_split_gives_micro_batches_as_views(reader: RowReader) -> None:
    batch = reader.batch(range(7))
    parts = batch.split(3)
    assert [len(part.rows) for part in parts] == [3, 3, 1]
    assert all(torch.equal(joined(parts)[field], getattr(batch, field)) for field in FIELDS)
    assert parts[1].tokens.data_ptr() == batch.tokens[3:].data_ptr()
    assert same(batch.to("cpu"), batch)


def test_closing_stops_thread_and_workers(reader: RowReader) -> None:
    before = threading.active_count()
    streams = [open_stream(reader, 4, prefetch=2), open_stream(reader, 4, workers=1)]
    for stream in streams:
        next(stream)
        assert stream.take_wait_seconds() > 0 and stream.take_wait_seconds() == 0
        stream.close()
        assert list(stream) == []
    deadline = time.monotonic() + 20  # a queue of the workers ends its thread when it is scheduled again
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert not multiprocessing.active_children()


def test_workers_outlive_the_signals_that_stop_a_run(reader: RowReader) -> None:
    with open_stream(reader, 4, workers=2, prefetch=1) as stream:
        batches = [next(stream) for _ in range(3)]
        for child in multiprocessing.active_children():
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
                assert child.pid is not None
                os.kill(child.pid, number)
        batches += [next(stream) for _ in range(9)]
    assert [batch.cursor.row for batch in batches] == [4 * step for step in range(1, 13)]


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_reaches_the_consumer_as_it_was_raised(tmp_path: Path, workers: int) -> None:
    make_dataset(tmp_path, [40] * 30)
    reader = RowReader(open_sources([Source(tmp_path)]), 8, seed=0)
    shard = tmp_path / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"tokens.u16") + 700] ^= 1
    shard.write_bytes(data)
    with open_stream(reader, 4, workers=workers) as stream, pytest.raises(DataError) as caught:
        for _ in stream:
            pass
    assert "train-000000.tar" in str(caught.value) and "member 1" in str(caught.value)
