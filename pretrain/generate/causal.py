"""Sampling text from a causal model, one token at a time over what the model remembers.

Shape suffixes: B rows, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from data_pipelines.tokens.tokenizer import Tokenizer


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
    # A document begins after the end-of-text token of the one before; so does a generated one.
    ids = [[tokenizer.eot, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    randoms = [torch.Generator().manual_seed(sampling.seed + number) for number in range(len(prompts))]
    if not ids:
        return []
    if getattr(model, "constant_state", False):
        continuations = generate_rows(model, ids, tokenizer, sampling, randoms, device, agree)
    else:
        continuations = [
            list(generate_tokens(model, row, tokenizer, sampling, random, device, agree))
            for row, random in zip(ids, randoms, strict=True)
        ]
    return [tokenizer.decode([*row[1:], *more]) for row, more in zip(ids, continuations, strict=True)]


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


@torch.no_grad()
def generate_rows(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    sampling: Sampling,
    randoms: Sequence[torch.Generator],
    device: torch.device,
    agree: Agree = int,
) -> list[list[int]]:
    """New token ids of all prompts, generated together by a model whose state is of constant size.

    The prompts are read in one parallel pass, the shorter ones behind padding that is a document of its own;
    then all rows step together, in memory that does not grow, until each has ended or has its tokens.
    """
    dtype = next(model.parameters()).dtype
    fed_BT, segment_ids_BT = _padded(prompts, tokenizer.eot, device)
    state = model.new_state(len(prompts), 0, device, dtype)  # type: ignore[operator]
    written: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for _ in range(sampling.tokens):
        hidden_BTC = model(fed_BT, segment_ids_BT, state=state)
        logits_BV = model.head(hidden_BTC[:, -1:])[:, -1].float().cpu()  # type: ignore[operator]
        logits_BV = logits_BV[:, : tokenizer.vocabulary]  # the model's vocabulary may be rounded up
        following = [tokenizer.eot] * len(prompts)
        for row in (row for row, goes_on in enumerate(going) if goes_on):
            following[row] = agree(sample_token(logits_BV[row], sampling, randoms[row]))
            going[row] = following[row] != tokenizer.eot
            if going[row]:
                written[row].append(following[row])
        if not any(going):
            break
        fed_BT, segment_ids_BT = torch.tensor(following, device=device)[:, None], None
    return written


def _padded(
    prompts: Sequence[Sequence[int]], filler: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The prompts flush right, (B, T), and segment ids that set the filling apart; None if there is none."""
    longest = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.full((len(prompts), longest), filler)
    segment_ids_BT = torch.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        segment_ids_BT[row, longest - len(prompt) :] = 1
    if all(len(prompt) == longest for prompt in prompts):
        return tokens_BT.to(device), None
    return tokens_BT.to(device), segment_ids_BT.to(device)


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
