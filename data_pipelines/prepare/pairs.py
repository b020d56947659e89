"""From captions with images or sounds to datasets of pairs, one for each task, with one vocabulary.

Two passes: the first checks every sample, learns what is to be learned (tokenizer, codecs) and measures the captions;
the second encodes and writes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial as bound
from pathlib import Path

import numpy as np

from data_pipelines.codecs import Codec
from data_pipelines.errors import DataError
from data_pipelines.prepare.pair_codecs import (
    Settings,
    codes_spec,
    decoded,
    given_codec,
    is_made_here,
    is_trained,
    train_codec,
)
from data_pipelines.prepare.pair_writer import PairWriter
from data_pipelines.prepare.reconstruction import Reconstruction, write_reconstruction
from data_pipelines.prepare.text import SPLITS, given_tokenizer, hash64, held_bytes
from data_pipelines.raw.files import Source, find_source
from data_pipelines.raw.report import Report, Tally
from data_pipelines.raw.samples import Found, Sample, read_samples
from data_pipelines.storage.dataset import Dataset, open_dataset
from data_pipelines.storage.whole_folders import make_partial, publish, refuse_used
from data_pipelines.tokens.modalities import Modalities, codec_modality, load_modalities
from data_pipelines.tokens.tokenizer import Tokenizer
from data_pipelines.tokens.tokenizer_training import bpe_size, train_bpe
from data_pipelines.tokens.vocabulary import TASKS, Modality, Vocabulary

CAPTION_CHARACTERS = 8_000_000
"""Of captions that a BPE is trained on."""
GROUP = 256
"""Samples that are encoded together."""
JUDGED = 64
"""Images or sounds by which a codec is judged."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PairOptions:
    """How to build.

    image_codec: a codec's folder, `patch:CODES:SIZE`, or `codes:CODES:ROWSxCOLUMNS` for codes of an unknown codec.
    audio_codec: a codec's folder, `spectral:CODES[:CODEBOOKS[:SAMPLE_RATE]]`, or `codes:CODES[:CODEBOOKS]`.
    tokenizer: bytes, bpe:N, a tokenizer.json, or a dataset; None: that of `vocabulary`, else bpe:8192.
    tasks: empty: all that the samples allow.
    text_slot: tokens of a text target; None: the longest caption and its end-of-text.
    vocabulary: a dataset whose vocabulary, tokenizer and codecs are taken.
    delay: the delay pattern for audio of several codebooks.
    strict: what would be left out or lost is an error.
    end_of_text: the name of that token in a tokenizer.json.
    """

    image_codec: str | None = None
    audio_codec: str | None = None
    tokenizer: str | None = None
    tasks: tuple[str, ...] = ()
    text_slot: int | None = None
    vocabulary: Path | None = None
    delay: bool = False
    validation_fraction: float = 0.05
    shard_megabytes: float = 256
    seed: int = 0
    force: bool = False
    strict: bool = False
    end_of_text: str | None = None

    def modalities(self) -> set[str]:
        """image, audio: what the tasks need besides text."""
        return {name for task in self.tasks or TASKS for name in TASKS[task]} - {"text"}

    def codecs(self) -> dict[str, str | None]:
        """What was said of each modality's codec."""
        return {"image": self.image_codec, "audio": self.audio_codec}

    def trains(self, name: str) -> bool:
        """Whether a codec is to be trained for a modality."""
        return self.vocabulary is None and is_trained(self.codecs()[name])

    def check(self) -> None:
        """Raises DataError for a value out of range."""
        for task in self.tasks:
            if task not in TASKS:
                raise DataError(f"--tasks {task}: no such task; there are {', '.join(TASKS)}.")
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"--validation-fraction {self.validation_fraction}: at least 0 and below 1.")
        if not math.isfinite(self.shard_megabytes) or self.shard_megabytes <= 0:
            raise DataError(f"--shard-megabytes {self.shard_megabytes}: it must be a positive number.")
        if self.text_slot is not None and self.text_slot < 2:
            raise DataError(f"--text-slot {self.text_slot}: at least 2, a token and end-of-text.")
        if not -(2**63) <= self.seed < 2**63:
            raise DataError(f"seed {self.seed}: it must be a number of 64 bits.")


@dataclass(frozen=True)
class BuiltPairs:
    """What was made: the datasets by task.

    report: what was left out, changed or lost.
    found: how many samples there were, and where.
    reconstructions: what the codecs lose, by modality.
    """

    datasets: dict[str, Dataset]
    modalities: Modalities
    text_slot: int
    removed: list[Path]
    report: Report
    found: Found
    reconstructions: list[Reconstruction]


