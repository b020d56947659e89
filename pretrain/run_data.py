"""The data of a run: opened, and what it decides about the model filled into the config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from data_pipelines.inspection.stats import first_words, sample_texts
from data_pipelines.rows.cut_rows import OpenSource, RowReader, Source, open_sources
from data_pipelines.rows.evaluation import bytes_per_token, evaluation_batches, evaluation_rows
from data_pipelines.rows.pair_lengths import refuse_long_pairs
from data_pipelines.rows.shared_vocabulary import vocabulary_of
from data_pipelines.rows.whole_rows import WholeEvaluation, WholeRowReader
from data_pipelines.stream.stream import dealt_batches
from data_pipelines.tasks import TaskRows, build_task
from data_pipelines.tokens.modalities import Modalities, codec_folders, load_modalities
from data_pipelines.tokens.tokenizer import Tokenizer
from data_pipelines.tokens.tokenizer_loading import load_tokenizer
from data_pipelines.tokens.vocabulary import Vocabulary, load_vocabulary
from models.own import named
from pretrain.config.validation import own_data_section
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch
    from data_pipelines.stream.stream import Rows
    from pretrain.config import Config
    from pretrain.run_folder import RunFolder

VOCABULARY_MULTIPLE = 64
"""An automatic vocabulary is rounded up to this: matrix units like it, and tensor-parallel ranks can share it."""
TASK_ROWS = 2048
"""Rows that judge a task where monitor.evaluate_rows is null: 0.05 % is one of them."""


@dataclass(frozen=True, kw_only=True)
class RunData(ABC):
    config: Config
    """With the vocabulary and everything that follows from it filled in."""
    train: Rows
    tokenizer: Tokenizer | None = None
    """What turns tokens of text alone into text; kept in the run's folder."""
    bytes_per_token: float | None = None
    """UTF-8 bytes of text per token of the validation rows, for bits per byte; None where they hold none."""

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Ranges of the modalities, for data that may have several."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of what the model's tokens mean: a checkpoint continues with the same one only."""

    @abstractmethod
    def describe(self) -> str:
        """What the tokens are, in a few words for people."""

    @abstractmethod
    def validation_batches(self, rows_per_batch: int, rank: int, world: int) -> Iterator[Batch]:
        """A rank's part of the rows that are evaluated during training."""

    @property
    @abstractmethod
    def validation_rows(self) -> tuple[int, int]:
        """How many rows are evaluated during training, and how many there are."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """What samples of a causal model continue, where there is a tokenizer."""
        return self.config.monitor.sample_prompts or ("",)

    def keep_in(self, folder: RunFolder) -> None:
        """What a trained model needs of it, to be used without the data."""
        if self.tokenizer is not None:
            folder.save_tokenizer(self.tokenizer)

    @property
    def validated(self) -> str:
        """The same for people."""
        rows, there = self.validation_rows
        return f"all {rows:,} rows" if rows == there else f"{rows:,} of {there:,} rows"


@dataclass(frozen=True, kw_only=True)
class TextData(RunData):
    """Documents of tokenised datasets."""

    tokenizer: Tokenizer
    validation: list[OpenSource]

    @property
    def fingerprint(self) -> str:
        return self.tokenizer.fingerprint

    def describe(self) -> str:
        return self.tokenizer.describe()

    def validation_batches(self, rows_per_batch: int, rank: int, world: int) -> Iterator[Batch]:
        return evaluation_batches(
            self.validation,
            self.config.data.sequence_length,
            rows_per_batch=rows_per_batch,
            rank=rank,
            world=world,
            limit_rows=self.config.monitor.evaluate_rows,
        )

    @property
    def validation_rows(self) -> tuple[int, int]:
        there = evaluation_rows(self.validation, self.config.data.sequence_length)
        return min(there, self.config.monitor.evaluate_rows or there), there

    @property
    def prompts(self) -> tuple[str, ...]:
        """What samples continue: monitor.sample_prompts, or nothing and the first words of a document."""
        if self.config.monitor.sample_prompts is not None:
            return self.config.monitor.sample_prompts
        source = self.validation[0]
        return (
            "",
            *(first_words(text) for text in sample_texts(source.dataset, self.tokenizer, source.split, 1)),
        )


@dataclass(frozen=True, kw_only=True)
class TaskData(RunData):
    """Sequences of a synthetic task, drawn as they are needed."""

    evaluation: TaskRows
    longer: TaskRows | None
    """The same task at monitor.evaluate_length."""

    @property
    def fingerprint(self) -> str:
        task = self.evaluation.task
        return f"{task.name} of {task.vocabulary} symbols"

    def describe(self) -> str:
        return f"task {self.fingerprint}"

    def validation_batches(self, rows_per_batch: int, rank: int, world: int) -> Iterator[Batch]:
        return self.batches(self.evaluation, rows_per_batch, rank, world)

    @property
    def validation_rows(self) -> tuple[int, int]:
        rows = self.config.monitor.evaluate_rows or TASK_ROWS
        return rows, rows

    def batches(self, rows: TaskRows, rows_per_batch: int, rank: int, world: int) -> Iterator[Batch]:
        """A rank's part of the first monitor.evaluate_rows of `rows`."""
        count = self.config.monitor.evaluate_rows or TASK_ROWS
        return dealt_batches(rows, count, min(rows_per_batch, count), rank, world)


