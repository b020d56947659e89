"""Rows of whole documents: what is in them, their order, and what is refused."""

import hashlib
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.rows.best_fit import best_fit, count_rows
from data_pipelines.rows.cut_rows import RowReader, Source, open_sources
from data_pipelines.rows.shared_vocabulary import vocabulary_of
from data_pipelines.rows.whole_rows import WholeEvaluation, WholeRowReader
from data_pipelines.storage.dataset import write_dataset
from data_pipelines.storage.shards import TokenShardWriter
from data_pipelines.stream.batch import Batch
from data_pipelines.stream.stream import open_stream
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.vocabulary import Modality, Vocabulary
from tests.data_pipelines.helpers import EOT, VOCABULARY, joined, make_dataset, make_pairs, pair, same

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
V = VOCABULARY
IMAGE = [257, 258, 259, 260]


def picture(letter: int, code: int = 0) -> np.ndarray:
    """A pair of 11 tokens."""
    return pair("text-to-image", [letter, EOT], [257 + code, *IMAGE[1:]])


def read_back(batch: Batch) -> list[list[list[int]]]:
    """The documents of each row, by segments, padding left out."""
    rows = []
    for tokens, weights, segments in zip(batch.tokens, batch.weights, batch.segment_ids, strict=True):
        there = segments[weights].tolist()
        rows.append([tokens[(segments == n) & weights].tolist() for n in dict.fromkeys(there)])
    return rows


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), capacity=st.integers(30, 40))
@quick
def test_best_fit_overlaps_nothing_and_leaves_no_row_that_another_could_take(
    lengths: list[int], capacity: int
) -> None:
    pattern = best_fit(np.asarray(lengths), capacity)
    ordered = sorted(lengths, reverse=True)
    assert pattern.rows == count_rows(np.asarray(lengths), capacity) == len(set(pattern.row_S.tolist()))
    assert pattern.row_S.max() == pattern.rows - 1
    filled: Counter[int] = Counter()
    for length, row, place in zip(ordered, pattern.row_S.tolist(), pattern.place_S.tolist(), strict=True):
        # The item stands where its row was filled to, and no row that was as full or fuller had room for it.
        assert place == filled[row] and place + length <= capacity
        fits = [used for used in filled.values() if used + length <= capacity]
        assert place == max(fits, default=0)
        filled[row] += length


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    shard_bytes=st.sampled_from([60, 200, 10**9]),
    window=st.integers(1, 3),
    shuffle=st.booleans(),
)
@quick
def test_every_document_appears_once_per_epoch(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_bytes: int, window: int, shuffle: bool
) -> None:
    root = tmp_path_factory.mktemp("whole")
    documents = make_dataset(root, lengths, shard_bytes)
    reader = WholeRowReader(open_sources([Source(root)]), 16, 3, window_shards=window, shuffle=shuffle)
    (rows,) = reader.rows_per_epoch
    wanted: Counter[tuple[int, ...]] = Counter()
    for document in documents:
        whole = [*document.tolist(), EOT]
        wanted.update(tuple(whole[i : i + 16]) for i in range(0, len(whole), 16))
    for epoch in range(2):
        batch = reader.batch(range(epoch * rows, (epoch + 1) * rows))
        found = Counter(tuple(document) for row in read_back(batch) for document in row)
        assert found == wanted
        parts = [part for row in range(epoch * rows, (epoch + 1) * rows) for part in reader.documents(row)]
        assert sum(part.count for part in parts) == sum(map(len, documents)) + len(documents)
        assert {part.epoch for part in parts} == {epoch}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    root = tmp_path_factory.mktemp("sources")
    make_pairs(root / "pairs", [picture(n) for n in range(30)], shard_bytes=150)
    make_dataset(root / "text", [3, 9, 40, 1, 7, 15] * 4, shard_bytes=150)
    return open_sources([Source(root / "pairs", 2), Source(root / "text", 1)])


def test_the_tensors_of_a_row(sources: list[Any]) -> None:
    reader = WholeRowReader(sources, 30, 1)
    batch = reader.batch(range(12))
    assert batch.sequences.shape == (12, 31) and batch.sequences[:, -1].eq(V.pad).all()
    assert torch.equal(batch.weights, batch.tokens != V.pad)
    steps = batch.segment_ids.diff(dim=1)
    assert set(steps.unique().tolist()) <= {0, 1}
    starts = torch.cat([torch.ones(12, 1, dtype=torch.bool), steps == 1], dim=1)
    assert torch.equal(batch.positions == 0, starts)
    for row, documents in enumerate(read_back(batch)):
        parts = reader.documents(row)
        assert [part.count for part in parts] == [len(document) for document in documents]
        # The padding of a row is a segment of its own.
        assert batch.segment_ids[row].max() + 1 == len(parts) + int(not batch.weights[row].all())