@dataclass
class _Survey:
    """What the first pass found."""

    samples: int = 0
    settings: dict[str, Settings] = field(
        default_factory=lambda: {name: Settings(name) for name in ("image", "audio")}
    )
    held_out: int = 0
    lowest: tuple[int, str] = (2**64, "")  # (hash, key)
    highest: tuple[int, str] = (-1, "")
    captions: list[str] = field(default_factory=list)
    caption_characters: int = 0

    def exception(self) -> str | None:
        """The one key that changes sides, because by its hash a split would stay empty."""
        if self.samples < 2 or 0 < self.held_out < self.samples:
            return None
        return self.lowest[1] if self.held_out == 0 else self.highest[1]

    def tasks(self) -> list[str]:
        """Those that some sample allows."""
        return [task for task, pair in TASKS.items() if self.count(next(n for n in pair if n != "text"))]

    def count(self, name: str) -> int:
        """Samples with an image, or with audio."""
        return self.settings[name].samples

    def keys_differ(self) -> bool:
        return self.lowest[1] != self.highest[1]


def build_pairs(
    source: Path | str, out: Path | str, options: PairOptions, progress: Progress | None = None
) -> BuiltPairs:
    """Build `out`/TASK for each task from captions with images or sounds (or their codes).

    A sample is held out for validation by the hash of its key, in all tasks alike.

    Raises:
        DataError: a sample without its caption, undecodable, or with codes outside of its codec's range; codecs or
            tokenizer other than the vocabulary's; an option out of range; an output folder in use.
    """
    options.check()
    out, told, found = Path(out), Report(), Found()
    refuse_used(out, options.force)
    show = progress or (lambda what, done, total: None)
    given = load_modalities(options.vocabulary) if options.vocabulary else None
    files = find_source(Path(source), out, told.left_out)
    removed, partial = make_partial(out)
    try:
        survey = _first_pass(files, options, (told, found), show)
        if options.strict:
            told.refuse()
        show("learning tokenizer and codecs", 0, 1)
        modalities = _modalities(survey, options, given)
        tasks = _tasks(survey, options, modalities.vocabulary)
        slot = _slot(files, options, modalities)
        show("learning tokenizer and codecs", 1, 1)
        writers = _writers(partial, tasks, modalities, slot, options)
        judged = _second_pass(files, writers, (modalities, options, survey), told, show)
        if options.strict:
            told.refuse()
        for writer in writers.values():
            writer.close()
        reconstructions = [
            write_reconstruction(partial, modalities, *one) for one in judged.items() if one[1]
        ]
        publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    datasets = {task: open_dataset(out / task) for task in tasks}
    return BuiltPairs(datasets, modalities, slot, removed, told, found, reconstructions)


def _first_pass(
    source: Source, options: PairOptions, counts: tuple[Report, Found], show: Progress
) -> _Survey:
    survey, (told, found) = _Survey(), counts
    threshold = int(options.validation_fraction * 2**64)
    learns_text = options.vocabulary is None and bool(bpe_size(options.tokenizer or "bpe:8192"))
    for sample in read_samples(source, told.left_out, found):
        caption = _caption_of(sample, told.left_out)
        used = options.modalities().intersection(sample.modalities)
        if not used:
            told.left_out.add(sample.where, f"without what --tasks {','.join(options.tasks)} needs")
            continue
        mark = hash64(sample.key.encode("utf-8", "surrogateescape"), options.seed)
        survey.samples += 1
        survey.held_out += mark < threshold
        survey.lowest = min(survey.lowest, (mark, sample.key))
        survey.highest = max(survey.highest, (mark, sample.key))
        for name in used:
            survey.settings[name].add(sample, look=options.trains(name))
        if learns_text and survey.caption_characters < CAPTION_CHARACTERS:
            survey.captions.append(caption)
            survey.caption_characters += len(caption)
        if survey.samples % 500 == 0:
            show("reading", survey.samples, survey.samples)
    _refuse_no_samples(source, survey, threshold, told.left_out)
    show("reading", survey.samples, survey.samples)
    return survey


def _caption_of(sample: Sample, left_out: Tally) -> str:
    """Raises DataError where the sample is not whole, with what was left out so far: the other half may be there."""
    try:
        if not sample.modalities:
            raise DataError(f"{sample.where}: a caption without an image or a sound. Remove it, or add one.")
        return sample.caption()
    except DataError as error:
        raise DataError("\n  ".join([str(error), *left_out.lines("left out")])) from None


