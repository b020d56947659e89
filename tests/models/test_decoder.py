"""The attention families: shapes and counts, decoding, packing, gradients, cost.

Shape suffixes: B batch, T time, C model width.
"""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from models import families
from models.declared import splits_of
from models.initialise import Normal, initial_parameter, initialise
from models.layers.language_model import LanguageModel
from models.layers.loss import default_chunk_tokens, token_cross_entropy
from models.sharding import Column, Row

VOCABULARY, TIME = 61, 24
FAMILIES = ("sigmoid", "softmax")
POSITIONS = ("alibi", "rope")
PUBLISHED = {
    "85m": ({"layers": 12, "width": 768, "heads": 12}, 2048, 0.1101e9),
    "1b": ({"layers": 24, "width": 2048, "heads": 32}, 5632, 1.300e9),
    "3b": ({"layers": 26, "width": 3072, "heads": 24}, 8192, 3.045e9),
    "7b": ({"layers": 32, "width": 4096, "heads": 32}, 11008, 6.610e9),
}


def small_config(family: str, **changes: Any) -> Any:
    settings = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "layer_scale": 0.7, **changes}
    return families[family].config(**settings).resolved(vocabulary=VOCABULARY, sequence_length=TIME)


def small_model(family: str, **changes: Any) -> LanguageModel:
    model = families[family].build(small_config(family, **changes))
    initialise(model, seed=0)
    assert isinstance(model, LanguageModel)
    return model.double()


