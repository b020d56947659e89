"""What mixers of one's own leave unsaid, found before a run is built: a block of each is made without storage."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from models.declared import DeclarationError, crossings_of, undivided_mixers
from models.hybrid.config import HybridConfig
from models.hybrid.family import build
from models.layers.config import Problem
from models.layers.language_model import LanguageModel


def undeclared(
    config: HybridConfig, sequence_length: int, *, divided: bool, shared: bool
) -> Iterator[Problem]:
    """(key, what is missing) of every mixer that is not this project's.

    divided: whether tensor ranks divide the layers. shared: whether context ranks share rows.
    """
    for name in config.used:
        if ":" in name:
            for message in _of_mixer(name, config, sequence_length, divided=divided, shared=shared):
                yield f"own.{name}", message


def _of_mixer(
    name: str, config: HybridConfig, sequence_length: int, *, divided: bool, shared: bool
) -> Iterator[str]:
    alone = HybridConfig(
        layers=1,
        width=config.width,
        mixers=(name,),
        vocabulary=8,
        mlp_width=config.mlp_width,
        norm_epsilon=config.norm_epsilon,
        initialisation=config.initialisation,
        own={name: config.own.get(name, {})},
    ).resolved(vocabulary=8, sequence_length=sequence_length)
    try:
        alone.block_products(sequence_length)
    except NotImplementedError as error:
        yield str(error)
    try:
        with torch.device("meta"):
            model: LanguageModel = build(alone)
    except DeclarationError as error:
        yield str(error)
        return
    except Exception as error:  # whatever its module does with these settings
        yield f"its module cannot be made: {type(error).__name__}: {error}"
        return
    if divided and (silent := undivided_mixers(model)):
        yield f"{silent[0]} does not declare `splits`, by which tensor ranks divide it; use parallel.tensor=1"
    if shared:
        try:
            list(crossings_of(model))
        except DeclarationError as error:
            yield f"{error}; use parallel.context=1"
