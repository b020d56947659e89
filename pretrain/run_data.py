"""The data of a run: its datasets opened, and what they decide about the model filled into the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipelines.rows import OpenSource, RowReader, Source, open_sources
from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.config import Config

VOCABULARY_MULTIPLE = 64
"""An automatic vocabulary is rounded up to this: matrix units like it, and tensor-parallel ranks can share it."""


@dataclass(frozen=True)
class RunData:
    config: Config
    """With the vocabulary and everything that follows from it filled in."""
    tokenizer: Tokenizer
    train: RowReader
    validation: list[OpenSource]
    bytes_per_token: float
    """UTF-8 bytes of text per token of the validation split, for bits per byte."""


def open_run_data(config: Config) -> RunData:
    """Open every source of the config. Raises DataError or ConfigError before anything is built."""
    sources = [Source(path=source.path, weight=source.weight) for source in config.data.sources]
    train, validation = open_sources(sources, split="train"), open_sources(sources, split="validation")
    tokenizer = load_tokenizer(sources[0].path)
    vocabulary = config.model.vocabulary
    if vocabulary is None:
        vocabulary = rounded_vocabulary(tokenizer)
    elif vocabulary < tokenizer.vocabulary:
        raise ConfigError(
            f"model.vocabulary = {vocabulary}: {sources[0].path} was built with a tokenizer of {tokenizer.vocabulary} "
            f"tokens ({tokenizer.describe()}); use at least that, or null to take the tokenizer's"
        )
    length = config.data.sequence_length
    config = config.replace(model=config.model.resolved(vocabulary=vocabulary, sequence_length=length))
    return RunData(
        config=config,
        tokenizer=tokenizer,
        train=RowReader(
            train,
            sequence_length=length,
            seed=config.run.seed,
            window_shards=config.data.shuffle_window_shards,
        ),
        validation=validation,
        bytes_per_token=bytes_per_token(validation),
    )


def rounded_vocabulary(tokenizer: Tokenizer) -> int:
    return -(-tokenizer.vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def bytes_per_token(sources: list[OpenSource]) -> float:
    """UTF-8 bytes of text per token, end-of-text tokens counted: what turns nats per token into bits per byte."""
    return sum(source.text_bytes for source in sources) / sum(source.tokens for source in sources)
