"""Distributions small enough to know exactly, and denoisers that know them. B rows, T time, K outcomes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipelines.tokens.vocabulary import Modality, Vocabulary

WORDS = Vocabulary(text=Modality("text", 0, 3, "words"), eot=2)
"""Three words and nothing else."""
PAIRS = Vocabulary(
    text=Modality("text", 0, 20, "words"),
    eot=19,
    image=Modality("image", 20, 8, "patches", grid=(2, 2)),
    audio=Modality("audio", 28, 8, "frames", codebooks=2),
)


class ExactWords:
    """Text of `length` words of WORDS with a known joint distribution; predicts each place given the words there."""

    def __init__(self, length: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.outcomes_KT = torch.tensor(list(itertools.product(range(WORDS.text.size), repeat=length)))
        # Far from independent: the logits of whole texts are drawn, not those of words.
        self.p_K = (1.5 * torch.randn(len(self.outcomes_KT), generator=random)).double().softmax(0)
        self.calls = 0

    def __call__(
        self, tokens_BT: Tensor, segment_ids_BT: Tensor, positions_BT: Tensor, wanted_BT: Tensor
    ) -> Tensor:
        self.calls += 1
        known_BT1 = tokens_BT[:, :, None] == torch.arange(WORDS.text.size)
        fits_BKT = (tokens_BT[:, None] == self.outcomes_KT) | (tokens_BT[:, None] == WORDS.mask)
        assert (known_BT1.any(-1) | (tokens_BT == WORDS.mask)).all()
        weight_BK = fits_BKT.all(-1).double() * self.p_K
        one_hot_KTV = torch.nn.functional.one_hot(self.outcomes_KT, WORDS.size).double()
        p_BTV = torch.einsum("bk,ktv->btv", weight_BK, one_hot_KTV)
        # Specials and padding of the head get the best logits of all: they must be out of reach all the same.
        logits_BTV = p_BTV.log()
        logits_BTV[..., WORDS.text.size :] = 50.0
        return logits_BTV[wanted_BT]

    def counts(self, samples: Sequence[Tensor]) -> Tensor:
        """How often each outcome came, (K,)."""
        digits = torch.stack(list(samples))
        place_values = WORDS.text.size ** torch.arange(digits.shape[1] - 1, -1, -1)
        return torch.bincount((digits * place_values).sum(1), minlength=len(self.p_K))

    def chi_square(self, samples: Sequence[Tensor]) -> float:
        """Pearson's statistic, with len(p_K) - 1 degrees of freedom."""
        expected_K = self.p_K * len(samples)
        return float(((self.counts(samples) - expected_K) ** 2 / expected_K).sum())


class RandomLogits:
    """Any vocabulary: logits that are a fixed random function of the row's tokens and the place."""

    def __init__(self, vocabulary: Vocabulary, scale: float = 3.0) -> None:
        random = torch.Generator().manual_seed(5)
        self._table_VV = scale * torch.randn(vocabulary.size, vocabulary.size, generator=random)
        self._pad = vocabulary.pad
        self.calls: list[Tensor] = []

    def __call__(
        self, tokens_BT: Tensor, segment_ids_BT: Tensor, positions_BT: Tensor, wanted_BT: Tensor
    ) -> Tensor:
        self.calls.append(tokens_BT)
        own_BT = (segment_ids_BT == 0).float()
        mixed_BTV = self._table_VV[tokens_BT] * (own_BT * (1 + positions_BT).rsqrt())[..., None]
        row_BV = mixed_BTV.sum(1)
        return (row_BV[:, None] * (1 + 0.3 * positions_BT.float().sin())[..., None])[wanted_BT]