def _refuse_no_samples(source: Source, survey: _Survey, threshold: int, left_out: Tally) -> None:
    """Raises DataError for nothing to read, or for samples that cannot be told apart."""
    if not survey.samples:
        place = source.root if len(source.files) > 1 else source.files[0]
        message = (
            f"{place}: no samples here. A sample is KEY.txt or KEY.json with KEY.png, .jpg, .wav or .flac, or with "
            "KEY.image.u16 or KEY.audio.u16 codes, in a folder or in .tar shards; KEY has no dot."
        )
        raise DataError("\n  ".join([message, *left_out.lines("left out")]))
    if survey.samples > 1 and threshold and not survey.keys_differ():
        raise DataError(
            f"{source.root}: all {survey.samples:,} samples have the key {survey.lowest[1]!r}, and the key decides "
            "what is held out for validation. Give them different ones."
        )


def _modalities(survey: _Survey, options: PairOptions, given: Modalities | None) -> Modalities:
    """The vocabulary with its tokenizer and codecs, as given or learned."""
    _refuse_unused(survey, options)
    if given is not None:
        if options.tokenizer and bpe_size(options.tokenizer):
            raise DataError(
                f"--tokenizer {options.tokenizer} trains a new one, and --vocabulary {options.vocabulary} has its own: "
                "leave one of them out."
            )
        image = given_codec("image", options.image_codec) or given.image
        audio = given_codec("audio", options.audio_codec) or given.audio
        if options.end_of_text and not options.tokenizer:
            raise DataError(
                f"--end-of-text {options.end_of_text}: --vocabulary {options.vocabulary} has its own; leave it out."
            )
        chosen = given_tokenizer(options.tokenizer, options.end_of_text) if options.tokenizer else None
        tokenizer = chosen or given.tokenizer
        return Modalities(given.vocabulary, tokenizer, image, audio)
    tokenizer = _tokenizer(survey, options.tokenizer or "bpe:8192", options.end_of_text)
    text = Modality("text", 0, tokenizer.vocabulary, tokenizer.fingerprint)
    ranges: dict[str, Modality | None] = {"image": None, "audio": None}
    codecs: dict[str, Codec | None] = {"image": None, "audio": None}
    first = text.end
    for name, spec in options.codecs().items():
        if not survey.count(name):
            continue
        found = codes_spec(name, spec, first, options.delay)
        if found is None:
            codec = given_codec(name, spec) or train_codec(spec, survey.settings[name], options.seed)
            codecs[name] = codec
            found = codec_modality(name, first, codec, options.delay)
        ranges[name], first = found, found.end
    if options.delay and (ranges["audio"] is None or ranges["audio"].codebooks == 1):
        raise DataError("--delay: for audio of several codebooks, which this is not; leave it out.")
    return Modalities(Vocabulary(text, tokenizer.eot, **ranges), tokenizer, **codecs)


def _refuse_unused(survey: _Survey, options: PairOptions) -> None:
    """Raises DataError for an option that would change nothing."""
    for name, spec in options.codecs().items():
        if spec is None:
            continue
        if not survey.count(name):
            raise DataError(f"--{name}-codec {spec}: the tasks have no {name} samples; leave it out.")
        if options.vocabulary is not None and is_made_here(spec):
            raise DataError(
                f"--{name}-codec {spec}: --vocabulary {options.vocabulary} says which codec is used; leave one of them "
                "out."
            )
    if options.delay and options.vocabulary is not None:
        raise DataError(
            f"--delay: --vocabulary {options.vocabulary} says whether there is a delay; leave it out."
        )


def _tokenizer(survey: _Survey, spec: str, end_of_text: str | None) -> Tokenizer:
    return given_tokenizer(spec, end_of_text) or train_bpe(survey.captions, bpe_size(spec) or 0)


def _tasks(survey: _Survey, options: PairOptions, vocabulary: Vocabulary) -> list[str]:
    found = survey.tasks()
    for task in options.tasks:
        other = next(name for name in TASKS[task] if name != "text")
        if task not in found:
            raise DataError(f"--tasks {task}: no sample has {'an image' if other == 'image' else 'a sound'}.")
    tasks = [task for task in TASKS if task in (options.tasks or found)]
    for task in tasks:
        if task not in vocabulary.tasks():
            raise DataError(
                f"--tasks {task}: the vocabulary of {options.vocabulary} has not both modalities."
            )
    return tasks


def _slot(source: Source, options: PairOptions, modalities: Modalities) -> int:
    if options.text_slot is not None:
        return options.text_slot
    longest = 0
    for group in _groups(_used_samples(source, options)):
        longest = max(longest, *(len(ids) for ids in _text_ids(modalities, group)))
    return longest + 1


