"""Sampling from a masked-diffusion model: documents with [MASK]s anywhere, filled in step by step.

Every sample has its own plan and its own random numbers, so what stands beside it in a batch changes nothing of it
but rounding. What was given is never touched.

Shape suffixes: B rows, T time, N places that are asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipelines.tokens.vocabulary import Vocabulary
from pretrain.generate.canvas import Canvas
from pretrain.generate.draw import draw
from pretrain.generate.settings import SamplerSettings
from pretrain.generate.unmasking import Unmasking

Agree = Callable[[Tensor], Tensor]
"""Makes all ranks go on with one rank's tokens, where several sample together."""


LOGIT_VALUES = 2**28
"""So many logits at once, 1 GiB of them in fp32, unless one sample has more."""


class Denoiser(Protocol):
    """A model that predicts masked tokens."""

    def __call__(
        self, tokens_BT: Tensor, segment_ids_BT: Tensor, positions_BT: Tensor, wanted_BT: Tensor
    ) -> Tensor:
        """Logits (N, V) of the places where `wanted_BT` is True, row by row from the left."""
        ...


class Sampler:
    """How one kind of sample is made.

    Args:
        device: of the denoiser.
        agree: called with all tokens after each forward pass, on the CPU.
        rows_at_once: samples per forward pass; None: as many as LOGIT_VALUES allows, at most 16.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        vocabulary: Vocabulary,
        settings: SamplerSettings,
        device: torch.device,
        *,
        agree: Agree = torch.Tensor.clone,
        rows_at_once: int | None = None,
    ) -> None:
        self._denoiser = denoiser
        self._vocabulary = vocabulary
        self._settings = settings
        self._device = device
        self._agree = agree
        self._rows_at_once = rows_at_once

    @torch.no_grad()
    def __call__(self, canvases: Sequence[Canvas], first_number: int = 0) -> list[Tensor]:
        """The canvases with every [MASK] filled, int64 on the CPU.

        first_number: of the first canvas among the samples of the settings' seed. Sample i of a seed is the same in
            any batch, on the same kind of device.
        """
        filled: list[Tensor] = []
        rows = self._rows_at_once or self._fitting_rows(canvases)
        for start in range(0, len(canvases), rows):
            filled += self._together(canvases[start : start + rows], first_number + start)
        return filled

    def _fitting_rows(self, canvases: Sequence[Canvas]) -> int:
        masked = max((int((one.tokens_T == self._vocabulary.mask).sum()) for one in canvases), default=0)
        values = max(1, masked) * self._vocabulary.size * (1 if self._settings.guidance == 1 else 2)
        return min(16, max(1, LOGIT_VALUES // values))

    def _together(self, canvases: Sequence[Canvas], first_number: int) -> list[Tensor]:
        seeds = [sample_seeds(self._settings.seed, first_number + i) for i in range(len(canvases))]
        mask = self._vocabulary.mask
        samples = [
            Unmasking(one, mask, self._settings, order)
            for one, (order, _) in zip(canvases, seeds, strict=True)
        ]
        randoms = [torch.Generator(self._device).manual_seed(tokens) for _, tokens in seeds]
        going = list(range(len(samples)))
        while going:
            # Each goes to its own next step with a token, so that a forward pass serves all of them.
            places = {i: samples[i].next_places() for i in going}
            wanted = {i: found for i, found in places.items() if found is not None}
            going = list(wanted)
            if going:
                logits = self._logits([samples[i] for i in going], list(wanted.values()))
                for i, (given_NV, unconditional_NV) in zip(going, logits, strict=True):
                    ranges_N2 = samples[i].canvas.ranges_T2[torch.from_numpy(wanted[i])]
                    drawn = draw(given_NV, unconditional_NV, ranges_N2, self._settings, randoms[i])
                    samples[i].fill(drawn[0].cpu().numpy(), drawn[1].cpu().numpy())
                self._agree_on([samples[i] for i in going])
        return [torch.from_numpy(one.tokens_T) for one in samples]

    def _logits(
        self, samples: list[Unmasking], wanted: list[np.ndarray]
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Per sample: logits (N, V) of its wanted places given the condition, and without it if there is guidance;
        both in one forward pass."""
        documents = [torch.from_numpy(one.tokens_T) for one in samples]
        guided = self._settings.guidance != 1
        if guided:
            hidden = [one.canvas.condition_T for one in samples]
            mask = self._vocabulary.mask
            documents += [row.masked_fill(part, mask) for row, part in zip(documents, hidden, strict=True)]
            wanted = wanted * 2
        tokens_BT, segment_ids_BT, positions_BT = pad_rows(documents, self._vocabulary.pad)
        wanted_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        for row, places in enumerate(wanted):
            wanted_BT[row, torch.from_numpy(places)] = True
        batch = (tokens_BT, segment_ids_BT, positions_BT, wanted_BT)
        logits_NV = self._denoiser(*(tensor.to(self._device) for tensor in batch))
        parts = logits_NV.split([len(places) for places in wanted])
        if not guided:
            return [(part, None) for part in parts]
        return list(zip(parts[: len(samples)], parts[len(samples) :], strict=True))

    def _agree_on(self, samples: list[Unmasking]) -> None:
        """Rounding may differ between ranks, and with it what they drew."""
        tokens = self._agree(torch.cat([torch.from_numpy(one.tokens_T) for one in samples]))
        for one, part in zip(samples, tokens.split([len(one.tokens_T) for one in samples]), strict=True):
            one.tokens_T[:] = part.numpy()


def sample_seeds(seed: int, number: int) -> tuple[int, int]:
    """Seeds of one sample's order of places and of its tokens; unlike with sums, no two samples share them."""
    order, tokens = np.random.SeedSequence([seed, number]).generate_state(2, np.uint64) >> np.uint64(1)
    return int(order), int(tokens)


def pad_rows(documents: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Documents as rows of a batch: tokens, segment ids and positions (B, T). The filling is a document of its own,
    which no other sees."""
    longest = max(len(document) for document in documents)
    tokens_BT = torch.full((len(documents), longest), pad)
    segment_ids_BT = torch.zeros_like(tokens_BT)
    positions_BT = torch.arange(longest).repeat(len(documents), 1)
    for row, document in enumerate(documents):
        tokens_BT[row, : len(document)] = document
        segment_ids_BT[row, len(document) :] = 1
        positions_BT[row, len(document) :] -= len(document)
    return tokens_BT, segment_ids_BT, positions_BT
