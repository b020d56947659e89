"""A trained network as a denoiser. B rows, T time, N places that are asked for, V vocabulary."""

from __future__ import annotations

from torch import Tensor, nn

from data_pipelines.tokens.roles import grid_positions, read_roles
from data_pipelines.tokens.vocabulary import Vocabulary
from pretrain.generate.diffusion import Denoiser


def model_denoiser(model: nn.Module, vocabulary: Vocabulary) -> Denoiser:
    """The model's logits at the places that are wanted; the head sees no other, for (B, T, V) may be gigabytes.

    model: called with (tokens, segment ids, positions), with a `head` and `position_axes`: 1, or 2 for a model that
        knows rows and columns of images.
    """

    def denoise(tokens_BT: Tensor, segment_ids_BT: Tensor, positions_BT: Tensor, wanted_BT: Tensor) -> Tensor:
        positions = positions_BT
        if model.position_axes == 2:
            roles = read_roles(vocabulary, tokens_BT, positions_BT)
            positions = grid_positions(vocabulary, roles, positions_BT)
        hidden_BTC = model(tokens_BT, segment_ids_BT, positions)
        logits: Tensor = model.head(hidden_BTC[wanted_BT])  # type: ignore[operator]
        return logits

    return denoise
