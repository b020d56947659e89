"""The bidirectional Transformer of masked diffusion: a decoder whose attention is not causal.

Shape suffixes: B batch, T time, C model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from models.layers.attention import Attention, AttentionShape
from models.layers.decoder import decoder_parts
from models.layers.language_model import LanguageModel
from models.layers.positions import row_positions
from models.sigmoid.mixer import sigmoid_mixer
from models.softmax.mixer import SoftmaxAttention
from models.trimodal.config import TrimodalConfig


class Trimodal(LanguageModel):
    """Token ids, some of them [MASK], to hidden states; `head` maps those to logits.

    It is told neither the mask ratio nor the task but by the tokens (no time conditioning: arXiv 2406.07524).
    """

    config: TrimodalConfig

    def __init__(self, config: TrimodalConfig) -> None:
        super().__init__(config, *decoder_parts(config, mixer_of(config)))
        self.position_axes = config.position_axes

    def forward(
        self,
        tokens_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        state: list[Any] | None = None,
        hidden_BTC: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final norm; a token sees all of its segment and nothing else.

        positions_BT: (B, T) where `position_axes` is 1 and (B, T, 2) where it is 2; None: counted along the row,
            the same on every axis.

        Raises ValueError for a state, for positions of another shape, and as `LanguageModel.forward` does.
        """
        if state is not None:
            self.new_state(0, 0)
        if positions_BT is None:
            positions_BT = row_positions(tokens_BT)
            if self.position_axes == 2:
                positions_BT = positions_BT[..., None].expand(-1, -1, 2)
        wanted = tuple(tokens_BT.shape) + ((2,) if self.position_axes == 2 else ())
        if tuple(positions_BT.shape) != wanted:
            raise ValueError(
                f"positions {tuple(positions_BT.shape)} must be {wanted}: image_positions is "
                f"{self.config.image_positions} in this model"
            )
        return super().forward(tokens_BT, segment_ids_BT, positions_BT, None, hidden_BTC)

    def new_state(
        self,
        batch: int,
        length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NoReturn:
        """Raises ValueError: what a token's state is depends on the tokens after it, so none can be kept."""
        raise ValueError("a bidirectional model keeps no state between calls: give it whole rows")


def mixer_of(config: TrimodalConfig) -> Callable[[AttentionShape], Attention]:
    """The attention layer that the config names."""
    if config.attention == "softmax":
        return SoftmaxAttention
    return sigmoid_mixer(config.attention_bias)
