"""Masked diffusion: predict masked tokens from those that are shown, over text, image and audio.

A batch comes with its masks (`Corruption`), drawn where it was made; here they become a loss.
Shape suffixes: B rows, T time, C model width, N tokens to predict, V vocabulary, P parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.stream.batch import Batch, Corruption, Cursor
from data_pipelines.tokens.roles import grid_positions, read_roles
from data_pipelines.tokens.vocabulary import Vocabulary
from models.layers.head import Head
from models.layers.loss import default_chunk_tokens, each_cross_entropy
from pretrain.config.objective import MaskedDiffusionSection
from pretrain.objectives.base import LossSum, Objective
from pretrain.objectives.corruption import FIRST_BUCKET, PARTS, RowNumbers, Rules, corrupt
from pretrain.objectives.counters import key

if TYPE_CHECKING:
    from data_pipelines.rows.mixing import Mixture
    from pretrain.config import Config


PART_SCALARS: Mapping[str, str] = {
    "elbo/all": "The likelihood bound in nats per target token, whatever weights are trained.",
    "elbo/text": "The bound over text tokens.",
    "elbo/image": "The bound over image tokens.",
    "elbo/audio": "The bound over audio tokens.",
    "elbo_task/text": "The bound over documents of plain text.",
    "elbo_task/text-to-image": "The bound over images given their texts.",
    "elbo_task/image-to-text": "The bound over texts given their images.",
    "elbo_task/text-to-audio": "The bound over sounds given their texts.",
    "elbo_task/audio-to-text": "The bound over texts given their sounds.",
    "cross_entropy/masked_00": "Nats per masked token where less than 20 % of the document is masked.",
    "cross_entropy/masked_20": "Nats per masked token where 20 to 40 % are masked.",
    "cross_entropy/masked_40": "Nats per masked token where 40 to 60 % are masked.",
    "cross_entropy/masked_60": "Nats per masked token where 60 to 80 % are masked.",
    "cross_entropy/masked_80": "Nats per masked token where 80 % or more are masked.",
}
"""What is logged beside the loss: `PARTS`, with their meaning. An evaluation has no dropped conditions and evenly drawn
counts."""
PLANNED_SHARE = 0.5
"""Of the tokens, those that a plan takes for masked: the mean of the linear schedule."""


class MixedRows(Protocol):
    """Rows of several sources, such as `WholeRowReader`'s."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def mixture(self) -> Mixture: ...

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch: ...


def corruption_of(batch: Batch) -> Corruption:
    assert batch.corruption is not None, "this batch did not come from CorruptedRows"
    return batch.corruption


