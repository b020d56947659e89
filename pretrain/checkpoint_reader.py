"""A trained model out of a run folder, for generation and evaluation: no engine, no process group."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipelines.tokens.modalities import Modalities
from data_pipelines.tokens.tokenizer import Tokenizer
from models import families
from pretrain.checkpoint import CheckpointStore
from pretrain.checkpoint.steps import step_name, telling_how_to_restore, verify_step
from pretrain.checkpoint_meta import as_of_today, check_meta
from pretrain.config import Config, config_from_dict
from pretrain.errors import CheckpointError, UserError
from pretrain.parallel.ranks import choose_device, ranks_from_environment
from pretrain.run_folder import RunFolder
from pretrain.typed import typed

logger = logging.getLogger(__name__)

FIRST_TOKENS_TRAINED = 2
"""The row order from which on they are."""


@dataclass(frozen=True)
class TrainedModel:
    model: nn.Module
    text_tokenizer: Tokenizer | None
    """None for a model of a synthetic task, and of data of one's own that have none."""
    config: Config
    """As it was when the checkpoint was saved."""
    step: int
    path: Path
    device: torch.device
    modalities: Modalities | None = None
    """Vocabulary, tokenizer and codecs of a model of masked diffusion."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns the model's tokens into text. Raises UserError for a model of a synthetic task."""
        if self.text_tokenizer is None:
            data = self.config.data
            what = (
                f"the synthetic task {data.task['name']}" if data.task else f"{(data.own or {}).get('name')}"
            )
            raise UserError(
                f"{self.path}: this model was trained on {what}, not on text; "
                f"`{typed('evaluate', self.path.parent.parent)}` measures its accuracy"
            )
        return self.text_tokenizer


def load_trained_model(folder: RunFolder, step: int | None = None, device: str = "auto") -> TrainedModel:
    """The model of the run's newest whole checkpoint, or of the one at `step`, in fp32.

    Raises CheckpointError if there is none.
    """
    store = CheckpointStore(folder.checkpoints, group=None, keep_last=1, keep_every_steps=None)
    path = store.latest() if step is None else folder.checkpoints / step_name(step)
    if path is None or not path.is_dir():
        there = ", ".join(str(info.step) for info in store.steps()) or "none"
        wanted = "no whole checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"{folder.checkpoints}: {wanted}; steps there: {there}")
    if step is not None:
        with telling_how_to_restore(path):
            verify_step(path, checksums=False)
    meta = as_of_today(store.read_meta(path))
    check_meta(meta, path)
    values, monitor = meta["config"], meta["config"].get("monitor")
    if isinstance(monitor, dict):  # the modules of hooks are for training alone, and need not be here
        values = {**values, "monitor": {**monitor, "hooks": {}}}
    config = config_from_dict(values, origin=str(path))
    is_text = config.objective.scores_text and config.data.named_by == "path"
    if is_text and meta.get("row_order", 1) < FIRST_TOKENS_TRAINED:
        logger.warning(
            "%s was trained by an earlier version, in which the first token of a document was never predicted: this "
            "model does not know how a text begins, and its loss on first tokens is not to be judged",
            path,
        )
    chosen = choose_device(device, ranks_from_environment({}))
    with chosen:
        model = families[config.model.family].build(config.model)
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    store.load_weights(path, weights, checksums=step is not None)  # `latest` has compared them already
    model.eval()
    modalities = load_run_modalities(folder, meta, path) if config.objective.rows == "whole" else None
    has_tokenizer = config.data.named_by == "path" or folder.has_tokenizer
    tokenizer = load_run_tokenizer(folder, meta, path) if has_tokenizer else None
    return TrainedModel(model, tokenizer, config, meta["step"], path, chosen, modalities)


def load_run_tokenizer(folder: RunFolder, meta: dict[str, Any], path: Path) -> Tokenizer:
    """What the run folder keeps. Raises CheckpointError if it is not what the checkpoint was trained with."""
    tokenizer = folder.load_tokenizer()
    wanted = meta.get("tokenizer")
    if "vocabulary" not in meta or meta["vocabulary"] is not None or wanted is None:
        return tokenizer  # of several modalities, whose vocabulary is compared, tokenizer and all
    if tokenizer.fingerprint != wanted:
        raise CheckpointError(
            f"{path}: trained with the tokenizer {str(wanted)[:12]}, and {folder.tokenizer} has "
            f"{tokenizer.fingerprint[:12]}; put the original file back: any dataset of the run has it"
        )
    return tokenizer


def load_run_modalities(folder: RunFolder, meta: dict[str, Any], path: Path) -> Modalities:
    """What the run folder keeps. Raises CheckpointError if it is not what the checkpoint was trained with."""
    modalities = folder.load_modalities()
    found = modalities.vocabulary.fingerprint
    if found != meta.get("tokenizer"):
        raise CheckpointError(
            f"{path}: trained with the vocabulary {str(meta.get('tokenizer'))[:12]}, and {folder.tokenizer} has "
            f"{found[:12]}; put the original files back: any dataset of the run has them"
        )
    return modalities
