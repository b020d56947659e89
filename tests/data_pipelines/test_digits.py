"""The digits demo: its data, its splits and its judges."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.digits.build import DigitOptions, build_digits
from data_pipelines.digits.images import MODERATE, WEAK, augment, load_digits
from data_pipelines.digits.judges import ImageJudge, nearest_neighbour_distance, within_class_distance
from data_pipelines.digits.sentences import (
    WORDS,
    facts,
    is_number_word,
    is_sentence,
    is_true_sentence,
    split_facts,
)
from data_pipelines.digits.tones import NO_DIGIT, SAMPLE_RATE, detect_digit, make_tones
from data_pipelines.errors import DataError
from data_pipelines.inspection.lint import lint
from data_pipelines.rows.cut_rows import Source, open_sources
from data_pipelines.rows.shared_vocabulary import vocabulary_of
from data_pipelines.rows.whole_rows import WholeEvaluation, WholeRowReader
from data_pipelines.tokens.modalities import load_modalities
from data_pipelines.tokens.vocabulary import TASKS
from tests.data_pipelines.test_whole_rows import read_back

Demo = tuple[Path, dict[str, Any]]
"""The folder, and the built datasets by name."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("digits")
    return root, build_digits(root / "d", DigitOptions(copies=2, clips=(300, 50, 100)))


@pytest.fixture(scope="module")
def judge() -> ImageJudge:
    return ImageJudge()


def test_five_datasets_of_one_vocabulary(demo: Demo) -> None:
    root, datasets = demo
    assert list(datasets) == ["text", *TASKS]
    sources = open_sources([Source(root / "d" / name) for name in datasets])
    vocabulary = vocabulary_of(sources)
    assert vocabulary.image is not None
    assert vocabulary.size == 14 + 256 + 64 + 12 and vocabulary.image.grid == (4, 4)
    reader = WholeRowReader(sources, 24, 0)
    tasks = {int(document[0]) for row in read_back(reader.batch(range(60))) for document in row}
    assert {vocabulary.task(task) for task in TASKS} <= tasks
    assert datasets["text-to-image"].splits["train"].documents == 2 * 1257
    sizes = {name: split.documents for name, split in datasets["image-to-text"].splits.items()}
    assert sizes == {"train": 2514, "validation": 180, "test": 360}
    assert all(lint(root / "d" / name) == [] for name in datasets)


def test_the_test_split_holds_the_real_images(demo: Demo, judge: ImageJudge) -> None:
    root, _ = demo
    folder = root / "d" / "image-to-text"
    modalities = load_modalities(folder)
    evaluation = WholeEvaluation(open_sources([Source(folder)], "test"), 23)
    documents = [d for batch in evaluation.batches(64) for row in read_back(batch) for d in row]
    test = load_digits()["test"]
    assert [modalities.sample("text", np.asarray(d[20:22])) for d in documents] == [
        WORDS[n] for n in test.labels_N
    ]
    shown = [modalities.sample("image", np.asarray(d[2:18])) for d in documents]
    assert np.abs(np.stack(shown).astype(float) - test.images_N).mean() < 16, "one level of sixteen"
    assert (judge(shown) == test.labels_N).mean() > 0.95


def test_splits_share_no_image_and_have_all_digits_in_proportion() -> None:
    digits = load_digits()
    assert {name: len(part.labels_N) for name, part in digits.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    seen = [{image.tobytes() for image in part.images_N} for part in digits.values()]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    for part in digits.values():
        share = np.bincount(part.labels_N) / len(part.labels_N)
        assert np.abs(share - 0.1).max() < 0.012


def test_warped_copies_keep_their_digit(judge: ImageJudge) -> None:
    train = load_digits()["test"]
    weak, moderate = augment(train, 3, WEAK, 0), augment(train, 3, MODERATE, 0)
    assert np.array_equal(weak.images_N[:360], train.images_N)
    assert not np.array_equal(weak.images_N[360:720], train.images_N)
    assert (
        judge.accuracy > 0.98
        and judge.score(weak) > 0.97
        and 0.85 < judge.score(moderate) < judge.score(weak)
    )


def test_distances_tell_copies_and_variety() -> None:
    digits = load_digits()
    train, test = digits["train"], digits["test"]
    assert nearest_neighbour_distance(train.images_N[:5], train.images_N).max() < 1e-5
    assert 10 < nearest_neighbour_distance(test.images_N, train.images_N).mean() < 25
    real = within_class_distance(test.images_N, test.labels_N)
    prototypes = np.stack([test.images_N[test.labels_N == d].mean(0) for d in test.labels_N]).astype(np.uint8)
    assert 30 < real < 42 and within_class_distance(prototypes, test.labels_N) < 1


def test_tones_are_heard_before_and_after_the_codec(demo: Demo) -> None:
    root, _ = demo
    codec = load_modalities(root / "d" / "text-to-audio").audio
    assert codec is not None
    digits = np.arange(100) % 10
    clips = make_tones(digits, 5)
    assert [detect_digit(clip) for clip in clips] == digits.tolist()
    codes = codec.encode(list(clips))
    assert codes[0].shape == (8,)
    heard = np.asarray([detect_digit(clip) for clip in codec.decode(codes)])
    assert (heard == digits).mean() >= 0.97, "a codebook from 300 clips; the demo's own hears all"
    time = np.arange(1656) / SAMPLE_RATE
    star = np.sin(2 * np.pi * 941 * time) + np.sin(2 * np.pi * 1209 * time)
    assert detect_digit(star) == NO_DIGIT


def test_sentences() -> None:
    every, split = facts(), split_facts()
    assert len(every) == len(set(every)) == 110 and all(map(is_true_sentence, every))
    assert all(map(is_sentence, every))
    assert sorted(fact for part in split.values() for fact in part) == sorted(every)
    assert [len(split[name]) for name in ("train", "validation", "test")] == [98, 6, 6]
    for text in (
        "three plus four equals eight",
        "three plus four",
        "three four plus equals seven",
        "",
        "seven",
    ):
        assert not is_true_sentence(text) and is_sentence(text) == text.endswith("equals eight")
    assert is_number_word("seven") and not is_number_word("plus")


def test_free_text_fills_its_slot(demo: Demo) -> None:
    root, datasets = demo
    evaluation = WholeEvaluation(open_sources([Source(root / "d" / "text")], "train"), 6)
    documents = [d for batch in evaluation.batches(500) for row in read_back(batch) for d in row]
    assert {len(d) for d in documents} == {6} and {d[-1] for d in documents} == {datasets["text"].eot}


def test_the_demo_names_the_package_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'triptych\[demo\]'"):
        build_digits(tmp_path / "d")
    assert not list(tmp_path.iterdir())
