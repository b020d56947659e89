"""The likelihood bound of a model of masked diffusion, with its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipelines.rows.cut_rows import Source, open_sources
from data_pipelines.rows.pair_lengths import refuse_long_pairs
from data_pipelines.rows.shared_vocabulary import vocabulary_of
from data_pipelines.rows.whole_rows import WholeEvaluation
from data_pipelines.stream.batch import Batch
from data_pipelines.tokens.vocabulary import Vocabulary
from pretrain.checkpoint_reader import TrainedModel
from pretrain.errors import UserError
from pretrain.evaluation import Watch, just_batches
from pretrain.objectives.masked_diffusion import MaskedDiffusion

DRAWS = 8
"""Mask draws per row, where nobody asked for another number."""
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, of 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Bound:
    """Nats per target token, averaged over mask draws.

    half_interval: half the 95 % confidence interval over the draws, which are independent of each other while each
        is stratified over the rows; None of a single draw.
    tokens: target tokens in a draw.
    """

    nats_per_token: float
    half_interval: float | None
    tokens: int


@torch.no_grad()
def evaluate_bound(
    trained: TrainedModel,
    paths: list[str],
    split: str,
    *,
    draws: int = DRAWS,
    limit_rows: int | None = None,
    rows_per_batch: int = 8,
    watch: Watch = just_batches,
) -> dict[str, Bound]:
    """The bound over all of a split, by modality and by task: `elbo/image`, `elbo_task/text-to-image` and so on.

    Raises:
        UserError: the datasets' vocabulary is not the model's, nor plain text by its tokenizer.
    """
    assert trained.modalities is not None, "only masked diffusion has a bound"
    ours, config = trained.modalities.vocabulary, trained.config
    sources = open_sources([Source(path=path) for path in paths], split=split)
    theirs = vocabulary_of(sources)
    if theirs != ours and theirs != text_part(ours):
        raise UserError(
            f"{', '.join(paths)}: token ids of the vocabulary {theirs.fingerprint[:12]}, the run has "
            f"{ours.fingerprint[:12]} ({trained.modalities.describe()}); build the data with the run's tokenizer and "
            "codecs"
        )
    objective = MaskedDiffusion.build(config, ours)
    refuse_long_pairs(sources, theirs, config.data.sequence_length)
    rows = WholeEvaluation(sources, config.data.sequence_length, limit_rows)
    sums = torch.zeros((draws, len(objective.parts), 2), dtype=torch.float64, device=trained.device)
    for batch in watch(rows.batches(rows_per_batch), -(-rows.rows // rows_per_batch)):
        padded = repadded(batch, theirs.pad, ours.pad)
        for draw, corrupted in enumerate(objective.evaluation_batches([padded], range(draws))):
            sums[draw] += objective(trained.model, corrupted.to(trained.device)).parts
    return {
        name: _bound(sums[:, number].cpu())
        for number, name in enumerate(objective.parts)
        if name.startswith("elbo") and sums[0, number, 1]
    }


def text_part(vocabulary: Vocabulary) -> Vocabulary:
    """What `vocabulary_of` takes plain text by the same tokenizer for."""
    return Vocabulary(text=vocabulary.text, eot=vocabulary.eot)


def repadded(batch: Batch, theirs: int, ours: int) -> Batch:
    """With our padding for theirs: the ids after the text's are others in a vocabulary of text alone."""
    if theirs == ours:
        return batch
    return replace(batch, sequences=torch.where(batch.sequences == theirs, ours, batch.sequences))


def _bound(sums_D2: Tensor) -> Bound:
    """From sums and weights of D draws."""
    means = sums_D2[:, 0] / sums_D2[:, 1]
    draws = len(means)
    half = None
    if draws > 1:
        half = float(_t_975(draws - 1) * means.std() / math.sqrt(draws))
    return Bound(float(means.mean()), half, int(sums_D2[0, 1]))


def _t_975(freedom: int) -> float:
    """Student's t at 97.5 %, beyond the table by its expansion in 1 / freedom, right to 0.001."""
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
