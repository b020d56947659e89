"""From raw text to a tokenised dataset.

Two passes: the first counts the documents, sees that both splits will hold some, and collects a sample to
train a BPE on; the second tokenises. Everything is written to a temporary folder that takes its final name
at the end, so a build that was killed leaves nothing that looks whole; the next build to the same place
removes what it left.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.raw.documents import file_documents
from data_pipelines.raw.files import find_source
from data_pipelines.raw.report import Report, Tally
from data_pipelines.storage.dataset import Dataset, open_dataset, token_bytes, write_dataset
from data_pipelines.storage.shards import TokenShardWriter
from data_pipelines.storage.whole_folders import make_partial, publish, refuse_used
from data_pipelines.tokens.tokenizer import Tokenizer
from data_pipelines.tokens.tokenizer_loading import tokenizer_from_spec
from data_pipelines.tokens.tokenizer_training import bpe_size, train_bpe

SAMPLE_CHARACTERS = 8_000_000  # of text to train a BPE on: under ten seconds on one core
SAMPLE_EXCERPT = 100_000  # characters; the first of every document is taken before others of long documents
BATCH_CHARACTERS = 2_000_000  # tokenised at a time
SPLITS = ("train", "validation")
BLANK_MARK = "\u2581"
"""What normalizers of SentencePiece put for a blank."""

Progress = Callable[[str, int, int], None]  # (what is being done, files done, files in all)


@dataclass(frozen=True)
class BuildOptions:
    """How to build a dataset."""

    tokenizer: str = "bpe:8192"  # bytes, bpe:N, a tokenizer.json, or a dataset folder
    validation_fraction: float = 0.05
    shard_megabytes: float = 256
    seed: int = 0
    force: bool = False  # replace what is in the output folder
    strict: bool = False  # what would be left out or lost is an error
    end_of_text: str | None = None  # the name of that token in a tokenizer.json

    def check(self) -> None:
        """Raises DataError for a value out of range."""
        if not 0 <= self.validation_fraction < 1:
            raise DataError(
                f"validation fraction {self.validation_fraction}: it must be at least 0 and below 1."
            )
        if not math.isfinite(self.shard_megabytes) or self.shard_megabytes <= 0:
            raise DataError(f"shard size {self.shard_megabytes} MB: it must be a positive number.")
        if not -(2**63) <= self.seed < 2**63:
            raise DataError(f"seed {self.seed}: it must be a number of 64 bits.")


@dataclass(frozen=True)
class Built:
    """What a build made."""

    dataset: Dataset
    tokenizer: Tokenizer
    report: Report
    removed: list[Path]  # what builds that were killed had left
    asked_vocabulary: int  # N of bpe:N; 0 where the tokenizer was given

    @property
    def skipped(self) -> Tally:
        """What was left out."""
        return self.report.left_out

    @property
    def vocabulary_shortfall(self) -> str:
        """One line for people if the trained vocabulary is smaller than was asked, else ""."""
        if self.tokenizer.vocabulary >= self.asked_vocabulary:
            return ""
        return (
            f"the vocabulary has {self.tokenizer.vocabulary:,} ids instead of {self.asked_vocabulary:,}: the "
            "text is too small or too uniform for more. Give more text, or ask for fewer."
        )


@dataclass
class Survey:
    """What the first pass found."""

    documents: int = 0
    validation: int = 0
    lowest: tuple[int, int] = (2**64, -1)  # (hash, document)
    highest: tuple[int, int] = (-1, -1)
    # heap of (-rank, document, first character, text): the highest rank is dropped first
    sample: list[tuple[int, int, int, str]] = field(default_factory=list)
    sample_characters: int = 0

    def exception(self) -> int:
        """The one document that changes sides, because by its hash a split would stay empty; -1 for none."""
        if self.documents < 2 or 0 < self.validation < self.documents:
            return -1
        return self.lowest[1] if self.validation == 0 else self.highest[1]

    def add_sample(self, mark: int, text: str) -> None:
        """Offer a document, whose hash is `mark`, to the sample, in excerpts.

        First excerpts go by the hash and rank before all others, so that long documents do not crowd out the
        rest of many; where few documents leave room, the others come from all over them.
        """
        for start in range(0, len(text), SAMPLE_EXCERPT):
            rank = mark if start == 0 else 2**64 + hash64(f"{mark}/{start}".encode())
            excerpt = text[start : start + SAMPLE_EXCERPT]
            heapq.heappush(self.sample, (-rank, self.documents, start, excerpt))
            self.sample_characters += len(excerpt)
            while self.sample_characters > SAMPLE_CHARACTERS:
                self.sample_characters -= len(heapq.heappop(self.sample)[3])


def build(
    source: Path | str, out: Path | str, options: BuildOptions, progress: Progress | None = None
) -> Built:
    """Tokenise a text file, a .jsonl, a raw .tar shard or a folder of them into `out`.

    Raises:
        DataError: nothing to read, a bad line, an output folder in use, an option out of range; with `strict`
            something that would be left out.
    """
    options.check()
    told = Report()
    found = find_source(Path(source), Path(out), told.left_out)
    return build_from_files(list(found.files), out, options, progress, told)


def build_from_files(
    files: list[Path],
    out: Path | str,
    options: BuildOptions,
    progress: Progress | None = None,
    told: Report | None = None,
) -> Built:
    """As `build`, from a list of files.

    Args:
        told: where what is left out is counted, with what was so already when the files were found.

    Raises:
        DataError: see `build`.
    """
    options.check()
    out = Path(out)
    refuse_used(out, options.force)
    size = bpe_size(options.tokenizer)
    given = given_tokenizer(options.tokenizer, options.end_of_text)
    told = told or Report()
    show = progress or (lambda what, done, total: None)
    removed, partial = make_partial(out)
    try:
        survey = _survey(files, options, (bool(size), told), show)
        _refuse_no_text(survey, files, told.left_out)
        if options.strict:
            told.refuse()
        show("training the tokenizer" if size else "loading the tokenizer", 0, 1)
        tokenizer = given or train_bpe(_training_texts(survey), size or 0)
        _write(files, partial, (tokenizer, options, survey), told, show)
        publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Built(open_dataset(out), tokenizer, told, removed, size or 0)


def given_tokenizer(spec: str, end_of_text: str | None) -> Tokenizer | None:
    """The tokenizer that was given; None where one is to be trained.

    Raises:
        DataError: none is there; or an end-of-text token is named for a tokenizer that has its own.
    """
    if bpe_size(spec) is None:
        return tokenizer_from_spec(spec, end_of_text)
    if end_of_text is not None:
        raise DataError(f"--end-of-text {end_of_text}: {spec} gets its own end-of-text token; leave it out.")
    return None


def _refuse_no_text(survey: Survey, files: list[Path], left_out: Tally) -> None:
    if survey.documents:
        return
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.counts.items()) or "nothing to read"
    raise DataError(f"no text found in {len(files)} file(s): {why}. Text must be UTF-8, not empty.")


def _documents(
    files: Iterable[Path], told: Report, done: Callable[[int], None] | None = None
) -> Iterator[str]:
    for number, path in enumerate(files):
        yield from file_documents(path, told)
        if done:
            done(number + 1)


def document_hash(text: str, seed: int) -> int:
    """64 bits that decide which split a document belongs to: equal texts always go to the same one."""
    return hash64(text.encode(), seed)


def hash64(data: bytes, seed: int = 0) -> int:
    key = hashlib.blake2b(data, digest_size=8, salt=seed.to_bytes(16, "little", signed=True))
    return int.from_bytes(key.digest(), "little")


def _survey(files: list[Path], options: BuildOptions, plan: tuple[bool, Report], show: Progress) -> Survey:
    """Count the documents and, for a BPE, keep a sample of SAMPLE_CHARACTERS.

    plan: whether a sample is wanted; where what is left out is counted.
    """
    survey = Survey()
    sample, told = plan
    threshold = int(options.validation_fraction * 2**64)
    show("reading", 0, len(files))
    for text in _documents(files, told, lambda done: show("reading", done, len(files))):
        mark, number = document_hash(text, options.seed), survey.documents
        if sample:
            survey.add_sample(mark, text)
        survey.documents += 1
        survey.validation += mark < threshold
        survey.lowest = min(survey.lowest, (mark, number))
        survey.highest = max(survey.highest, (mark, number))
    return survey


def _training_texts(survey: Survey) -> list[str]:
    return [text for _, _, _, text in sorted(survey.sample, key=lambda item: item[1:3])]


def _write(
    files: list[Path],
    folder: Path,
    plan: tuple[Tokenizer, BuildOptions, Survey],
    told: Report,
    show: Progress,
) -> None:
    """The second pass: tokenise and write shards, tokenizer and dataset.json."""
    tokenizer, options, survey = plan
    # What is left out was counted by the first pass.
    texts = _documents(files, Report(), lambda done: show("tokenising", done, len(files)))
    show("tokenising", 0, len(files))
    width, shard_bytes = token_bytes(tokenizer.vocabulary), int(options.shard_megabytes * 1e6)
    writers = {split: TokenShardWriter(folder, split, width, shard_bytes) for split in SPLITS}
    for group in _groups(_placed(texts, options, survey)):
        for (split, text), ids in zip(group, tokenizer.encode_batch([t for _, t in group]), strict=True):
            size = held_bytes(tokenizer, text, ids, told, repr(text[:40]))
            writers[split].write(np.append(ids, np.asarray([tokenizer.eot], ids.dtype)), size)
    if options.strict:
        told.refuse()
    records = {split: writer.close() for split, writer in writers.items()}
    write_dataset(folder, {s: r for s, r in records.items() if r}, tokenizer.save(folder))


def held_bytes(tokenizer: Tokenizer, text: str, ids: np.ndarray, told: Report, where: str) -> int:
    """UTF-8 bytes of a text that its tokens hold: what bits per byte are reckoned by. Of a text that the tokenizer's
    normalizer rewrites, the fewer of its own and of what is left of them then.

    Characters that the tokenizer has no token for are counted in `told`, and texts that it rewrites.
    """
    lost = tokenizer.lost(text, ids)
    rewritten = tokenizer.rewrites(text)
    if rewritten:
        told.changed.add(where, "rewritten by the tokenizer's normalizer")
    if lost:
        example = f"{''.join(lost)[:20]!r} in {where}"
        told.lost.add(example, "character(s) for which the tokenizer has no token", lost.total())
    without = sum(len(character.encode()) * count for character, count in lost.items())
    held = len(text.encode()) - without
    if rewritten:  # what is lost was counted in what the normalizer made
        held = min(
            len(text.encode()), len(tokenizer.normalized(text).replace(BLANK_MARK, " ").encode()) - without
        )
    return max(0, held)


def _placed(texts: Iterable[str], options: BuildOptions, survey: Survey) -> Iterator[tuple[str, str]]:
    """(split, text) of each document, or of the head and the tail of an only document."""
    threshold, exception = int(options.validation_fraction * 2**64), survey.exception()
    if threshold == 0:
        exception = -1
    for number, text in enumerate(texts):
        if survey.documents == 1 and threshold:
            train, validation = cut_tail(text, options.validation_fraction)
            yield "train", train
            if validation:
                yield "validation", validation
        else:
            held_out = (document_hash(text, options.seed) < threshold) != (number == exception)
            yield SPLITS[held_out], text


def cut_tail(text: str, fraction: float) -> tuple[str, str]:
    """Split one text into a beginning and an end of about `fraction`, after a line break if one is near."""
    place = max(1, min(len(text) - 1, round(len(text) * (1 - fraction))))
    line = text.rfind("\n", max(1, place - len(text) // 20), place) + 1
    place = line or place
    return text[:place], text[place:]


def _groups(placed: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Documents in groups of about BATCH_CHARACTERS, so that several threads can tokenise a group."""
    group: list[tuple[str, str]] = []
    size = 0
    for item in placed:
        group.append(item)
        size += len(item[1])
        if size >= BATCH_CHARACTERS or len(group) >= 4096:
            yield group
            group, size = [], 0
    if group:
        yield group
