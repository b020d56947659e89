"""Which tokens of a batch are masked, and what each of them weighs: a pure function of (seed, purpose, row).

It runs on the host, in the thread or process that makes the batch.
Shape suffixes: B rows, T time, D documents, N tokens to predict, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data_pipelines.stream.batch import Batch, Corruption
from data_pipelines.tokens.roles import CONDITION, TARGET, TASK_NAMES, Roles
from data_pipelines.tokens.vocabulary import MODALITIES, Vocabulary
from pretrain.config.objective import MaskedDiffusionSection, ModalitySection
from pretrain.objectives.counters import hashed, key, stratified, uniform
from pretrain.objectives.diffusion_schedules import (
    LINEAR,
    Drawn,
    Schedule,
    draw_counts,
    draw_ratios,
    schedule_of,
    training_weight,
)

RATIO_BUCKETS = 5
PARTS = (
    "elbo/all",
    *(f"elbo/{name}" for name in MODALITIES),
    *(f"elbo_task/{name}" for name in TASK_NAMES),
    *(f"cross_entropy/masked_{100 * n // RATIO_BUCKETS:02d}" for n in range(RATIO_BUCKETS)),
)
"""What is logged beside the loss. The last are cross-entropies of masked tokens by the share of their document that
is masked: masked_20 holds [20 %, 40 %)."""
FIRST_MODALITY = 1
FIRST_TASK = FIRST_MODALITY + len(MODALITIES)
FIRST_BUCKET = FIRST_TASK + len(TASK_NAMES)


@dataclass(frozen=True)
class Rules:
    """How to corrupt: the objective's section, or for evaluations the bound's own terms."""

    section: MaskedDiffusionSection
    evaluate: bool

    @property
    def joint(self) -> bool:
        return self.section.condition == "joint"

    @property
    def complementary(self) -> bool:
        return self.section.complementary and not self.evaluate

    @property
    def bernoulli(self) -> bool:
        return self.section.masking == "bernoulli" and not self.evaluate

    @property
    def hidden_share(self) -> float:
        """Share of the pairs of which one side is masked whole and not learned."""
        if self.evaluate:
            return 0.0
        return self.section.whole_modality if self.joint else self.section.condition_dropout

    def modality(self, number: int) -> tuple[ModalitySection, Schedule]:
        """Section and schedule of documents with this modality as their target."""
        section: ModalitySection = getattr(self.section, MODALITIES[number])
        if self.evaluate:
            return ModalitySection(), LINEAR
        return section, schedule_of(section)


@dataclass(frozen=True)
class RowNumbers:
    """Where the rows of a batch stand, (B,) each.

    data: the number that names the row's documents; the two rows of a complementary pair share it.
    source, draw: the row is the draw-th of its source.
    second: whether it is the second row of a pair.
    """

    data: np.ndarray
    source: np.ndarray
    draw: np.ndarray
    second: np.ndarray


@dataclass(frozen=True)
class Documents:
    """What each document of the batch is, (D,) each; of_BT maps tokens to documents."""

    of_BT: np.ndarray
    row: np.ndarray
    number: np.ndarray  # in the row
    task: np.ndarray
    target: np.ndarray  # modality of what is to be made; len(MODALITIES) where there is nothing
    hidden: np.ndarray  # the part that is masked whole and not learned; 0 for none
    n: np.ndarray  # tokens that may be masked and are learned


def corrupt(
    batch: Batch,
    roles: Roles,
    vocabulary: Vocabulary,
    rules: Rules,
    numbers: RowNumbers,
    purpose: np.uint64,
) -> Corruption:
    """Draw the masks of a batch of whole documents. `purpose`: from `counters.key`."""
    role_BT, modality_BT = roles.role.numpy(), roles.modality.numpy()
    documents = _documents(batch, roles, rules, numbers, purpose)
    hidden_BT = (role_BT != 0) & (role_BT == documents.hidden[documents.of_BT])
    may_BT = ((role_BT == TARGET) | (rules.joint & (role_BT == CONDITION))) & ~hidden_BT
    documents = _counted(documents, may_BT)
    amount_D, elbo_D, training_D = _draw(documents, rules, numbers, purpose)
    masked_BT = _masked(documents, may_BT, amount_D, rules, numbers, purpose)
    place_N = np.flatnonzero(masked_BT)
    document_N = documents.of_BT.reshape(-1)[place_N]
    counts_D = (
        documents.hidden == 0
    )  # a bound of Y given X, or of both: not of one whose other side is hidden
    weight_N = training_D[document_N] * _scales(rules)[modality_BT.reshape(-1)[place_N]]
    parts_N3 = np.stack(
        [
            FIRST_MODALITY + modality_BT.reshape(-1)[place_N],
            FIRST_TASK + documents.task[document_N],
            FIRST_BUCKET + _bucket(documents, amount_D, rules, numbers)[document_N],
        ],
        axis=1,
    )
    tokens_BT = batch.tokens.numpy()
    return Corruption(
        inputs=torch.from_numpy(np.where(masked_BT | hidden_BT, vocabulary.mask, tokens_BT)),
        places=torch.from_numpy(place_N),
        weights=torch.from_numpy(weight_N.astype(np.float32)),
        elbo_weights=torch.from_numpy((elbo_D * counts_D)[document_N].astype(np.float32)),
        loss_parts=torch.from_numpy(parts_N3.astype(np.uint8)),
        targets=torch.from_numpy(may_BT.sum(1, dtype=np.int32)),
        loss_part_targets=torch.from_numpy(
            _part_targets(documents, may_BT & counts_D[documents.of_BT], modality_BT, parts_N3, place_N)
        ),
        row_places=tuple(masked_BT.sum(1).tolist()),
    )


def _documents(
    batch: Batch, roles: Roles, rules: Rules, numbers: RowNumbers, purpose: np.uint64
) -> Documents:
    """The documents of the batch, and which of their sides are masked whole."""
    segment_BT = batch.segment_ids.numpy().astype(np.int64)
    most = int(segment_BT.max()) + 1
    rows = len(segment_BT)
    of_BT = segment_BT + np.arange(rows)[:, None] * most
    row, number = np.divmod(np.arange(rows * most), most)
    task, target, paired = (np.zeros(rows * most, np.int64) for _ in range(3))
    task[of_BT] = roles.task.numpy()
    role_BT = roles.role.numpy()
    target[:] = len(MODALITIES)
    target[of_BT[role_BT == TARGET]] = roles.modality.numpy()[role_BT == TARGET]
    paired[of_BT[role_BT == CONDITION]] = 1
    share = hashed(purpose ^ key("hidden"), numbers.data[row], number)
    side = hashed(purpose ^ key("side"), numbers.data[row], number) >> np.uint64(63)
    which = np.where(side == 1, TARGET, CONDITION) if rules.joint else CONDITION
    hidden = np.where((paired == 1) & (uniform(share) < rules.hidden_share), which, 0)
    return Documents(of_BT, row, number, task, target, hidden, np.zeros_like(row))


def _counted(documents: Documents, may_BT: np.ndarray) -> Documents:
    counts = np.bincount(documents.of_BT[may_BT], minlength=len(documents.row))
    return Documents(
        documents.of_BT,
        documents.row,
        documents.number,
        documents.task,
        documents.target,
        documents.hidden,
        counts,
    )


def _draw(
    documents: Documents, rules: Rules, numbers: RowNumbers, purpose: np.uint64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each document: how many or what share of its tokens the first row of a pair masks, and the weights of a
    masked token in the bound and in training (before the modality's scale), (D,) float64."""
    row = documents.row
    shift = hashed(purpose ^ key("ratio"), numbers.source[row])
    quantile_D = stratified(shift, numbers.draw[row], documents.number)
    amount, elbo, training = (np.zeros(len(row)) for _ in range(3))
    paired = rules.complementary
    for modality in range(len(MODALITIES)):
        here = np.flatnonzero((documents.target == modality) & (documents.n > 0))
        section, schedule = rules.modality(modality)
        second = numbers.second[row[here]]
        if rules.bernoulli:
            drawn: Drawn = draw_ratios(schedule, quantile_D[here], second, paired=paired)
        else:
            drawn = draw_counts(schedule, quantile_D[here], documents.n[here], second, paired=paired)
        amount[here], elbo[here] = drawn.amount, drawn.elbo_weight
        training[here] = training_weight(section, schedule, drawn.elbo_weight, paired=paired)
    return amount, elbo, training