@dataclass(frozen=True, kw_only=True)
class DiffusionData(RunData):
    """Whole documents of text, and of pairs with images and sounds."""

    train: WholeRowReader
    modalities: Modalities
    validation: WholeEvaluation

    @property
    def vocabulary(self) -> Vocabulary:
        return self.modalities.vocabulary

    @property
    def fingerprint(self) -> str:
        return self.vocabulary.fingerprint

    def describe(self) -> str:
        return self.modalities.describe()

    def keep_in(self, folder: RunFolder) -> None:
        folder.save_modalities(self.modalities)

    def validation_batches(self, rows_per_batch: int, rank: int, world: int) -> Iterator[Batch]:
        return self.validation.batches(rows_per_batch, rank, world)

    @property
    def validation_rows(self) -> tuple[int, int]:
        return self.validation.rows, self.validation.all_rows


class OwnData(RunData):
    """Data from outside, which an `OwnDataSection` names: what `RunData` asks for, and `open`."""

    @classmethod
    @abstractmethod
    def open(cls, config: Config, settings: Any) -> Self:
        """What the config's `data.own` says, with the model's vocabulary filled in (`with_vocabulary`).

        Raises:
            DataError or ConfigError: before anything is built, with what to do.
        """


def open_run_data(config: Config) -> RunData:
    """Open what the config's data section names. Raises DataError or ConfigError before anything is built."""
    if config.data.named_by == "own":
        return _open_own(config)
    if config.objective.rows == "whole":
        return open_diffusion(config)
    return _open_text(config) if config.data.named_by == "path" else open_task(config)


def _open_own(config: Config) -> OwnData:
    section = own_data_section(config.data)
    kind: type[OwnData] = named(section.opens)
    data = kind.open(config, section)
    if data.config.model.vocabulary is None:
        raise ConfigError(
            f"{section.opens}: `open` leaves model.vocabulary open; see `pretrain.run_data.with_vocabulary`"
        )
    return data


def with_vocabulary(config: Config, size: int, told: str, whose: str, *, rounded: bool = True) -> Config:
    """The config with the model's open settings filled in. size: ids that the data have, which the model's may exceed.

    told, whose: for the error, what has so many ids, and whose number null would take.
    rounded: whether null takes a little more (`VOCABULARY_MULTIPLE`).

    Raises:
        ConfigError: the model has fewer.
    """
    vocabulary = config.model.vocabulary
    if vocabulary is not None and vocabulary < size:
        raise ConfigError(
            f"model.vocabulary = {vocabulary}: {told}; use at least that, or null to take {whose}"
        )
    ids, length = rounded_vocabulary(size) if rounded else size, config.data.sequence_length
    return config.replace(model=config.model.resolved(vocabulary=ids, sequence_length=length))


def open_task(config: Config) -> TaskData:
    """The config's task. Raises DataError if it does not fit a sequence length."""
    assert config.data.task is not None
    task, seed = build_task(config.data.task), config.run.seed
    length, longer = config.data.sequence_length, config.monitor.evaluate_length
    told = f"task {task.name} has {task.vocabulary} symbols"
    config = with_vocabulary(config, task.vocabulary, told, "the task's", rounded=False)
    return TaskData(
        config=config,
        train=TaskRows(task, length, seed, "train"),
        evaluation=TaskRows(task, length, seed, "evaluate"),
        longer=None if longer is None else TaskRows(task, longer, seed, "evaluate"),
    )


def _open_text(config: Config) -> TextData:
    sources = [Source(path=source.path, weight=source.weight) for source in config.data.sources]
    train, validation = open_sources(sources, split="train"), open_sources(sources, split="validation")
    tokenizer = load_tokenizer(sources[0].path)
    size, length = tokenizer.vocabulary, config.data.sequence_length
    told = f"{sources[0].path} was built with a tokenizer of {size} tokens ({tokenizer.describe()})"
    config = with_vocabulary(config, size, told, "the tokenizer's")
    return TextData(
        config=config,
        tokenizer=tokenizer,
        train=RowReader(
            train,
            sequence_length=length,
            seed=config.run.seed,
            window_shards=config.data.shuffle_window_shards,
            shuffle_rows=config.data.shuffle_rows,
        ),
        validation=validation,
        bytes_per_token=bytes_per_token(validation, tokenizer, length, config.monitor.evaluate_rows),
    )


def open_diffusion(config: Config) -> DiffusionData:
    """The config's datasets of pairs and text, which must have one vocabulary."""
    sources = [Source(path=source.path, weight=source.weight) for source in config.data.sources]
    train, validation = open_sources(sources, split="train"), open_sources(sources, split="validation")
    modalities = modalities_of([source.path for source in config.data.sources], vocabulary_of(train))
    size, length = modalities.vocabulary.size, config.data.sequence_length
    told = f"{sources[0].path} has {size} ids, specials included ({modalities.describe()})"
    config = with_vocabulary(config, size, told, "the dataset's")
    refuse_long_pairs([*train, *validation], modalities.vocabulary, length)
    return DiffusionData(
        config=config,
        modalities=modalities,
        train=WholeRowReader(
            train,
            sequence_length=length,
            seed=config.run.seed,
            window_shards=config.data.shuffle_window_shards,
        ),
        validation=WholeEvaluation(validation, length, config.monitor.evaluate_rows),
    )


def modalities_of(paths: list[str], vocabulary: Vocabulary) -> Modalities:
    """Tokenizer and codecs of datasets with one vocabulary: those of the first folder that has the most codecs."""
    folders = [Path(path) for path in paths if load_vocabulary(Path(path)) is not None]
    if not folders:
        return Modalities(vocabulary, load_tokenizer(paths[0]))
    # One only: codecs may be large.
    return load_modalities(max(folders, key=lambda folder: len(codec_folders(folder))))


def rounded_vocabulary(size: int) -> int:
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
