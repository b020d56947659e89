"""What is known of a run's model before it is built: its open settings filled in, its parameters counted.

Quick to import: the preflight asks, on every rank of every start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.errors import DataError
from data_pipelines.tasks import build_task
from data_pipelines.tokens.tokenizer_loading import load_tokenizer
from data_pipelines.tokens.vocabulary import Modality, Vocabulary, load_vocabulary
from models.layers.language_model import LanguageModel
from pretrain.config.validation import own_data_section
from pretrain.errors import ConfigError
from pretrain.parallel.stages import whole_model
from pretrain.run_data import rounded_vocabulary

if TYPE_CHECKING:
    from pretrain.config import Config


def count_parameters(config: Config) -> Mapping[str, int]:
    """Of a resolved config's model, by group."""
    return parameters_by_group(whole_model(config))


def parameters_by_group(model: LanguageModel) -> Mapping[str, int]:
    groups: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        groups[model.declared[name].group] += parameter.numel()
    return groups


def resolved(config: Config) -> Config:
    """With the model's open settings filled in, as the run will."""
    length = config.data.sequence_length
    model = config.model.resolved(vocabulary=planned_vocabulary(config), sequence_length=length)
    return replace(config, model=model)


def planned_vocabulary(config: Config) -> int:
    """The config's vocabulary, or that of its dataset if it is there already."""
    if config.model.vocabulary is not None:
        return int(config.model.vocabulary)
    if config.data.own is not None:
        size = own_data_section(config.data).planned_vocabulary()
        if size is None:
            message = (
                "null leaves it to data.own, which does not say it to a plan; name a number to plan with"
            )
            raise ConfigError(f"model.vocabulary: {message}, e.g. model.vocabulary=32768")
        return size
    if config.data.task is not None:
        return build_task(config.data.task).vocabulary
    paths = [source.path for source in config.data.sources]
    try:
        if config.objective.rows == "whole":
            known = [found for path in paths if (found := load_vocabulary(Path(path))) is not None]
            if known:
                return rounded_vocabulary(known[0].size)
            tokenizer = load_tokenizer(paths[0])
            text = Modality("text", 0, tokenizer.vocabulary, tokenizer.fingerprint)
            return rounded_vocabulary(Vocabulary(text, tokenizer.eot).size)
        return rounded_vocabulary(load_tokenizer(paths[0]).vocabulary)
    except DataError as error:
        raise ConfigError(
            f"model.vocabulary: null leaves it to the dataset, which is not there ({error}); build it first, or name a "
            "number to plan with, e.g. model.vocabulary=32768"
        ) from None
