"""Sampling text from a causal model, one token at a time over a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from data_pipelines.tokenizers import Tokenizer


Agree = Callable[[int], int]


@dataclass(frozen=True)
class Sampling:
    tokens: int = 64
    """At most this many new tokens; the end-of-text token ends a text earlier."""
    temperature: float = 0.8
    """0 takes the most likely token every time."""
    top_p: float = 0.95
    """Sample among the most likely tokens that together have this probability."""
    seed: int = 0


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    device: torch.device,
    agree: Agree = int,
) -> list[str]:
    """One continuation per prompt, prompt included. An empty prompt starts a new document.

    agree: makes all ranks go on with one rank's token, where several generate together.
    """
    texts = []
    for number, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt).tolist()
        random = torch.Generator().manual_seed(sampling.seed + number)
        # A document begins after the end-of-text token of the one before; so does a generated one.
        stream = generate_tokens(model, [tokenizer.eot, *ids], tokenizer, sampling, random, device, agree)
        texts.append(tokenizer.decode([*ids, *stream]))
    return texts


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    sampling: Sampling,
    random: torch.Generator,
    device: torch.device,
    agree: Agree = int,
) -> Iterator[int]:
    """Yield new token ids until the end-of-text token, which is not among them."""
    dtype = next(model.parameters()).dtype
    state = model.new_state(1, len(prompt) + sampling.tokens, device, dtype)  # type: ignore[operator]
    fed = torch.tensor([prompt], device=device)
    position = 0
    for _ in range(sampling.tokens):
        positions = torch.arange(position, position + fed.shape[1], device=device)[None]
        hidden_BTC = model(fed, positions_BT=positions, state=state)
        logits_V = model.head(hidden_BTC[:, -1:])[0, -1].float().cpu()  # type: ignore[operator]
        logits_V = logits_V[: tokenizer.vocabulary]  # the model's vocabulary may be rounded up
        token = agree(sample_token(logits_V, sampling, random))
        if token == tokenizer.eot:
            return
        yield token
        position += fed.shape[1]
        fed = torch.tensor([[token]], device=device)


def sample_token(logits_V: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751) after dividing the logits by the temperature."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities, order = (logits_V / sampling.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(
        before >= sampling.top_p, 0.0
    )  # the most likely one always stays
    return int(order[torch.multinomial(probabilities, 1, generator=random)])
