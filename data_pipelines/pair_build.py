"""From captions with images or sounds to datasets of pairs, one for each task, with one vocabulary.

Two passes: the first checks every sample, learns what is to be learned (tokenizer, codecs) and measures the captions;
the second encodes and writes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.build import SPLITS, hash64
from data_pipelines.codecs import Codec, PatchCodec, SpectralCodec, load_codec
from data_pipelines.codecs.spectral import Frames
from data_pipelines.dataset import Dataset, open_dataset
from data_pipelines.errors import DataError
from data_pipelines.modalities import GIVEN_CODES, Modalities, code_modality, codec_modality, load_modalities
from data_pipelines.pair_sources import Sample, read_samples
from data_pipelines.pairs import PairWriter
from data_pipelines.publish import make_partial, publish, refuse_used
from data_pipelines.tokenizers import Tokenizer, bpe_size, tokenizer_from_spec, train_bpe
from data_pipelines.vocabulary import TASKS, Modality, Vocabulary

TRAINED_ON = 2048
"""Images or sounds that a codec is trained on."""
CAPTION_CHARACTERS = 8_000_000
"""Of captions that a BPE is trained on."""
GROUP = 256
"""Samples that are encoded together."""
WINDOW_SECONDS, HOP_SECONDS = 0.032, 0.025
"""Of the frames of a spectral codec that is trained here."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PairOptions:
    """How to build.

    image_codec: a codec's folder, `patch:CODES:SIZE`, or `codes:CODES:ROWSxCOLUMNS` for codes of an unknown codec.
    audio_codec: a codec's folder, `spectral:CODES[:CODEBOOKS]`, or `codes:CODES[:CODEBOOKS]`.
    tokenizer: bytes, bpe:N, a tokenizer.json, or a dataset; None: that of `vocabulary`, else bpe:8192.
    tasks: empty: all that the samples allow.
    text_slot: tokens of a text target; None: the longest caption and its end-of-text.
    vocabulary: a dataset whose vocabulary, tokenizer and codecs are taken.
    delay: the delay pattern for audio of several codebooks.
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

    def modalities(self) -> set[str]:
        """image, audio: what the tasks need besides text."""
        return {name for task in self.tasks or TASKS for name in TASKS[task]} - {"text"}

    def codecs(self) -> dict[str, str | None]:
        """What was said of each modality's codec."""
        return {"image": self.image_codec, "audio": self.audio_codec}

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
    """What was made: the datasets by task."""

    datasets: dict[str, Dataset]
    modalities: Modalities
    text_slot: int
    removed: list[Path]


@dataclass
class _Survey:
    """What the first pass found."""

    samples: int = 0
    with_modality: dict[str, int] = field(default_factory=lambda: {"image": 0, "audio": 0})
    held_out: int = 0
    lowest: tuple[int, str] = (2**64, "")  # (hash, key)
    highest: tuple[int, str] = (-1, "")
    training: dict[str, list[Sample]] = field(default_factory=lambda: {"image": [], "audio": []})
    codes: set[str] = field(default_factory=set)  # modalities of which codes are given
    captions: list[str] = field(default_factory=list)
    caption_characters: int = 0

    def exception(self) -> str | None:
        """The one key that changes sides, because by its hash a split would stay empty."""
        if self.samples < 2 or 0 < self.held_out < self.samples:
            return None
        return self.lowest[1] if self.held_out == 0 else self.highest[1]

    def tasks(self) -> list[str]:
        """Those that some sample allows."""
        return [task for task, pair in TASKS.items() if any(self.with_modality.get(name) for name in pair)]


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
    source, out = Path(source), Path(out)
    refuse_used(out, options.force)
    report = progress or (lambda what, done, total: None)
    given = load_modalities(options.vocabulary) if options.vocabulary else None
    removed, partial = make_partial(out)
    try:
        survey = _first_pass(source, out, options, report)
        report("learning tokenizer and codecs", 0, 1)
        modalities = _modalities(survey, options, given)
        tasks = _tasks(survey, options, modalities.vocabulary)
        slot = _slot(source, out, options, modalities)
        report("learning tokenizer and codecs", 1, 1)
        writers = _writers(partial, tasks, modalities, slot, options)
        _second_pass(read_samples(source, out), writers, (modalities, options, survey), report)
        for writer in writers.values():
            writer.close()
        publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return BuiltPairs({task: open_dataset(out / task) for task in tasks}, modalities, slot, removed)