@dataclass(frozen=True)
class MaskedDiffusion(Objective):
    """The objective.

    position_axes: the model's; with 2, batches get the positions of `grid_positions`.
    """

    section: MaskedDiffusionSection
    vocabulary: Vocabulary
    seed: int
    position_axes: int = 1

    scalars: ClassVar[Mapping[str, str]] = PART_SCALARS

    @classmethod
    def build(cls, config: Config, vocabulary: Vocabulary | None) -> Self:
        assert isinstance(config.objective, MaskedDiffusionSection)
        assert vocabulary is not None, "masked diffusion is for data with a vocabulary"
        return cls(config.objective, vocabulary, config.run.seed, config.model.position_axes)

    def rows(self, rows: MixedRows) -> CorruptedRows:
        """What training reads instead of `rows`."""
        return CorruptedRows(rows, self)

    def evaluation_batches(
        self, batches: Iterable[Batch], draws: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Each batch once per mask draw, for the bound in its own terms: conditions shown, counts uniform.

        draws: their numbers; None: the first `evaluation_draws`. A draw is stratified over the rows, and independent
            of the others.
        """
        for batch in batches:
            for draw in range(self.section.evaluation_draws) if draws is None else draws:
                numbers = batch.rows.numpy()
                none = np.zeros_like(numbers)
                where = RowNumbers(numbers, none, numbers, none.astype(np.bool_))
                yield self.corrupted(batch, where, evaluate=True, purpose=key(self.seed, "evaluate", draw))

    def corrupted(self, batch: Batch, numbers: RowNumbers, *, evaluate: bool, purpose: np.uint64) -> Batch:
        """The batch with its masks."""
        roles = read_roles(self.vocabulary, batch.tokens, batch.positions.long())
        rules = Rules(self.section, evaluate)
        corruption = corrupt(batch, roles, self.vocabulary, rules, numbers, purpose)
        positions = batch.positions
        if self.position_axes == 2:
            positions = grid_positions(self.vocabulary, roles, positions).to(positions.dtype)
        return dataclasses.replace(batch, corruption=corruption, positions=positions)

    def planned(self, batch: Batch) -> Batch:
        rows, length = batch.tokens.shape
        each = int(PLANNED_SHARE * length)
        count = rows * each
        corruption = Corruption(
            inputs=torch.zeros((rows, length), dtype=torch.int64),
            places=torch.zeros(count, dtype=torch.int64),
            weights=torch.ones(count),
            elbo_weights=torch.ones(count),
            loss_parts=torch.zeros((count, 3), dtype=torch.uint8),
            targets=torch.zeros(rows, dtype=torch.int32),
            loss_part_targets=torch.zeros((rows, len(PARTS)), dtype=torch.int32),
            row_places=(each,) * rows,
        )
        return dataclasses.replace(batch, corruption=corruption)

    def weight(self, batch: Batch) -> Tensor:
        """Tokens that are learned, masked in this draw or not."""
        return corruption_of(batch).targets.sum(dtype=torch.float32)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return corruption_of(batch).inputs, batch.segment_ids, batch.positions

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        corruption = corruption_of(batch)
        hidden_BTC = model(*self.inputs(batch))
        head: Head = model.head  # type: ignore[assignment]
        ce_N = each_cross_entropy(
            head,
            hidden_BTC.flatten(0, 1).index_select(0, corruption.places),
            batch.tokens.flatten().index_select(0, corruption.places),
            # [MASK] and the other specials stand last, with the ids that round the vocabulary up: none is predicted.
            size=self.vocabulary.first_special,
            chunk_tokens=default_chunk_tokens(head.columns),
            positions=batch.tokens.numel(),
        )
        loss = (ce_N * corruption.weights).sum()
        nats_N = ce_N.detach().double()
        elbo_N = nats_N * corruption.elbo_weights
        sums_P = torch.zeros(len(PARTS), dtype=torch.float64, device=ce_N.device)
        sums_P[0] = elbo_N.sum()
        parts_3N = corruption.loss_parts.long().T
        for part_N, values_N in zip(parts_3N, (elbo_N, elbo_N, nats_N), strict=True):
            sums_P.index_add_(0, part_N, values_N)
        weights_P = corruption.loss_part_targets.sum(0, dtype=torch.float64)
        return LossSum(total=loss, loss=loss.detach(), parts=torch.stack((sums_P, weights_P), dim=1))


class CorruptedRows:
    """Rows with their masks. Can be pickled, if the rows can.

    Of complementary pairs, rows 2j and 2j + 1 hold the documents of row j.
    Mask ratios are stratified over the rows that a source gives to a step, whatever the mixture: a document's quantile
    is a Kronecker sequence in (which draw of its source the row is, which document of the row it is).
    """

    def __init__(self, rows: MixedRows, objective: MaskedDiffusion) -> None:
        self._rows, self._objective = rows, objective
        self._paired = objective.section.complementary
        self._purpose = key(objective.seed, "train")
        self.fingerprint = rows.fingerprint
        self.refused: dict[str, str] = {}
        if self._paired:
            self.fingerprint = hashlib.sha256(f"{rows.fingerprint} in pairs".encode()).hexdigest()

    def batch(self, rows: Sequence[int], cursor: Cursor | None = None) -> Batch:
        """The rows with these numbers, in this order."""
        numbers = np.asarray(rows, np.int64)
        data = numbers // 2 if self._paired else numbers
        second = numbers % 2 == 1 if self._paired else np.zeros(len(numbers), np.bool_)
        cursor = cursor or Cursor(int(numbers.max()) + 1, self.fingerprint)
        if self._paired:
            unique, places = np.unique(data, return_inverse=True)
            clean = self._rows.batch(unique.tolist(), cursor).take(torch.from_numpy(places))
        else:
            clean = self._rows.batch(rows, cursor)
        clean = dataclasses.replace(clean, rows=torch.from_numpy(numbers))
        source, draw = self._rows.mixture.draws(data)
        where = RowNumbers(data, source, draw, second)
        return self._objective.corrupted(clean, where, evaluate=False, purpose=self._purpose)


assert FIRST_BUCKET < len(PARTS) < 256, "part numbers are uint8"
