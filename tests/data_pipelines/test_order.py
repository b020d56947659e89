"""Row order, mixing and packing: pure functions of (seed, dataset, mixture, row)."""

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.permutation import permutation
from data_pipelines.rows.cut_rows import RowReader, Source, open_sources, order_fingerprint
from data_pipelines.rows.evaluation import evaluation_batches, evaluation_rows
from data_pipelines.rows.mixing import Mixture, integer_weights, mixing_pattern
from data_pipelines.storage.dataset import Shard, write_dataset
from data_pipelines.storage.shards import TokenShardWriter
from data_pipelines.stream.batch import Batch, Cursor
from data_pipelines.stream.stream import open_stream
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from tests.data_pipelines.helpers import EOT, make_dataset

GOLDEN = Path(__file__).parents[1] / "golden" / "row_order.json"
quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
lengths_lists = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def epoch_by_hand(reader: RowReader, documents: list[np.ndarray], rows: int) -> np.ndarray:
    """The targets of the first rows, built from the parts that `documents` names."""
    out = []
    ended = [np.append(document, EOT) for document in documents]
    for row in range(rows):
        for part in reader.documents(row):
            out.append(ended[part.document][part.first : part.first + part.count])
    return np.concatenate(out)


@given(st.integers(1, 3000), st.integers())
@quick
def test_permutation_holds_each_number_once(count: int, seed: int) -> None:
    order = permutation(count, seed, "shards")
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, permutation(count, seed, "shards"))


@pytest.mark.parametrize(
    ("weights", "whole"),
    [([1e-9, 1], (1, 10_000)), ([1, 1e-12, 1], (5000, 1, 5000)), ([1e-300, 1], (1, 10_000))],
)
def test_tiny_weights_keep_a_share(weights: list[float], whole: tuple[int, ...]) -> None:
    assert integer_weights(weights) == whole
    assert set(Mixture(weights).draws(np.arange(20_000))[0].tolist()) == set(range(len(weights)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
@quick
def test_mixing_counts_are_exact_and_prefixes_deviate_by_less_than_one(weights: list[int]) -> None:
    pattern = mixing_pattern(weights)
    total = sum(weights)
    assert np.bincount(pattern, minlength=len(weights)).tolist() == weights
    steps = np.arange(1, total + 1)
    for source, weight in enumerate(weights):
        off = np.cumsum(pattern == source) * total - steps * weight
        assert np.abs(off).max() < total


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 10**12))
@quick
def test_draws_count_up_without_a_gap_at_any_row(weights: list[int], first: int) -> None:
    mixture = Mixture(weights)
    source, draw = mixture.draws(np.arange(first, first + 100))
    for number in set(source.tolist()):
        mine = draw[source == number]
        assert np.array_equal(np.diff(mine), np.ones(len(mine) - 1))
    if first == 0:
        assert draw.min() == 0


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ((0.7, 0.2, 0.1), (7, 2, 1)),
        ((4, 2), (2, 1)),
        ((1 / 3, 2 / 3), (1, 2)),
        ((0.1234567, 0.8765433), (247, 1753)),
        ((5,), (1,)),
    ],
)
def test_float_weights_become_integers(weights: tuple[float, ...], wanted: tuple[int, ...]) -> None:
    assert integer_weights(weights) == wanted


@pytest.mark.parametrize("weights", [(), (0, 1), (-1.0,), (float("nan"),), (float("inf"), 1)])
def test_bad_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="weight"):
        integer_weights(weights)


def scored(batch: Batch) -> list[tuple[int, int, int]]:
    """(position, input, target) of every token that counts, in order."""
    where = batch.weights.flatten()
    columns = (batch.positions, batch.tokens, batch.targets)
    return list(zip(*(column.flatten()[where].tolist() for column in columns), strict=True))