def _masked(
    documents: Documents,
    may_BT: np.ndarray,
    amount_D: np.ndarray,
    rules: Rules,
    numbers: RowNumbers,
    purpose: np.uint64,
) -> np.ndarray:
    """(B, T) bool. Every token has a random number; those below the ratio are masked, or the lowest of the document.
    The second row of a pair masks the others."""
    place_M = np.flatnonzero(may_BT)
    row_M, time_M = np.divmod(place_M, may_BT.shape[1])
    bits_M = hashed(purpose ^ key("token"), numbers.data[row_M], time_M)
    document_M = documents.of_BT.reshape(-1)[place_M]
    if rules.bernoulli:
        chosen_M = uniform(bits_M) < amount_D[document_M]
    else:
        order = np.lexsort((bits_M, document_M))
        first = np.cumsum(documents.n) - documents.n
        rank_M = np.empty(len(place_M), np.int64)
        rank_M[order] = np.arange(len(place_M)) - first[document_M[order]]
        chosen_M = rank_M < amount_D[document_M]
    masked_BT = np.zeros(may_BT.shape, np.bool_)
    masked_BT.reshape(-1)[place_M] = chosen_M ^ numbers.second[row_M]
    return masked_BT


def _scales(rules: Rules) -> np.ndarray:
    """The scale of each modality."""
    return np.array([rules.modality(number)[0].scale for number in range(len(MODALITIES))])


def _bucket(documents: Documents, amount_D: np.ndarray, rules: Rules, numbers: RowNumbers) -> np.ndarray:
    """Which bucket each document's masked share lies in."""
    share = amount_D if rules.bernoulli else amount_D / np.maximum(documents.n, 1)
    share = np.where(numbers.second[documents.row], 1 - share, share)
    return np.clip((share * RATIO_BUCKETS).astype(np.int64), 0, RATIO_BUCKETS - 1)


def _part_targets(
    documents: Documents,
    counted_BT: np.ndarray,
    modality_BT: np.ndarray,
    parts_N3: np.ndarray,
    place_N: np.ndarray,
) -> np.ndarray:
    """(B, P) int32: by what the parts are divided. Bounds: tokens that may be masked; buckets: masked tokens."""
    rows, time = counted_BT.shape
    counts_BP = np.zeros((rows, len(PARTS)), np.int32)
    row, place = np.nonzero(counted_BT)
    counts_BP[:, 0] = counted_BT.sum(1)
    np.add.at(counts_BP, (row, FIRST_MODALITY + modality_BT[row, place]), 1)
    np.add.at(counts_BP, (row, FIRST_TASK + documents.task[documents.of_BT[row, place]]), 1)
    np.add.at(counts_BP, (place_N // time, parts_N3[:, 2]), 1)
    return counts_BP
