"""The one class of all language models: an embedding, blocks of any kind, a norm and a head.

Shape suffixes: B batch, T time, C model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.declared import Matrix, bounds_of, declared
from models.initialise import Rule
from models.layers.cache import KVCache
from models.layers.head import Head
from models.layers.linear import Embedding
from models.layers.positions import row_positions
from models.sharding import Split, Vocab


class LanguageModel(nn.Module):
    """Tokens to hidden states; `head` maps hidden states to logits.

    config: with `vocabulary`, `width` and `tied_head`: whether `head.weight` is `embedding.weight`, listed once, under
        that name.
    blocks: modules called with (x_BTC, segment_ids_BT, positions_BT, state), and with
        `new_state(batch, length, device, dtype)`, which gives what they remember while decoding. Kinds may differ from
        block to block. Of each, `constant_state` says that its state keeps its size and takes padded rows, and
        `needs_positions` that it must be told positions; False where it says nothing.
    norm: after the last block.
    recipe: how matrices start (`models.layers.recipes`).

    declared: what the modules say of each parameter (`models.declared`), by its name in the whole model.
    """

    splits: ClassVar[Mapping[str, Split]] = {"embedding": Vocab(), "head": Vocab()}

    sequence_parts = 1
    """How many ranks share a row: a model that is given one part of the positions still gets the whole rows' segment
    ids, and its mixers are told by whoever split the rows what to do with them."""

    def __init__(
        self,
        config: Any,
        blocks: Iterable[nn.Module],
        norm: nn.Module,
        recipe: Callable[[Matrix], Rule],
    ) -> None:
        super().__init__()
        if config.vocabulary is None:
            raise ValueError("vocabulary must be known to build the model: use config.resolved(...)")
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = Head(config.width, config.vocabulary)
        if config.tied_head:
            self.head.weight = self.embedding.weight
        self.declared = declared(self, recipe)
        self.needs_positions = any(getattr(block, "needs_positions", False) for block in self.blocks)
        of_all = all(getattr(block, "constant_state", False) for block in self.blocks)
        self.constant_state = of_all and not self.needs_positions
        """Whether the state keeps its size however long the text, and takes padded rows (segment ids with a state)."""

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

        Raises ValueError, naming the argument, for a sequence of length 0, segment ids of another shape, and segment
        ids together with a state that does not take them.
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
        if state is not None and segment_ids_BT is not None and not self.constant_state:
            raise ValueError("segment_ids_BT cannot be used with a state: decode one document per row")
        if positions_BT is None and self.needs_positions:
            positions_BT = row_positions(tokens_BT, 0 if state is None else _positions_seen(state))
        x_BTC = self.embedding(tokens_BT) if hidden_BTC is None else hidden_BTC
        for layer, block in enumerate(self.blocks.children()):
            x_BTC = block(x_BTC, segment_ids_BT, positions_BT, None if state is None else state[layer])
        return x_BTC if self.norm is None else self.norm(x_BTC)

    def initial_rule(self, name: str) -> Rule:
        """How `models.initialise` draws the parameter of this name."""
        return self.declared[name].rule

    def bounds(self) -> dict[str, float]:
        """Parameters that must stay within [-bound, bound], by name: whoever trains sets what an update moved
        beyond back to the bound."""
        return bounds_of(self)

    def cells(self) -> dict[str, Any]:
        """The nonlinear recurrences, which keep telemetry of their solution, by name, first layer first."""
        return {name: module for name, module in self.named_modules() if hasattr(module, "telemetry")}

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


def _positions_seen(state: list[Any]) -> int:
    """How many positions the blocks have read, by the first that counts them."""
    for layer in state:
        if isinstance(layer, KVCache):
            return layer.length
    raise ValueError("no layer here counts positions: give positions_BT")


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