@given(lengths_lists, st.integers(1, 40), st.integers(0, 5), st.integers(1, 3), st.booleans(), st.booleans())
@quick
def test_each_epoch_serves_each_token_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    length: int,
    seed: int,
    window: int,
    shuffle: bool,
    shuffle_rows: bool,
) -> None:
    folder = tmp_path_factory.mktemp("data")
    documents = make_dataset(folder, lengths, shard_bytes=160, seed=seed)
    reader = RowReader(open_sources([Source(folder)]), length, seed, window, shuffle, shuffle_rows)
    total = sum(lengths) + len(lengths)
    rows = -(-3 * total // length)
    seen: Counter[tuple[int, int, int]] = Counter()
    for row in range(rows):
        for part in reader.documents(row):
            seen.update((part.epoch, part.document, part.first + i) for i in range(part.count))
    for epoch in range(3):
        for document, size in enumerate(lengths):
            assert all(seen[epoch, document, token] == 1 for token in range(size + 1))
    batch = reader.batch(range(rows))
    assert batch.weights.all(), "every token of a row of text is scored"
    assert np.array_equal(batch.targets.flatten().numpy(), epoch_by_hand(reader, documents, rows))


@given(lengths_lists, st.integers(1, 50), st.integers(0, 3), st.booleans())
@quick
def test_each_token_is_predicted_from_the_one_before_it_in_its_document(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, seed: int, shuffle_rows: bool
) -> None:
    folder = tmp_path_factory.mktemp("data")
    documents = make_dataset(folder, lengths, shard_bytes=200, seed=seed)
    reader = RowReader(open_sources([Source(folder)]), length, seed, shuffle_rows=shuffle_rows)
    batch = reader.batch(range(3, 9))
    for place, row in enumerate(range(3, 9)):
        wanted = []
        for number, part in enumerate(reader.documents(row)):
            whole = [EOT, *documents[part.document].tolist(), EOT]
            for i in range(part.count):
                wanted.append((whole[part.first + i], whole[part.first + i + 1], number, i))
        columns = (batch.tokens, batch.targets, batch.segment_ids, batch.positions)
        found = list(zip(*(column[place].tolist() for column in columns), strict=True))
        assert found == wanted
    kinds = [batch.tokens.dtype, batch.targets.dtype, batch.weights.dtype, batch.segment_ids.dtype]
    assert kinds == [torch.int64, torch.int64, torch.bool, torch.int16]
    assert batch.positions.dtype == torch.int16 and batch.rows.tolist() == list(range(3, 9))


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12),
    st.integers(1, 20),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 5),
)
@quick
def test_an_epoch_over_ranks_and_a_resume_scores_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, world: int, stop: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    documents = make_dataset(folder, lengths, shard_bytes=90, seed=3)
    reader = RowReader(open_sources([Source(folder)]), length, 5, window_shards=2)
    total = sum(lengths) + len(lengths)
    epochs = length * world // np.gcd(total, length * world)  # the first end of a step that ends an epoch
    steps = int(epochs * total // (length * world))
    found: Counter[tuple[int, int]] = Counter()
    for first, count in ((0, min(stop, steps)), (min(stop, steps), steps)):
        start = Cursor(first * world, reader.fingerprint)
        for rank in range(world):
            with open_stream(reader, world, rank, world, start, steps=count - first) as stream:
                for batch in stream:
                    found.update((i, t) for _, i, t in scored(batch))
    wanted: Counter[tuple[int, int]] = Counter()
    for document in documents:
        whole = [EOT, *document.tolist(), EOT]
        wanted.update(itertools.pairwise(whole))
    assert found == Counter({pair: int(epochs) * count for pair, count in wanted.items()})


def test_the_rows_of_one_long_document_do_not_follow_each_other(tmp_path: Path) -> None:
    make_dataset(tmp_path, [4095])
    sources = open_sources([Source(tmp_path)])
    order = [RowReader(sources, 64, 0).documents(row)[0].first // 64 for row in range(192)]
    assert sorted(order[:64]) == sorted(order[64:128]) == list(range(64))
    assert order[:64] != order[64:128]
    assert sum(b == a + 1 for a, b in itertools.pairwise(order[:64])) < 8
    plain = RowReader(sources, 64, 0, shuffle_rows=False)
    assert [plain.documents(row)[0].first // 64 for row in range(64)] == list(range(64))


def test_a_checkpoint_of_rows_that_left_first_tokens_out_is_refused_with_the_reason(tmp_path: Path) -> None:
    make_dataset(tmp_path, [40, 50])
    reader = RowReader(open_sources([Source(tmp_path)]), 16, 0)
    settings = {"weights": [1], "sequence_length": 16, "seed": 0, "window_shards": 16, "shuffle": True}
    old = order_fingerprint({"order": 1}, reader.sources, settings)
    with pytest.raises(DataError, match="first token of a document was never predicted"):
        open_stream(reader, 4, start=Cursor(8, old))


@pytest.mark.parametrize("length", [2**15, 2**15 + 1])
def test_places_in_rows_of_any_length_fit_their_type(tmp_path: Path, length: int) -> None:
    make_dataset(tmp_path, [3, 2 * length])
    batch = RowReader(open_sources([Source(tmp_path)]), length, 0).batch(range(3))
    assert batch.positions.max() == length - 1 and batch.positions.min() == 0
    assert batch.positions.dtype == batch.segment_ids.dtype
    assert batch.segment_ids.min() == 0


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12), st.integers(0, 3))
@quick
def test_a_row_does_not_depend_on_the_rows_beside_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], seed: int
) -> None:
    root = tmp_path_factory.mktemp("data")
    make_dataset(root / "a", [5, 17, 40, 3, 9], shard_bytes=60, seed=1)
    make_dataset(root / "b", [30, 2, 2, 8], shard_bytes=60, seed=2)
    sources = open_sources([Source(root / "a", 3), Source(root / "b", 2)])
    reader = RowReader(sources, 13, seed, window_shards=2)
    together = reader.batch(rows)
    for place, row in enumerate(rows):
        alone = RowReader(sources, 13, seed, window_shards=2).batch([row])
        for field in ("tokens", "targets", "weights", "segment_ids", "positions"):
            assert torch.equal(getattr(together, field)[place], getattr(alone, field)[0])


