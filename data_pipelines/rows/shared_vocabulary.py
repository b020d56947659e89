"""The one vocabulary of the datasets that a run mixes."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.errors import DataError
from data_pipelines.rows.cut_rows import OpenSource
from data_pipelines.tokens.vocabulary import Modality, Vocabulary, load_vocabulary


def vocabulary_of(sources: Sequence[OpenSource]) -> Vocabulary:
    """The one vocabulary of some datasets: of pairs, or of plain text with the same tokenizer.

    Raises:
        DataError: two vocabularies, a text tokenizer other than the vocabulary's, or a vocabulary.json that is not
            the one that dataset.json was written for.
    """
    found: tuple[Vocabulary, OpenSource] | None = None
    for source in sources:
        dataset, vocabulary = source.dataset, load_vocabulary(source.dataset.path)
        written = None if dataset.ranges is None else dataset.ranges["fingerprint"]
        if written != (None if vocabulary is None else vocabulary.fingerprint):
            raise DataError(
                f"{dataset.path / 'vocabulary.json'}: not the one that dataset.json was written for. Put the original "
                "file back, or build the dataset again."
            )
        if vocabulary is None:
            continue
        if found is not None and found[0] != vocabulary:
            raise DataError(
                f"{dataset.path} and {found[1].dataset.path} have different vocabularies, so equal ids mean different "
                f"things. Build one of them again with --vocabulary of the other."
            )
        found = (vocabulary, source)
    if found is None:
        entry = sources[0].dataset.tokenizer
        text = Modality("text", 0, int(entry["vocabulary"]), str(entry["fingerprint"]))
        return Vocabulary(text=text, eot=int(entry["eot"]))
    for source in sources:
        tokenizer = str(source.dataset.tokenizer["fingerprint"])
        if tokenizer != found[0].text.codec:
            raise DataError(
                f"{source.dataset.path} was built with tokenizer {tokenizer[:12]}, the vocabulary of "
                f"{found[1].dataset.path} has {found[0].text.codec[:12]}. Build it again with --tokenizer "
                f"{found[1].dataset.path}."
            )
    return found[0]