def test_rows_are_a_function_of_their_numbers(sources: list[Any]) -> None:
    reader, other = WholeRowReader(sources, 30, 1), WholeRowReader(sources, 30, 2)
    whole = reader.batch(range(100))
    mixed = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    again = pickle.loads(pickle.dumps(reader)).batch(mixed.tolist())
    assert torch.equal(again.sequences, whole.sequences[mixed])
    assert torch.equal(again.segment_ids, whole.segment_ids[mixed])
    assert not torch.equal(other.batch(range(100)).sequences, whole.sequences)
    assert other.fingerprint != reader.fingerprint
    (a, b) = reader.rows_per_epoch
    epochs = [reader.batch(range(3 * max(a, b) * n, 3 * max(a, b) * n + 20)).sequences for n in (0, 1)]
    assert not torch.equal(*epochs)


def test_the_stream_serves_whole_rows(sources: list[Any]) -> None:
    reader = WholeRowReader(sources, 30, 1)
    with open_stream(reader, 6, steps=3) as stream:
        whole = list(stream)
    ranks = []
    for rank in range(2):
        with open_stream(reader, 6, rank=rank, world=2, workers=rank, steps=3) as stream:
            ranks.append(list(stream))
    for step in range(3):
        both = joined([ranks[0][step], ranks[1][step]])
        assert torch.equal(both["tokens"], whole[step].tokens)
        assert torch.equal(both["weights"], whole[step].weights)


def test_mixture_and_padding_are_told(sources: list[Any]) -> None:
    reader = WholeRowReader(sources, 30, 1)
    drawn = Counter(reader.documents(row)[0].source for row in range(30))
    assert drawn == {0: 20, 1: 10}
    pairs, text = reader.padding_shares
    # Two pairs of 11 tokens to a row, but a shard's rows hold its own: 7 pairs make four rows.
    rows = reader.rows_per_epoch[0]
    assert pairs == pytest.approx(1 - 30 * 11 / (rows * 30)) and 15 <= rows <= 18
    assert reader.padding_share == pytest.approx((2 * pairs + text) / 3)


def test_evaluation_shows_each_document_once_in_stored_order(sources: list[Any]) -> None:
    evaluation = WholeEvaluation(sources[:1], 12)
    batches = list(evaluation.batches(7))
    shown = [document for batch in batches for row in read_back(batch) for document in row]
    assert [document[2] for document in shown] == list(range(30))
    assert [len(batch.rows) for batch in batches] == [7] * 5 and evaluation.rows == 30
    assert batches[-1].weights[2:].sum() == 0 and batches[-1].sequences[2:].eq(V.pad).all()