def test_sources_are_mixed_exactly(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [50] * 20)
    make_dataset(tmp_path / "b", [50] * 3)
    reader = RowReader(open_sources([Source(tmp_path / "a", 0.75), Source(tmp_path / "b", 0.25)]), 10, 0)
    first = [reader.documents(row)[0].source for row in range(400)]
    assert Counter(first) == {0: 300, 1: 100}


def test_a_document_longer_than_a_member_stays_whole(tmp_path: Path) -> None:
    documents = make_dataset(tmp_path, [600_000, 10, 262_143, 262_144, 5], seed=3)
    reader = RowReader(open_sources([Source(tmp_path)]), 1000, seed=1)
    total = sum(len(d) + 1 for d in documents)
    rows = total // 1000
    batch = reader.batch(range(rows))
    assert np.array_equal(batch.targets.flatten().numpy(), epoch_by_hand(reader, documents, rows))
    # Rows of one document alone: what is before a row is the document's token before, also at a member's border.
    for place, row in enumerate(range(rows)):
        part = reader.documents(row)[0]
        before = EOT if part.first == 0 else documents[part.document][part.first - 1]
        assert int(batch.tokens[place, 0]) == before


@given(lengths_lists, st.integers(1, 30), st.integers(1, 4), st.sampled_from([1, 2, 3]))
@quick
def test_evaluation_scores_each_target_once_on_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, rows: int, world: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    documents = make_dataset(folder, lengths, shard_bytes=100)
    sources = open_sources([Source(folder)])
    ranks = [list(evaluation_batches(sources, length, rows, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for group in zip(*ranks, strict=True) for batch in group]
    found = [(token, target) for batch in batches for _, token, target in scored(batch)]
    ended = [[EOT, *document.tolist(), EOT] for document in documents]
    assert found == [pair for document in ended for pair in itertools.pairwise(document)]
    assert all(batch.tokens.shape == (rows, length) for batch in batches)
    assert sum(int((b.weights.sum(1) > 0).sum()) for b in batches) <= evaluation_rows(sources, length)


def test_evaluation_can_be_limited(tmp_path: Path) -> None:
    make_dataset(tmp_path, [50] * 10)
    batches = list(evaluation_batches(open_sources([Source(tmp_path)]), 10, 4, limit_rows=6))
    assert [int((b.weights.sum(1) > 0).sum()) for b in batches] == [4, 2]


def test_row_order_is_pinned(tmp_path: Path) -> None:
    """Frozen: a change breaks the resume of every run. Raise `order` in the fingerprint if it must be."""
    make_dataset(tmp_path / "a", [7, 30, 2, 19, 44, 11, 5, 23], shard_bytes=60, seed=1)
    make_dataset(tmp_path / "b", [13, 13, 40], shard_bytes=60, seed=2)
    sources = open_sources([Source(tmp_path / "a", 2), Source(tmp_path / "b", 1)])
    reader = RowReader(sources, 16, seed=1234, window_shards=2)
    parts = [[list(vars(part).values()) for part in reader.documents(row)] for row in range(200)]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    golden = json.loads(GOLDEN.read_text())
    assert digest == golden["documents_sha256"] and parts[:3] == golden["first_rows"]
    assert reader.fingerprint == golden["fingerprint"]


def test_later_epochs_do_not_open_the_shards_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = Shard.open

    def counted(shard: Shard) -> Any:
        opened.append(shard.path.name)
        return original(shard)

    monkeypatch.setattr(Shard, "open", counted)
    documents = make_dataset(tmp_path, [20] * 30, shard_bytes=300)
    reader = RowReader(open_sources([Source(tmp_path)]), 63, seed=0)
    epochs = reader.batch(range(100)).targets.numpy().reshape(-1)
    assert len(epochs) == 10 * sum(len(document) + 1 for document in documents)
    assert len(opened) == len(set(opened)) > 1
    assert not np.array_equal(epochs[:630], epochs[630:1260])


def test_a_document_without_an_end_is_refused(tmp_path: Path) -> None:
    writer = TokenShardWriter(tmp_path, "train", 2, 10**9)
    for ids in ([1, 2, EOT], [3, 4], [5, EOT]):
        writer.write(np.asarray(ids, np.uint16), len(ids))
    write_dataset(tmp_path, {"train": writer.close()}, BytesTokenizer().save(tmp_path))
    reader = RowReader(open_sources([Source(tmp_path)]), 7, 0, shuffle=False)
    with pytest.raises(
        DataError, match=r"train-000000.tar: a document does not end with the end-of-text token 256"
    ):
        reader.batch([0])
