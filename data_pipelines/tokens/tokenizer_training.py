"""Tokenizers that are made here: byte-level BPE learned from texts, and closed vocabularies of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from data_pipelines.errors import DataError
from data_pipelines.tokens.bpe_tokenizer import BpeTokenizer
from data_pipelines.tokens.tokenizer_files import (
    EOT,
)

UNBROKEN = 256
"""Characters without a blank (or blanks alone) that a BPE is trained on in one piece. The trainer's time grows with the
square of a piece's length; words of people are far below."""
_RUN = re.compile(rf"\S{{{UNBROKEN + 1},}}|\s{{{UNBROKEN + 1},}}")


def train_bpe(texts: Iterable[str], vocabulary: int) -> BpeTokenizer:
    """Train a byte-level BPE of `vocabulary` ids, the end-of-text token and the 256 bytes among them.

    A corpus too small for that many merges gives a smaller vocabulary.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trained = HuggingFaceTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator((piece for text in texts for piece in unbroken_pieces(text)), trainer)
    return BpeTokenizer(trained.to_str(), "the trained tokenizer")


def unbroken_pieces(text: str) -> Iterator[str]:
    """A text in pieces, in which nothing longer than UNBROKEN characters stands without a blank, or is all blank."""
    start = 0
    for run in _RUN.finditer(text):
        for place in range(run.start() + UNBROKEN, run.end(), UNBROKEN):
            yield text[start:place]
            start = place
    yield text[start:]


def word_tokenizer(words: Sequence[str]) -> BpeTokenizer:
    """A closed vocabulary of whole words, split at spaces; text with any other word is an error."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import models, pre_tokenizers

    made = HuggingFaceTokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=""))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([EOT])
    return BpeTokenizer(made.to_str(), "the word tokenizer")


def bpe_size(spec: str) -> int | None:
    """N of `bpe:N`, or None if `spec` is something else.

    Raises:
        DataError: N is not a number, or too small to hold the bytes.
    """
    kind, colon, size = spec.partition(":")
    if kind != "bpe":
        return None
    if not colon or not size.isdigit() or int(size) < 257:
        raise DataError(f"tokenizer {spec!r}: write bpe:N with N at least 257 (256 bytes and end of text).")
    return int(size)
