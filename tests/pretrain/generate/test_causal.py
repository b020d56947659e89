"""Sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from models import families
from models.initialise import initialise
from pretrain.generate.causal import Sampling, generate, sample_token

CPU = torch.device("cpu")


ATTENTION = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "positions": "rope", "mlp_width": 64}
MODELS: dict[str, dict[str, Any]] = {
    "sigmoid": ATTENTION,
    "softmax": ATTENTION,
    "pararnn": {"cell": "lstm", "layers": 2, "width": 32, "mlp_width": 64},
    "mamba2": {"layers": 2, "width": 32, "heads": 4, "state_width": 8, "chunk": 4},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    family = families[request.param]
    config = family.config(**MODELS[request.param])
    built = family.build(config.resolved(vocabulary=320, sequence_length=64))
    initialise(built, 3)
    return built


def test_greedy_continuation_is_the_argmax_of_the_whole_forward_pass(model: torch.nn.Module) -> None:
    tokenizer = BytesTokenizer()
    text = generate(model, tokenizer, ["abc"], Sampling(tokens=12, temperature=0), CPU)[0]
    ids = [tokenizer.eot, *b"abc"]
    with torch.no_grad():
        for _ in range(12):
            logits = model.head(model(torch.tensor([ids])))[0, -1]  # type: ignore[operator]
            best = int(logits[: tokenizer.vocabulary].argmax())
            if best == tokenizer.eot:
                break
            ids.append(best)
    assert text == tokenizer.decode(ids[1:])


def test_prompts_together_give_what_each_gives_alone(model: torch.nn.Module) -> None:
    tokenizer, greedy = BytesTokenizer(), Sampling(tokens=10, temperature=0)
    prompts = ["", "a longer prompt", "xy"]
    together = generate(model, tokenizer, prompts, greedy, CPU)
    assert together == [generate(model, tokenizer, [prompt], greedy, CPU)[0] for prompt in prompts]
    assert generate(model, tokenizer, [], greedy, CPU) == []


def test_the_seed_decides(model: torch.nn.Module) -> None:
    def write(seed: int) -> list[str]:
        return generate(
            model, BytesTokenizer(), ["", "x"], Sampling(tokens=20, temperature=2.0, seed=seed), CPU
        )

    assert write(1) == write(1) != write(2)


@settings(deadline=None, max_examples=50)
@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    top_p=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
)
def test_nucleus_sampling_takes_from_the_smallest_likely_set(
    logits: list[float], top_p: float, seed: int
) -> None:
    values = torch.tensor(logits)
    token = sample_token(values, Sampling(temperature=1.0, top_p=top_p), torch.Generator().manual_seed(seed))
    probabilities = values.softmax(-1)
    likelier = probabilities[probabilities > probabilities[token]].sum()
    assert likelier < top_p + 1e-5


def test_padding_of_the_vocabulary_is_never_sampled() -> None:
    family = families["sigmoid"]
    config = family.config(layers=1, width=16, heads=2, mlp_width=16).resolved(
        vocabulary=4096, sequence_length=8
    )
    built = family.build(config)
    initialise(built, 0)
    # Of 4,096 rows 257 are real: an unlimited sampler would fail to decode almost surely.
    generate(built, BytesTokenizer(), [""] * 4, Sampling(tokens=8, temperature=5.0, top_p=1.0), CPU)
