"""What all language models share: an embedding, blocks, a norm and a head.

Shape suffixes: B batch, T time, C model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.head import Head
from models.layers.linear import Embedding


class LanguageModel(nn.Module):
    """Tokens to hidden states; `head` maps hidden states to logits.

    blocks: modules called with (x_BTC, segment_ids_BT, positions_BT, state), and with
        `new_state(batch, length, device, dtype)`, which gives what they remember while decoding.
    norm: after the last block.
    tied_head: `head.weight` is `embedding.weight`, listed once, under that name.
    """

    sequence_parts = 1
    """How many ranks share a row: a model that is given one part of the positions still gets the whole rows' segment
    ids, and its mixers are told by whoever split the rows what to do with them."""

    constant_state = False
    """Whether the state keeps its size however long the text, and takes padded rows (segment ids with a state)."""

    def __init__(
        self,
        *,
        vocabulary: int | None,
        width: int,
        blocks: Iterable[nn.Module],
        norm: nn.Module,
        tied_head: bool,
    ) -> None:
        super().__init__()
        if vocabulary is None:
            raise ValueError("vocabulary must be known to build the model: use config.resolved(...)")
        self.embedding = Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = Head(width, vocabulary)
        if tied_head:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        state: list[Any] | None = None,
        hidden_BTC: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final norm.

        Args:
            tokens_BT: integers below the vocabulary.
            segment_ids_BT: which document of the row each token is of; None: each row is one document.
            positions_BT: each token's position in its document, for blocks that use it; None: counted along
                the row (and on from the state).
            state: from `new_state`, for decoding: the tokens follow those seen, and the state changes in
                place.
            hidden_BTC: what the blocks before the first one here made of the tokens, where this model is a part of
                a whole one (`part`).

        Raises ValueError, naming the argument, for a sequence of length 0 and segment ids of another shape.
        """
        if 0 in tokens_BT.shape:
            raise ValueError(
                f"tokens_BT {tuple(tokens_BT.shape)} is empty: a sequence of length 0 has no states"
            )
        wanted = (tokens_BT.shape[0], tokens_BT.shape[1] * self.sequence_parts)
        if segment_ids_BT is not None and segment_ids_BT.shape != wanted:
            raise ValueError(
                f"segment_ids_BT {tuple(segment_ids_BT.shape)} must have one id per token of "
                f"tokens_BT {tuple(tokens_BT.shape)}"
            )
        x_BTC = self.embedding(tokens_BT) if hidden_BTC is None else hidden_BTC
        for layer, block in enumerate(self.blocks.children()):
            x_BTC = block(x_BTC, segment_ids_BT, positions_BT, None if state is None else state[layer])
        return x_BTC if self.norm is None else self.norm(x_BTC)

    def bounds(self) -> dict[str, float]:
        """Parameters that must stay within [-bound, bound], by name: whoever trains sets what an update moved
        beyond back to the bound."""
        return {}

    def new_state(
        self,
        batch: int,
        length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[Any]:
        """What the blocks remember before the first token, one entry per layer, for `batch` rows of up to
        `length` tokens."""
        return [block.new_state(batch, length, device, dtype) for block in self.blocks.children()]  # type: ignore[operator]


def part(model: LanguageModel, blocks: Iterable[int], *, first: bool, last: bool) -> None:
    """Keep some blocks of a whole model, in place, with their numbers, so that parameters keep their names.

    first: also the embedding. last: also the norm and the head. What is left out is None; a head tied to an embedding
    that is left out has a weight of its own then, named `head.weight`.
    """
    kept = {str(number): model.blocks.get_submodule(str(number)) for number in blocks}
    model.blocks = nn.ModuleDict(kept)  # type: ignore[assignment]  # both give their blocks as children
    if not first:
        model.embedding = None  # type: ignore[assignment]
    if not last:
        model.norm = model.head = None  # type: ignore[assignment]