def _writers(
    partial: Path, tasks: Sequence[str], modalities: Modalities, slot: int, options: PairOptions
) -> dict[str, PairWriter]:
    writers = {}
    for task in tasks:
        (partial / task).mkdir()
        bytes_each = int(options.shard_megabytes * 1e6)
        writers[task] = PairWriter(partial / task, task, modalities, slot, bytes_each)
    return writers


def _groups(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    for sample in samples:
        group.append(sample)
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group


def _used_samples(source: Source, options: PairOptions) -> Iterator[Sample]:
    """Those that the tasks can use; the first pass has counted the others."""
    wanted = options.modalities()
    return (sample for sample in read_samples(source) if wanted.intersection(sample.modalities))


def _second_pass(
    source: Source,
    writers: dict[str, PairWriter],
    plan: tuple[Modalities, PairOptions, _Survey],
    told: Report,
    show: Progress,
) -> dict[str, list[Sample]]:
    """Encode and write; returns the samples by which each codec is to be judged: held-out ones, if there are."""
    modalities, options, survey = plan
    threshold, exception = int(options.validation_fraction * 2**64), survey.exception()
    judged = _Judged({name: [] for name in ("image", "audio")})
    done = 0
    for group in _groups(_used_samples(source, options)):
        texts = _text_ids(modalities, group)
        ids = {name: _encoded(modalities, name, group, told.changed) for name in options.modalities()}
        for number, sample in enumerate(group):
            held_out = hash64(sample.key.encode("utf-8", "surrogateescape"), options.seed) < threshold
            split = SPLITS[held_out != (threshold > 0 and sample.key == exception)]
            judged.offer(sample, split == "validation")
            caption = sample.caption(lambda what, sample=sample: told.changed.add(sample.where, what))  # type: ignore[misc]
            size = held_bytes(modalities.tokenizer, caption, texts[number], told, sample.where)
            for task, writer in writers.items():
                other = next(name for name in TASKS[task] if name != "text")
                if number in ids[other]:
                    both = {"text": texts[number], other: ids[other][number]}
                    given, made = (both[name] for name in TASKS[task])
                    writer.write(split, given, made, size, sample.where)
        done += len(group)
        show("encoding", done, survey.samples)
    return judged.samples


@dataclass
class _Judged:
    """A few samples of each modality by which the codecs are judged; validation ones take the place of others."""

    samples: dict[str, list[Sample]]
    held_out: dict[str, int] = field(default_factory=lambda: {"image": 0, "audio": 0})

    def offer(self, sample: Sample, held_out: bool) -> None:
        for name in sample.modalities:
            kept = self.samples[name]
            if sample.codes_only(name) or self.held_out[name] >= JUDGED:
                continue
            if held_out:
                kept.insert(self.held_out[name], sample.held())
                self.held_out[name] += 1
                del kept[JUDGED:]
            elif len(kept) < JUDGED:
                kept.append(sample.held())


def _text_ids(modalities: Modalities, group: list[Sample]) -> list[np.ndarray]:
    """The ids of a group's captions, without end-of-text."""
    try:
        return modalities.ids("text", [sample.caption() for sample in group], group[0].where)
    except DataError as error:
        if len(group) == 1:
            raise DataError(f"{group[0].where}: {error}") from None
        return [_text_ids(modalities, [sample])[0] for sample in group]  # which of them?


def _encoded(modalities: Modalities, name: str, group: list[Sample], changed: Tally) -> dict[int, np.ndarray]:
    """The ids of a group's images or sounds, by place in the group. `changed` counts what was done to them."""
    found: dict[int, np.ndarray] = {}
    places, samples = [], []
    for place, sample in enumerate(group):
        if name not in sample.modalities:
            continue
        codes = sample.codes(name, modalities.vocabulary.modality(name).codebooks)
        if codes is None:
            places.append(place)
            note = bound(changed.add, sample.file(name).where)
            samples.append(decoded(modalities.codec(name), name, sample, note))
        else:
            found[place] = _stored(modalities, name, codes, sample)
    if samples:
        for place, ids in zip(places, modalities.ids(name, samples, group[0].where), strict=True):
            found[place] = ids
    return found


def _stored(modalities: Modalities, name: str, codes: np.ndarray, sample: Sample) -> np.ndarray:
    grid = modalities.vocabulary.modality(name).grid
    if grid is not None and codes.size != grid[0] * grid[1]:
        raise DataError(
            f"{sample.where}: {codes.size} {name} codes, the grid has {grid[0]} x {grid[1]}. Encode it at the size "
            "of the others."
        )
    return modalities.code_ids(name, codes, sample.where)
