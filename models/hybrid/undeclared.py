"""What mixers of one's own leave unsaid, found before a run is built: a block of each is made without storage."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from models.declared import DeclarationError, crossings_of, undivided_mixers
from models.hybrid.config import HybridConfig
from models.hybrid.family import build
from models.layers.config import Problem
from models.layers.language_model import LanguageModel


def unmade(config: HybridConfig, sequence_length: int) -> Iterator[Problem]:
    """(key, what is wrong) of every mixer that is not this project's and cannot be made or counted as it is set."""
    for name in _own(config):
        alone = _alone(name, config, sequence_length)
        try:
            alone.block_products(sequence_length)
        except NotImplementedError as error:
            yield f"own.{name}", str(error)
        try:
            _built(alone)
        except DeclarationError as error:
            yield f"own.{name}", str(error)
        except Exception as error:  # whatever its module does with these settings
            yield f"own.{name}", f"its module cannot be made: {type(error).__name__}: {error}"


def undeclared(
    config: HybridConfig, sequence_length: int, *, divided: bool, shared: bool
) -> Iterator[Problem]:
    """(key, what is missing) of every mixer that is not this project's, and does not say what these layouts need.

    divided: whether tensor ranks divide the layers. shared: whether context ranks share rows.
    """
    for name in _own(config):
        splits, crossing = _unsaid(repr(_alone(name, config, sequence_length)), name, config, sequence_length)
        if divided and splits is not None:
            yield f"own.{name}", f"{splits}; use parallel.tensor=1"
        if shared and crossing is not None:
            yield f"own.{name}", f"{crossing}; use parallel.context=1"


_KNOWN: dict[str, tuple[str | None, str | None]] = {}
"""Of layers that were looked at: many layouts are asked about the same."""


def _unsaid(key: str, name: str, config: HybridConfig, sequence_length: int) -> tuple[str | None, str | None]:
    """What its module does not say of how it is divided, and of where its positions meet; None where it does."""
    if key not in _KNOWN:
        _KNOWN[key] = _looked_at(_alone(name, config, sequence_length))
    return _KNOWN[key]


def _looked_at(config: HybridConfig) -> tuple[str | None, str | None]:
    try:
        model = _built(config)
    except Exception:  # `unmade` tells it
        return None, None
    silent = undivided_mixers(model)
    splits = f"{silent[0]} does not declare `splits`, by which tensor ranks divide it" if silent else None
    try:
        list(crossings_of(model))
    except DeclarationError as error:
        return splits, str(error)
    return splits, None


def _own(config: HybridConfig) -> list[str]:
    return [name for name in config.used if ":" in name]


def _alone(name: str, config: HybridConfig, sequence_length: int) -> HybridConfig:
    """One layer, of this mixer."""
    alone = HybridConfig(
        layers=1,
        width=config.width,
        mixers=(name,),
        mlp_width=config.mlp_width,
        norm_epsilon=config.norm_epsilon,
        initialisation=config.initialisation,
        own={name: config.own.get(name, {})},
    )
    return alone.resolved(vocabulary=8, sequence_length=sequence_length)


def _built(config: HybridConfig) -> LanguageModel:
    with torch.device("meta"):
        return build(config)
