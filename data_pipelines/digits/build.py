"""Building the five datasets of the digits demo, with one vocabulary."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.codecs import PatchCodec, SpectralCodec
from data_pipelines.codecs.spectral import Frames
from data_pipelines.digits.images import MODERATE, WEAK, Digits, Warp, augment, load_digits
from data_pipelines.digits.sentences import SENTENCE_WORDS, VOCABULARY, WORDS, split_facts
from data_pipelines.digits.tones import SAMPLE_RATE, make_tones
from data_pipelines.permutation import permutation
from data_pipelines.prepare.pair_writer import PairWriter, fill_text
from data_pipelines.storage.dataset import Dataset, open_dataset, token_bytes, write_dataset
from data_pipelines.storage.shards import TokenShardWriter
from data_pipelines.storage.whole_folders import make_partial, publish, refuse_used
from data_pipelines.tokens.modalities import Modalities, combine
from data_pipelines.tokens.tokenizer_training import word_tokenizer
from data_pipelines.tokens.vocabulary import TASKS

SPLITS = ("train", "validation", "test")
FRAMES = Frames(SAMPLE_RATE, window=256, hop=200, low_hz=500, high_hz=1844)
IMAGE_CODES, PATCH, AUDIO_CODES = 256, 2, 64
WORD_SLOT = 2
"""Tokens of a number word and its end-of-text."""
SENTENCE_SLOT = SENTENCE_WORDS + 1
TEXT_COPIES = 20
GROUP = 5000

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DigitOptions:
    """How much to make. copies: of each training image. clips: sounds for training, validation and test."""

    copies: int = 40
    clips: tuple[int, int, int] = (12_000, 500, 1000)
    seed: int = 0
    force: bool = False


def build_digits(
    out: Path | str, options: DigitOptions | None = None, progress: Progress | None = None
) -> dict[str, Dataset]:
    """Build `out`/text and `out`/TASK for the four tasks, each with the splits train, validation and test.

    Images: validation and test hold real images as they are, training holds warped copies too. Sounds are drawn
    anew for each split. Text: every document fills six tokens, a sentence or a number word with end-of-text behind.

    Raises:
        DataError: scikit-learn is not installed; the output folder is in use.
    """
    options, out = options or DigitOptions(), Path(out)
    show = progress or (lambda what, done, total: None)
    refuse_used(out, options.force)
    real = load_digits()
    _, partial = make_partial(out)
    try:
        show("learning the codecs", 0, 1)
        sounds = {split: _sounds(split, options) for split in SPLITS}
        modalities = _learn(real["train"], sounds["train"][0], options.seed)
        show("learning the codecs", 1, 1)
        steps = ["text", *TASKS]
        for done, name in enumerate(steps):
            show("writing datasets", done, len(steps))
            (partial / name).mkdir()
            if name == "text":
                _write_text(partial / name, modalities)
            elif "image" in name:
                _write_images(partial / name, name, modalities, (real, options))
            else:
                _write_sounds(partial / name, name, modalities, sounds)
        show("writing datasets", len(steps), len(steps))
        publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return {name: open_dataset(out / name) for name in ("text", *TASKS)}


def _sounds(split: str, options: DigitOptions) -> tuple[np.ndarray, np.ndarray]:
    """(clips, digits) of a split, all digits equally often."""
    count = options.clips[SPLITS.index(split)]
    digits = (np.arange(count) % 10)[permutation(count, "sounds", options.seed, split)]
    # Seeds of their own: no split repeats the noise of another.
    return make_tones(digits, options.seed * len(SPLITS) + SPLITS.index(split)), digits


def _learn(train: Digits, sounds: np.ndarray, seed: int) -> Modalities:
    images = PatchCodec.train(list(augment(train, 4, WEAK, seed).images_N), IMAGE_CODES, PATCH, seed)
    audio = SpectralCodec.train(list(sounds), AUDIO_CODES, FRAMES, seed=seed)
    return combine(word_tokenizer(VOCABULARY), images, audio)


def _write_text(folder: Path, modalities: Modalities) -> None:
    tokenizer = modalities.tokenizer
    records = {}
    for split, sentences in split_facts().items():
        texts = [*sentences, *WORDS] * TEXT_COPIES if split == "train" else sentences
        writer = TokenShardWriter(folder, split, token_bytes(tokenizer.vocabulary), 10**9)
        for place in permutation(len(texts), "texts", split).tolist():
            text = texts[place]
            ids = fill_text(tokenizer.encode(text), SENTENCE_SLOT, tokenizer.eot, text)
            writer.write(ids, len(text.encode()))
        records[split] = writer.close()
    write_dataset(folder, {split: records[split] for split in SPLITS}, tokenizer.save(folder))


def _write_images(
    folder: Path, task: str, modalities: Modalities, source: tuple[dict[str, Digits], DigitOptions]
) -> None:
    real, options = source
    warp: Warp = WEAK if task == "text-to-image" else MODERATE
    writer = PairWriter(folder, task, modalities, WORD_SLOT)
    for split in SPLITS:
        digits = real[split]
        if split == "train":
            digits = augment(digits, options.copies, warp, options.seed + 1)
        _write_split(writer, split, list(digits.images_N), digits.labels_N)
    writer.close()


def _write_sounds(
    folder: Path, task: str, modalities: Modalities, sounds: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    writer = PairWriter(folder, task, modalities, WORD_SLOT)
    for split in SPLITS:
        clips, digits = sounds[split]
        _write_split(writer, split, list(clips), digits)
    writer.close()


def _write_split(writer: PairWriter, split: str, samples: Sequence[np.ndarray], labels: np.ndarray) -> None:
    other = next(name for name in TASKS[writer.task] if name != "text")
    words = writer.modalities.ids("text", list(WORDS), "number words")
    for start in range(0, len(samples), GROUP):
        group = writer.modalities.ids(other, samples[start : start + GROUP], split)
        for number, ids in enumerate(group, start):
            digit = int(labels[number])
            both = {"text": words[digit], other: ids}
            given, made = (both[name] for name in TASKS[writer.task])
            writer.write(split, given, made, len(WORDS[digit]), f"{split} {other} {number}")
