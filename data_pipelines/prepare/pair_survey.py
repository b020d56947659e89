"""The first pass over captions with images or sounds: every sample checked, what is to be learned from seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from data_pipelines.errors import DataError
from data_pipelines.prepare.pair_codecs import (
    Settings,
)
from data_pipelines.prepare.pair_options import PairOptions
from data_pipelines.prepare.text import hash64
from data_pipelines.raw.files import Source
from data_pipelines.raw.report import Report, Tally
from data_pipelines.raw.samples import Found, Sample, read_samples
from data_pipelines.tokens.tokenizer_training import bpe_size
from data_pipelines.tokens.vocabulary import TASKS

CAPTION_CHARACTERS = 8_000_000
"""Of captions that a BPE is trained on."""
Progress = Callable[[str, int, int], None]


@dataclass
class Survey:
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


def survey_samples(
    source: Source, options: PairOptions, counts: tuple[Report, Found], show: Progress
) -> Survey:
    """Read every sample once. Raises DataError for one that is not whole, for none, and for keys that do not differ."""
    survey, (told, found) = Survey(), counts
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


def _refuse_no_samples(source: Source, survey: Survey, threshold: int, left_out: Tally) -> None:
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