@pytest.mark.parametrize("limit", [None, 7, 2])
def test_ranks_share_an_evaluation(sources: list[Any], limit: int | None) -> None:
    alone = list(WholeEvaluation(sources, 30, limit).batches(100))
    assert len(alone) == 1
    ranks = [list(WholeEvaluation(sources, 30, limit).batches(4, rank, 3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    by_row = sorted(
        (row, document)
        for batches in ranks
        for batch in batches
        for row, documents in zip(batch.rows.tolist(), read_back(batch), strict=True)
        for document in documents
    )
    whole = zip(alone[0].rows.tolist(), read_back(alone[0]), strict=True)
    assert by_row == sorted((row, document) for row, documents in whole for document in documents)
    tasks = {document[0] == V.task("text-to-image") for _, document in by_row}
    assert tasks == {True, False}, "each source has its share of a limited evaluation"


def test_longer_text_is_cut_and_longer_pairs_are_refused(tmp_path: Path) -> None:
    long = pair("image-to-text", IMAGE, range(41))
    make_pairs(tmp_path / "a", [picture(1), np.arange(50), long])
    opened = open_sources([Source(tmp_path / "a")])
    with pytest.raises(DataError, match="train-000000.tar: document 2 is a pair of 50 tokens.*at least 50"):
        WholeRowReader(opened, 49, 0)
    reader = WholeRowReader(opened, 50, 0)
    assert reader.rows_per_epoch == [3]


def bad_documents() -> list[tuple[Sequence[int] | np.ndarray, str]]:
    v = V
    task, caption = v.task("image-to-text"), [v.begin("text"), 5, v.end("text")]
    image = [v.begin("image"), *IMAGE, v.end("image")]
    sound = lambda codes: pair("audio-to-text", codes, [5])  # noqa: E731
    return [
        ([task, *image], "document 1 is an image without its caption"),
        ([v.task("text-to-audio"), *caption], "document 1 is a text without its audio"),
        ([task, *caption, *image], "document 1 is no pair"),
        ([5, task, *image, *caption], "document 1 is no pair"),
        ([task, *image, 7, *caption], "document 1 is no pair"),
        ([*image, *caption], "has 4 specials"),
        (pair("image-to-text", IMAGE, []), "its text has 0 tokens"),
        (pair("image-to-text", IMAGE[:3], [5]), r"its image has 3 tokens, not 4 tokens \(2 x 2\)"),
        (pair("image-to-text", [*IMAGE[:3], 7], [5]), "id 7 in its image part.*is not one of 257 to 264"),
        (pair("image-to-text", IMAGE, [260]), "id 260 in its text part"),
        (pair("image-to-text", IMAGE, [v.mask]), "has 6 specials"),
        (sound([265]), "its audio has 1 tokens, not a multiple of 2"),
        (sound([265, 266]), "id 266 in its audio part, at its token 1, is not one of 269 to 272"),
        ([5, 260, EOT], "id 260 is outside of the text vocabulary"),
        ([5, v.size, EOT], f"id {v.size} is outside of the vocabulary"),
    ]


@pytest.mark.parametrize(("document", "message"), bad_documents())
def test_documents_that_the_vocabulary_does_not_allow(
    tmp_path: Path, document: Sequence[int] | np.ndarray, message: str
) -> None:
    good = [picture(1), pair("audio-to-text", [265, 270], [5, EOT])]
    make_pairs(tmp_path / "a", [good[0], np.asarray(document), good[1]])
    reader = WholeRowReader(open_sources([Source(tmp_path / "a")]), 30, 0)
    with pytest.raises(DataError, match=f"train-000000.tar: .*{message}"):
        reader.batch(range(3))


def test_good_documents_of_all_kinds_pass(tmp_path: Path) -> None:
    make_pairs(
        tmp_path / "a", [picture(1), np.asarray([5, EOT]), pair("audio-to-text", [265, 270], [5, EOT])]
    )
    reader = WholeRowReader(open_sources([Source(tmp_path / "a")]), 30, 0)
    assert sum(len(row) for row in read_back(reader.batch(range(reader.rows_per_epoch[0])))) == 3


def test_text_with_ids_outside_of_its_tokenizer(tmp_path: Path) -> None:
    writer = TokenShardWriter(tmp_path, "train", 2, 10**9)
    writer.write(np.asarray([5, EOT], np.uint16), 1)
    writer.write(np.asarray([300, EOT], np.uint16), 1)
    write_dataset(tmp_path, {"train": writer.close()}, BytesTokenizer().save(tmp_path))
    reader = WholeRowReader(open_sources([Source(tmp_path)]), 30, 0)
    with pytest.raises(DataError, match="member 1: id 300 is outside of the vocabulary of 257"):
        reader.batch([0])


def test_damage_is_found_on_first_touch(tmp_path: Path) -> None:
    make_dataset(tmp_path, [60] * 300)
    reader = WholeRowReader(open_sources([Source(tmp_path)]), 64, 0)
    shard = tmp_path / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"tokens.u16") + 9000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="member 1"):
        reader.batch([0])


def test_sources_of_different_vocabularies_are_refused(tmp_path: Path) -> None:
    other = Vocabulary(text=V.text, eot=EOT, image=Modality("image", 257, 8, "other", grid=(2, 2)))
    make_pairs(tmp_path / "a", [picture(1)])
    make_pairs(tmp_path / "b", [pair("text-to-image", [5], IMAGE, other)], vocabulary=other)
    with pytest.raises(DataError, match="different vocabularies"):
        vocabulary_of(open_sources([Source(tmp_path / "a"), Source(tmp_path / "b")]))
    other.save(tmp_path / "a")
    with pytest.raises(DataError, match="vocabulary.json: not the one that dataset.json was written for"):
        vocabulary_of(open_sources([Source(tmp_path / "a")]))


def test_text_alone_has_a_vocabulary_too(tmp_path: Path) -> None:
    make_dataset(tmp_path, [5])
    found = vocabulary_of(open_sources([Source(tmp_path)]))
    assert found.size == 257 + 12 and found.eot == EOT and found.tasks() == []


def test_pairs_are_not_read_as_plain_text(sources: list[Any]) -> None:
    with pytest.raises(DataError, match="a dataset of pairs"):
        RowReader(sources, 30, 0)


def test_equal_readers_have_equal_batches(sources: list[Any]) -> None:
    assert same(WholeRowReader(sources, 30, 1).batch([5, 2]), WholeRowReader(sources, 30, 1).batch([5, 2]))


def test_the_order_of_rows_is_frozen(sources: list[Any]) -> None:
    """Whoever changes it must raise `whole_order`, or a run that goes on would see other rows."""
    batch = WholeRowReader(sources, 30, 1).batch(range(200))
    assert hashlib.sha256(batch.sequences.numpy().tobytes()).hexdigest()[:16] == "de4a9172e9e63171"
