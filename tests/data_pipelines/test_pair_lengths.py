"""The longest pair of all datasets at once; how long targets are, from stored shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.rows.cut_rows import Source, open_sources
from data_pipelines.rows.pair_lengths import refuse_long_pairs, target_lengths
from tests.data_pipelines.helpers import VOCABULARY, make_dataset, make_pairs, pair

V = VOCABULARY
IMAGE = [257, 258, 259, 260]


def audio(frames: int) -> list[int]:
    return [265, 269] * frames


def test_the_longest_pair_of_all_datasets_is_named_at_once(tmp_path: Path) -> None:
    lengths = {}
    for name, made in (("a", [audio(3), audio(20)]), ("b", [audio(40), audio(2)]), ("c", [audio(1)])):
        documents = [pair("text-to-audio", [1, 2], sounds) for sounds in made]
        make_pairs(tmp_path / name, documents)
        lengths[name] = max(map(len, documents))
    make_dataset(tmp_path / "text", [500])
    sources = open_sources([Source(tmp_path / name) for name in ("a", "b", "c", "text")])
    assert lengths == {"a": 47, "b": 87, "c": 9}
    with pytest.raises(DataError) as caught:
        refuse_long_pairs(sources, V, 20)
    message = str(caught.value)
    assert "data.sequence_length = 20" in message and "at least 87 (" in message
    assert f"47 in {tmp_path / 'a'}, 87 in {tmp_path / 'b'} tokens" in message
    assert "b/train-000000.tar (document 0)" in message and "/c" not in message and "/text" not in message
    refuse_long_pairs(sources, V, 87)


def test_target_lengths_are_counted_over_a_whole_split(tmp_path: Path) -> None:
    documents = [
        *(pair("text-to-audio", [1], audio(2)) for _ in range(6)),
        *(pair("text-to-audio", [2, 3], audio(n)) for n in (4, 5)),
        *(pair("image-to-text", IMAGE, [7] * 3 + [256]) for _ in range(3)),
        np.asarray([1, 2, 3, 256]),
    ]
    make_pairs(tmp_path / "pairs", documents)
    make_dataset(tmp_path / "text", [5, 5, 30])
    found = target_lengths(open_sources([Source(tmp_path / name) for name in ("pairs", "text")]), V, row=25)
    assert found.tasks == {
        "text-to-audio": Counter({4: 6, 8: 1, 10: 1}),
        "image-to-text": Counter({4: 3}),
        "text": Counter({6: 3, 4: 1, 25: 1}),  # 31 tokens in pieces of 25
    }
    assert found.by_tokens == {"text-to-audio": {1: Counter({4: 6}), 2: Counter({8: 1, 10: 1})}}
    assert found.by_caption == {"text-to-audio": {(1,): Counter({4: 6})}}, "a rare caption says too little"
