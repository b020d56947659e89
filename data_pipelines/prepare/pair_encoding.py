"""The second pass over captions with images or sounds: each sample encoded and written for every task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial as bound

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.prepare.pair_codecs import (
    decoded,
)
from data_pipelines.prepare.pair_options import PairOptions
from data_pipelines.prepare.pair_survey import Progress, Survey
from data_pipelines.prepare.pair_writer import PairWriter
from data_pipelines.prepare.text import SPLITS, hash64, held_bytes
from data_pipelines.raw.files import Source
from data_pipelines.raw.report import Report, Tally
from data_pipelines.raw.samples import Sample, read_samples
from data_pipelines.tokens.modalities import Modalities
from data_pipelines.tokens.vocabulary import TASKS

GROUP = 256
"""Samples that are encoded together."""
JUDGED = 64
"""Images or sounds by which a codec is judged."""


def text_target_tokens(source: Source, options: PairOptions, modalities: Modalities) -> int:
    """Tokens of a text target: as told, else the longest caption's and its end-of-text."""
    if options.text_slot is not None:
        return options.text_slot
    longest = 0
    for group in _groups(_used_samples(source, options)):
        longest = max(longest, *(len(ids) for ids in _text_ids(modalities, group)))
    return longest + 1


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


def encode_samples(
    source: Source,
    writers: dict[str, PairWriter],
    plan: tuple[Modalities, PairOptions, Survey],
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