def some_tokens(batch: int = 2, time: int = TIME, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_parameter_counts(family: str, size: str) -> None:
    settings, mlp_width, count = PUBLISHED[size]
    config = families[family].config(**settings).resolved(vocabulary=32768, sequence_length=4096)
    assert config.hidden_width == mlp_width
    with torch.device("meta"):
        model = families[family].build(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(count, rel=5e-4)
    untied = families[family].config(**settings, tied_head=False, vocabulary=32768)
    with torch.device("meta"):
        bigger = families[family].build(untied.resolved(vocabulary=1, sequence_length=4096))
    assert sum(p.numel() for p in bigger.parameters()) == parameters + 32768 * config.width


@pytest.mark.parametrize(("family", "positions"), itertools.product(FAMILIES, POSITIONS))
@pytest.mark.parametrize("kv_heads", [None, 1, 2])
def test_decoding_with_a_cache_equals_the_full_forward(
    family: str, positions: str, kv_heads: int | None
) -> None:
    model = small_model(family, positions=positions, kv_heads=kv_heads)
    tokens = some_tokens()
    with torch.no_grad():
        full = model(tokens)
        state = model.new_state(2, TIME, dtype=torch.float64)
        pieces = [model(tokens[:, :9], state=state), model(tokens[:, 9:14], state=state)]
        pieces += [model(tokens[:, i : i + 1], state=state) for i in range(14, TIME)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=f"holds {TIME} positions and {TIME + 1}"):
        model(tokens[:, :1], state=state)


@pytest.mark.parametrize(("family", "positions"), itertools.product(FAMILIES, POSITIONS))
def test_packed_documents_equal_separate_ones(family: str, positions: str) -> None:
    model = small_model(family, positions=positions)
    lengths = (5, 1, 11, 7)
    documents = [some_tokens(1, length, seed=length) for length in lengths]
    segment_ids = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    places = torch.cat([torch.arange(n)[None] for n in lengths], dim=1)
    packed = model(torch.cat(documents, dim=1), segment_ids, places)
    separate = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_and_a_state_together_are_refused(family: str) -> None:
    model, tokens = small_model(family), some_tokens()
    with pytest.raises(ValueError, match="one document per row"):
        model(tokens, torch.zeros_like(tokens), state=model.new_state(2, TIME))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["hybrid", "pre"])
@pytest.mark.parametrize("tied_head", [True, False])
def test_names_first_loss_and_gradients(family: str, norm: str, tied_head: bool) -> None:
    model = small_model(family, norm=norm, tied_head=tied_head, qk_norm=norm == "hybrid")
    names = [name for name, _ in model.named_parameters()]
    assert "embedding.weight" in names
    assert ("head.weight" in names) == (not tied_head)
    assert any(name.endswith("branch.post.weight") for name in names) == (norm == "hybrid")
    tokens = some_tokens(8)
    loss, z_term = token_cross_entropy(
        model.head,
        model(tokens),
        tokens.roll(-1, 1),
        torch.ones_like(tokens),
        z_loss=1e-4,
        chunk_tokens=10**6,
    )
    assert loss.item() / tokens.numel() == pytest.approx(math.log(VOCABULARY) + 0.5, abs=0.4)
    (loss + z_term).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_bf16_throughout_with_an_fp32_loss(family: str) -> None:
    model, tokens = small_model(family), some_tokens()
    exact = model(tokens)
    hidden = model.bfloat16()(tokens)
    loss, _ = token_cross_entropy(
        model.head, hidden, tokens, torch.ones_like(tokens), chunk_tokens=default_chunk_tokens(VOCABULARY)
    )
    assert (hidden.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert (hidden.double() - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("chunk_tokens", [1, 7, 48, 1000])
def test_chunks_change_neither_loss_nor_gradients(chunk_tokens: int) -> None:
    model, tokens = small_model("sigmoid"), some_tokens()
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)).double()
    logits = model.head(model(tokens)).float()
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    expected = (each * weights.flatten().float()).sum()
    z_expected = 0.01 * (logits.logsumexp(-1).square() * weights.float()).sum()
    (expected + z_expected).backward()
    right = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss, z_term = token_cross_entropy(
        model.head, model(tokens), tokens, weights, z_loss=0.01, chunk_tokens=chunk_tokens
    )
    (loss + z_term).backward()
    torch.testing.assert_close((loss, z_term), (expected, z_expected))
    torch.testing.assert_close([p.grad for p in model.parameters()], right, rtol=1e-4, atol=1e-6)


def test_first_weights_depend_on_seed_and_name_alone() -> None:
    rule = Normal(0.5)
    alone = initial_parameter("blocks.1.mlp.up.weight", (96, 32), rule, seed=3)
    models_ = [families["sigmoid"].build(small_config("sigmoid", layers=n, mlp_width=96)) for n in (2, 3)]
    for model in models_:
        initialise(model, seed=3)
    for name, parameter in models_[0].named_parameters():
        assert torch.equal(parameter, dict(models_[1].named_parameters())[name])
    drawn = dict(models_[0].named_parameters())["blocks.1.mlp.up.weight"]
    torch.testing.assert_close(drawn, alone * (32**-0.5 / 0.5))
    assert not torch.equal(alone, initial_parameter("blocks.1.mlp.up.weight", (96, 32), rule, seed=4))
    assert not torch.equal(alone, initial_parameter("blocks.0.mlp.up.weight", (96, 32), rule, seed=3))


@pytest.mark.parametrize("initialisation", ["fan_in", "small"])
def test_first_weights_follow_the_rule(initialisation: str) -> None:
    config = small_config("sigmoid", initialisation=initialisation, width=64, layers=8)
    model = families["sigmoid"].build(config)
    initialise(model, seed=0)
    values = dict(model.named_parameters())
    fan_in = initialisation == "fan_in"
    deviations = {
        "embedding.weight": 64**-0.5 if fan_in else 0.02,
        "blocks.3.attention.qkv.weight": 64**-0.5 if fan_in else 0.02,
        "blocks.3.attention.out.weight": 64**-0.5 if fan_in else 0.005,
        "blocks.3.mlp.down.weight": config.hidden_width**-0.5 if fan_in else 0.005,
    }
    for name, deviation in deviations.items():
        assert values[name].std().item() == pytest.approx(deviation, rel=0.05), name
    assert values["norm.weight"].eq(1).all()
    assert values["blocks.0.mlp_branch.scale"].eq(0.7).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_divided(family: str) -> None:
    model = small_model(family, tied_head=False)
    inside = {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 or "attention." in name
    }
    assert set(splits_of(model)) == inside


@pytest.mark.parametrize(("family", "positions"), itertools.product(FAMILIES, POSITIONS))
def test_a_rank_with_a_part_of_the_heads_runs_the_same_code(family: str, positions: str) -> None:
    """The parts' outputs add up to the whole: what tensor parallelism relies on."""
    model = small_model(family, positions=positions)
    table = splits_of(model)
    assert table["blocks.0.attention.qkv"] == Column(stacked=model.config.qkv_features)
    assert table["blocks.0.attention.out"] == Row()
    attention: Any = model.blocks[0].attention
    config = model.config
    x = torch.randn(2, TIME, config.width, dtype=torch.float64)
    places = torch.arange(TIME).expand(2, -1)
    whole = attention(x, None, places)
    segments = attention.qkv.weight.detach().split(config.qkv_features)
    columns = attention.out.weight.detach().chunk(2, dim=1)
    total = torch.zeros_like(whole)
    for rank in range(2):
        attention.qkv.weight.data = torch.cat([segment.chunk(2)[rank] for segment in segments])
        attention.qkv.out_features = attention.qkv.weight.shape[0]
        attention.out.weight.data = columns[rank]
        attention.first_head = rank * config.heads // 2
        assert attention.new_state(1, 4, None, None).k_BSKD.shape[2] == config.key_heads // 2
        total = total + attention(x, None, places)
    torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_group(family: str) -> None:
    model = small_model(family, tied_head=False)
    assert set(model.declared) == {name for name, _ in model.named_parameters()}
    groups = {one.group for one in model.declared.values()}
    assert groups == {"embedding", "attention", "mlp", "norm", "head"}


def test_flops_equal_those_that_torch_counts() -> None:
    """Torch's counter knows no attention on a CPU: half of its square is added here."""
    config = small_config("softmax", positions="rope", qk_norm=False, tied_head=False)
    model = small_model("softmax", positions="rope", qk_norm=False, tied_head=False)
    tokens = some_tokens(3)
    with FlopCounterMode(display=False) as counter:
        model.head(model(tokens))
    square = 4 * config.layers * config.width * TIME
    expected = counter.get_total_flops() / tokens.numel() + square / 2
    assert families["softmax"].flops_per_token(config, TIME) == pytest.approx(3 * expected)
    by_hand = 3 * 2 * (2 * (32 * 64 + 32 * 32 + 3 * 32 * 128 + 32 * TIME) + 32 * VOCABULARY)
    assert families["sigmoid"].flops_per_token(small_config("sigmoid"), TIME) == by_hand


def test_models_import_nothing_from_above() -> None:
    allowed = {"torch", "einops", "models", "kernels"}
    standard = {
        "__future__",
        "abc",
        "collections",
        "dataclasses",
        "functools",
        "hashlib",
        "importlib",
        "math",
        "typing",
    }
    for path in Path(models.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # Where the user says which modules are trusted.
            trust = {"os"} if path.name == "own.py" else set()
            assert {name.split(".")[0] for name in names} <= allowed | standard | trust, path
