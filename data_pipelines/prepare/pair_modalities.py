"""The vocabulary, tokenizer and codecs of a dataset of pairs, as given or learned, and the tasks that they allow."""

from __future__ import annotations

from data_pipelines.codecs import Codec
from data_pipelines.errors import DataError
from data_pipelines.prepare.pair_codecs import (
    codes_spec,
    given_codec,
    is_made_here,
    train_codec,
)
from data_pipelines.prepare.pair_options import PairOptions
from data_pipelines.prepare.pair_survey import Survey
from data_pipelines.prepare.text import given_tokenizer
from data_pipelines.tokens.modalities import Modalities, codec_modality
from data_pipelines.tokens.tokenizer import Tokenizer
from data_pipelines.tokens.tokenizer_training import bpe_size, train_bpe
from data_pipelines.tokens.vocabulary import TASKS, Modality, Vocabulary


def choose_modalities(survey: Survey, options: PairOptions, given: Modalities | None) -> Modalities:
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


def _refuse_unused(survey: Survey, options: PairOptions) -> None:
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


def _tokenizer(survey: Survey, spec: str, end_of_text: str | None) -> Tokenizer:
    return given_tokenizer(spec, end_of_text) or train_bpe(survey.captions, bpe_size(spec) or 0)


def choose_tasks(survey: Survey, options: PairOptions, vocabulary: Vocabulary) -> list[str]:
    """Those asked for, or all that the samples allow. Raises DataError for one that they or the vocabulary do not."""
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