def _first_pass(source: Path, out: Path, options: PairOptions, report: Progress) -> _Survey:
    survey = _Survey()
    threshold = int(options.validation_fraction * 2**64)
    learns_text = options.vocabulary is None and bool(bpe_size(options.tokenizer or "bpe:8192"))
    for sample in read_samples(source, out):
        if not sample.modalities:
            raise DataError(f"{sample.where}: a caption without an image or a sound. Remove it, or add one.")
        caption, mark = sample.caption(), hash64(sample.key.encode(), options.seed)
        survey.samples += 1
        survey.held_out += mark < threshold
        survey.lowest = min(survey.lowest, (mark, sample.key))
        survey.highest = max(survey.highest, (mark, sample.key))
        for name in options.modalities().intersection(sample.modalities):
            survey.with_modality[name] += 1
            if sample.codes_only(name):
                survey.codes.add(name)
            else:
                _thin(survey.training[name], sample, survey.with_modality[name])
        if learns_text and survey.caption_characters < CAPTION_CHARACTERS:
            survey.captions.append(caption)
            survey.caption_characters += len(caption)
        if survey.samples % 500 == 0:
            report("reading", survey.samples, survey.samples)
    if not survey.samples:
        raise DataError(
            f"{source}: no samples here. A sample is KEY.txt or KEY.json with KEY.png, .jpg, .wav or .flac, or with "
            "KEY.image.u16 or KEY.audio.u16 codes, in a folder or in .tar shards; KEY has no dot."
        )
    report("reading", survey.samples, survey.samples)
    return survey


def _thin(kept: list[Sample], sample: Sample, number: int) -> None:
    """Keep every n-th sample, with n doubled whenever TRAINED_ON are held: they come from all of the source."""
    stride = 1 << max(0, (number - 1) // TRAINED_ON).bit_length()
    if (number - 1) % stride == 0:
        if len(kept) >= TRAINED_ON:
            kept[:] = kept[::2]
        kept.append(sample)


def _modalities(survey: _Survey, options: PairOptions, given: Modalities | None) -> Modalities:
    """The vocabulary with its tokenizer and codecs, as given or learned."""
    _refuse_unused(survey, options)
    if given is not None:
        if options.tokenizer and bpe_size(options.tokenizer):
            raise DataError(
                f"--tokenizer {options.tokenizer} trains a new one, and --vocabulary {options.vocabulary} has its own: "
                "leave one of them out."
            )
        image = _given_codec("image", options.image_codec) or given.image
        audio = _given_codec("audio", options.audio_codec) or given.audio
        tokenizer = tokenizer_from_spec(options.tokenizer) if options.tokenizer else given.tokenizer
        return Modalities(given.vocabulary, tokenizer, image, audio)
    tokenizer = _tokenizer(survey, options.tokenizer or "bpe:8192")
    text = Modality("text", 0, tokenizer.vocabulary, tokenizer.fingerprint)
    parts: dict[str, Modality | None] = {"image": None, "audio": None}
    codecs: dict[str, Codec | None] = {"image": None, "audio": None}
    first = text.end
    for name, spec in options.codecs().items():
        if not survey.with_modality[name]:
            continue
        found = _codes_spec(name, spec, first, options.delay)
        if found is None:
            codecs[name] = codec = _given_codec(name, spec) or _train_codec(name, spec, survey, options.seed)
            found = codec_modality(name, first, codec, options.delay)
        parts[name], first = found, found.end
    if options.delay and (parts["audio"] is None or parts["audio"].codebooks == 1):
        raise DataError("--delay: for audio of several codebooks, which this is not; leave it out.")
    return Modalities(Vocabulary(text, tokenizer.eot, **parts), tokenizer, **codecs)


def _refuse_unused(survey: _Survey, options: PairOptions) -> None:
    """Raises DataError for an option that would change nothing."""
    for name, spec in options.codecs().items():
        if spec is None:
            continue
        if not survey.with_modality[name]:
            raise DataError(f"--{name}-codec {spec}: the tasks have no {name} samples; leave it out.")
        if options.vocabulary is not None and _is_made_here(spec):
            raise DataError(
                f"--{name}-codec {spec}: --vocabulary {options.vocabulary} says which codec is used; leave one of them "
                "out."
            )
    if options.delay and options.vocabulary is not None:
        raise DataError(
            f"--delay: --vocabulary {options.vocabulary} says whether there is a delay; leave it out."
        )


def _tokenizer(survey: _Survey, spec: str) -> Tokenizer:
    size = bpe_size(spec)
    return train_bpe(survey.captions, size) if size else tokenizer_from_spec(spec)


def _given_codec(name: str, spec: str | None) -> Codec | None:
    """The codec of a folder; None where `spec` says how to train one or what codes there are."""
    if spec is None or _is_made_here(spec):
        return None
    codec = load_codec(spec)
    if codec.modality != name:
        raise DataError(f"--{name}-codec {spec}: a codec for {codec.modality}.")
    return codec


def _is_made_here(spec: str) -> bool:
    """Whether a spec says how to train a codec, or what codes there are; else it is a codec's folder."""
    return spec.split(":")[0] in ("patch", "spectral", "codes")


def _codes_spec(name: str, spec: str | None, first: int, delay: bool) -> Modality | None:
    """The range of `codes:...`, whose codec is not here."""
    if spec is None or not spec.startswith(GIVEN_CODES):
        return None
    _, size, *rest = spec.split(":")
    wanted = "codes:CODES:ROWSxCOLUMNS" if name == "image" else "codes:CODES[:CODEBOOKS]"
    try:
        grid, books = None, 1
        if name == "image":
            (shape,) = rest
            rows, columns = (int(number) for number in shape.split("x"))
            grid = (rows, columns)
        elif rest:
            (number,) = rest
            books = int(number)
        if min(int(size), books, *(grid or (1,))) < 1:
            raise ValueError
        return code_modality(name, first, (books, int(size)), spec, grid, delay)
    except ValueError:
        raise DataError(f"--{name}-codec {spec}: write {wanted}.") from None


def _train_codec(name: str, spec: str | None, survey: _Survey, seed: int) -> Codec:
    samples = survey.training[name]
    if name in survey.codes:
        raise DataError(
            f"{'some' if samples else 'all'} of the samples have {name} codes: say with --{name}-codec which codec "
            f"made them (its folder), or {'codes:CODES:ROWSxCOLUMNS' if name == 'image' else 'codes:CODES:CODEBOOKS'}."
        )
    kind, *numbers = (spec or ("patch:256:2" if name == "image" else "spectral:64")).split(":")
    wanted = {"image": ("patch", "patch:CODES:SIZE"), "audio": ("spectral", "spectral:CODES[:CODEBOOKS]")}[
        name
    ]
    if kind != wanted[0] or not all(number.isdigit() and int(number) for number in numbers):
        raise DataError(f"--{name}-codec {spec}: a codec's folder, or {wanted[1]}.")
    values = [int(number) for number in numbers]
    if name == "image" and len(values) == 2:
        return _train_patches(samples, values[0], values[1], seed)
    if name == "audio" and len(values) in (1, 2):
        return _train_frames(samples, values[0], values[1] if len(values) == 2 else 1, seed)
    raise DataError(f"--{name}-codec {spec}: a codec's folder, or {wanted[1]}.")


def _train_patches(samples: list[Sample], codes: int, patch: int, seed: int) -> Codec:
    first = samples[0].image()
    colours = 1 if first.ndim == 2 else 3
    images = [sample.image(colours) for sample in samples]
    for sample, image in zip(samples, images, strict=True):
        _same_size(sample, image, first.shape[:2])
    return PatchCodec.train(images, codes, patch, seed)


def _same_size(sample: Sample, image: np.ndarray, wanted: tuple[int, ...]) -> None:
    if image.shape[:2] != wanted:
        found, size = ("{} x {}".format(*shape[:2]) for shape in (image.shape, wanted))
        raise DataError(
            f"{sample.where}: an image of {found} pixels, the codec takes {size}. Resize the images to one size."
        )


def _train_frames(samples: list[Sample], codes: int, codebooks: int, seed: int) -> Codec:
    _, rate = samples[0].sound()
    window, hop = round(rate * WINDOW_SECONDS / 2) * 2, round(rate * HOP_SECONDS)
    frames = Frames(rate, window, hop, 0.0, rate / 2)
    return SpectralCodec.train([sample.sound(rate)[0] for sample in samples], codes, frames, codebooks, seed)


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


def _slot(source: Path, out: Path, options: PairOptions, modalities: Modalities) -> int:
    if options.text_slot is not None:
        return options.text_slot
    longest = 0
    for group in _groups(read_samples(source, out)):
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


def _second_pass(
    samples: Iterator[Sample],
    writers: dict[str, PairWriter],
    plan: tuple[Modalities, PairOptions, _Survey],
    report: Progress,
) -> None:
    modalities, options, survey = plan
    threshold, exception = int(options.validation_fraction * 2**64), survey.exception()
    done = 0
    for group in _groups(samples):
        texts = _text_ids(modalities, group)
        ids = {name: _encoded(modalities, name, group) for name in options.modalities()}
        for number, sample in enumerate(group):
            held_out = hash64(sample.key.encode(), options.seed) < threshold
            split = SPLITS[held_out != (threshold > 0 and sample.key == exception)]
            for task, writer in writers.items():
                other = next(name for name in TASKS[task] if name != "text")
                if number in ids[other]:
                    both = {"text": texts[number], other: ids[other][number]}
                    given, made = (both[name] for name in TASKS[task])
                    writer.write(split, given, made, len(sample.caption().encode()), sample.where)
        done += len(group)
        report("encoding", done, survey.samples)


def _text_ids(modalities: Modalities, group: list[Sample]) -> list[np.ndarray]:
    """The ids of a group's captions, without end-of-text."""
    try:
        return modalities.ids("text", [sample.caption() for sample in group], group[0].where)
    except DataError as error:
        if len(group) == 1:
            raise DataError(f"{group[0].where}: {error}") from None
        return [_text_ids(modalities, [sample])[0] for sample in group]  # which of them?


def _encoded(modalities: Modalities, name: str, group: list[Sample]) -> dict[int, np.ndarray]:
    """The ids of a group's images or sounds, by place in the group."""
    found: dict[int, np.ndarray] = {}
    places, samples = [], []
    for place, sample in enumerate(group):
        if name not in sample.modalities:
            continue
        codes = sample.codes(name, modalities.vocabulary.modality(name).codebooks)
        if codes is None:
            places.append(place)
            samples.append(_decoded(modalities.codec(name), name, sample))
        else:
            found[place] = _stored(modalities, name, codes, sample)
    if samples:
        for place, ids in zip(places, modalities.ids(name, samples, group[0].where), strict=True):
            found[place] = ids
    return found


def _decoded(codec: Any, name: str, sample: Sample) -> np.ndarray:
    if name == "audio":
        return sample.sound(codec.sample_rate)[0]
    image = sample.image(codec.colours)
    _same_size(sample, image, (codec.height, codec.width))
    return image


def _stored(modalities: Modalities, name: str, codes: np.ndarray, sample: Sample) -> np.ndarray:
    grid = modalities.vocabulary.modality(name).grid
    if grid is not None and codes.size != grid[0] * grid[1]:
        raise DataError(
            f"{sample.where}: {codes.size} {name} codes, the grid has {grid[0]} x {grid[1]}. Encode it at the size "
            "of the others."
        )
    return modalities.code_ids(name, codes, sample.where)
