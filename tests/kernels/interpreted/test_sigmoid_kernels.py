"""The Triton kernels of sigmoid attention, interpreted, against the definition in float64.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from kernels.sigmoid_attention import sigmoid_attention, sigmoid_attention_reference, triton_launch
from kernels.sigmoid_attention.problem import problem_of
from kernels.sigmoid_attention.tiles import Tile, tile_for
from tests.kernels.sigmoid_cases import (
    GRID_WIDTHS,
    Case,
    cases,
    draw,
    excess,
    grid,
    grid_errors,
    inputs,
    options,
    relative_errors,
    results,
)

ONE = Case(batch=1, heads=2, key_heads=2, width=32, queries=100, keys=100)
CASES = {
    "causal": ONE,
    "full": replace(ONE, causal=False, queries=150, keys=150),
    "grouped": replace(ONE, heads=4, alibi="trained"),
    "one key head": replace(ONE, heads=3, key_heads=1, alibi="constant", trained_bias=True),
    "longer keys": replace(ONE, queries=70, keys=190, trained_bias=True),
    "more queries than keys": replace(ONE, queries=190, keys=70, alibi="trained"),
    "longer keys, full": replace(ONE, queries=70, keys=190, causal=False, alibi="trained"),
    "segments": replace(ONE, batch=2, queries=200, keys=200, segments=True, alibi="trained"),
    "segments, full": replace(ONE, queries=200, keys=200, segments=True, causal=False, trained_bias=True),
    "segments of other keys": replace(ONE, queries=140, keys=200, segments=True, offset=10),
    "window": replace(ONE, queries=260, keys=260, window=70),
    "two-sided window": replace(ONE, queries=200, keys=260, causal=False, window=(20, 90), alibi="trained"),
    "a range of keys far behind": replace(ONE, queries=130, keys=50, offset=100, alibi="trained"),
    "no visible key": replace(ONE, queries=70, keys=30, offset=-100, trained_bias=True, alibi="trained"),
    "one query": replace(ONE, batch=2, heads=4, queries=1, keys=150, alibi="constant"),
    "few queries": replace(ONE, heads=4, queries=5, keys=150, alibi="constant", window=60, trained_bias=True),
    "few queries, packed": replace(ONE, batch=2, queries=5, keys=90, segments=True),
}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients(case: Case) -> None:
    assert excess(sigmoid_attention, case, floor=3e-6) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["one key head", "segments", "two-sided window", "few queries"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    assert max(relative_errors(sigmoid_attention, CASES[name], dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("width", [1, 40, 59, 64, 96, 128, 160, 256])
def test_head_widths(width: int) -> None:
    """Also those that are padded, and those whose strides bulk copies cannot take (1 and 59)."""
    dtype = torch.float16
    assert max(relative_errors(sigmoid_attention, replace(ONE, width=width), dtype)) < TOLERANCE[dtype]


@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_any_shape_and_mask(case: Case) -> None:
    # In batch 2 so that a tile past the end of one row would read the next one's.
    assert excess(sigmoid_attention, replace(case, width=16), floor=1e-5, seed=case.keys) <= 1


@pytest.mark.parametrize("polynomial", [True, False], ids=["polynomial", "exact"])
@pytest.mark.parametrize("tile", [Tile(16, 32, 4, 2), Tile(64, 16, 4, 2, own_shared=True)], ids=str)
def test_any_tile_gives_the_same(tile: Tile, polynomial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = replace(tile, polynomial=polynomial)
    monkeypatch.setattr(triton_launch, "tile_for", lambda *_: tile)
    case = replace(ONE, segments=True, window=30, heads=4)
    assert excess(sigmoid_attention, case, floor=1e-4 if polynomial else 3e-6) <= 1


@pytest.mark.parametrize("length", [4096, 16384, 65536])
@pytest.mark.parametrize("polynomial", [True, False], ids=["polynomial", "exact"])
def test_single_weights_are_right_relatively(
    length: int, polynomial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At bias -ln n, and over the whole range of scores: v = I makes the output P itself.

    tanh.approx, right to about 2.4e-4 absolutely, would be wrong by a whole weight here.
    """
    tile = Tile(64, 32, 4, 2, polynomial=polynomial)
    monkeypatch.setattr(triton_launch, "tile_for", lambda *_: tile)
    scores = torch.linspace(-40, 40, 64 * 64).view(64, 64) + math.log(length)
    q, k = torch.eye(64)[None, :, None], scores.T[None, :, None].contiguous()
    identity = torch.eye(64)[None, :, None]
    bias = -math.log(length)
    p = sigmoid_attention(q, k, identity, bias=bias, scale=1.0, causal=False)[0, :, 0].double()
    right = (scores.double() + bias).sigmoid()
    # 2e-5 of rounding in the score itself: at 50, fp32 resolves 4e-6, and the bias adds its own.
    assert ((p - right) / right).abs().max() < (8e-5 if polynomial else 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [4096, 65536])
def test_outputs_at_the_published_bias(length: int, dtype: torch.dtype) -> None:
    """fp16 holds weights below 6e-5 with fewer digits, and still keeps the bound of an output."""
    case = replace(ONE, queries=200, keys=200, width=64)
    tensors = inputs(case, dtype=dtype)
    bias = -math.log(length)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    right = results(sigmoid_attention_reference, doubles, bias=bias)
    for ours, exact in zip(results(sigmoid_attention, tensors, bias=bias), right, strict=True):
        assert (ours.double() - exact).norm() / exact.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("queries", [100, 2], ids=["blocks", "decode"])
def test_what_lies_beyond_the_last_key_does_not_leak(queries: int) -> None:
    """Keys are a view of longer memory, as in a cache: its rest is not 0, and is not even a number."""
    case = replace(ONE, batch=2, queries=queries, keys=100, causal=False)
    q, k, v = (x.detach() for x in inputs(case, dtype=torch.float32))
    long = [torch.full((2, 130, 2, 32), float("nan")) for _ in range(2)]
    for cache, x in zip(long, (k, v), strict=True):
        cache[:, :100] = x
    views = [q.requires_grad_(), *(cache[:, :100].requires_grad_() for cache in long)]
    right = results(sigmoid_attention, [x.detach().clone().requires_grad_() for x in (q, k, v)], bias=2.0)
    for ours, expected in zip(results(sigmoid_attention, views, bias=2.0), right, strict=True):
        assert torch.equal(ours, expected)


def test_future_keys_change_nothing() -> None:
    q, k, v = (x.detach() for x in inputs(replace(ONE, queries=200, keys=200), dtype=torch.float16))
    before = sigmoid_attention(q, k, v, bias=-3.0)
    k[:, 151:], v[:, 151:] = 7.0, float("inf")
    assert torch.equal(before[:, :128], sigmoid_attention(q, k, v, bias=-3.0)[:, :128])
    k[:, 151:], v[:, 151:] = 7.0, -9.0
    assert torch.equal(before[:, :151], sigmoid_attention(q, k, v, bias=-3.0)[:, :151])


def test_a_block_of_other_documents_is_not_read() -> None:
    """Whole blocks outside a document are skipped: not-a-number in them would show even at weight 0."""
    q, k, v = (x.detach() for x in inputs(replace(ONE, queries=512, keys=512), dtype=torch.float16))
    ids = (torch.arange(512) // 256)[None]
    k[:, :256] = float("nan")
    out = sigmoid_attention(q, k, v, bias=-3.0, segment_ids=ids, causal=False)
    assert out[:, :256].isnan().all()
    assert not out[:, 256:].isnan().any()


@pytest.mark.parametrize("cut", [64, 77])
def test_sums_over_ranges_of_keys_add_up(cut: int) -> None:
    q, k, v = (x.detach() for x in inputs(replace(ONE, queries=130, keys=130), dtype=torch.bfloat16))
    whole = sigmoid_attention(q, k, v, bias=-3.0, window=100, out_dtype=torch.float32)
    parts = [
        sigmoid_attention(
            *(q, k[:, first:last], v[:, first:last]),
            bias=-3.0,
            window=100,
            query_offset=-first,
            out_dtype=torch.float32,
        )
        for first, last in ((0, cut), (cut, 130))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)


def test_views_of_a_fused_projection_are_read_in_place() -> None:
    fused = draw(0, 2, 100, 6, 32).half()
    q, k, v = (x.requires_grad_() for x in fused.split((4, 1, 1), dim=2))
    copies = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    for ours, right in zip(
        results(sigmoid_attention, [q, k, v], bias=-3.0),
        results(sigmoid_attention, copies, bias=-3.0),
        strict=True,
    ):
        assert torch.equal(ours, right)


def test_results_are_the_same_every_time() -> None:
    case = replace(ONE, heads=4, alibi="trained", trained_bias=True)
    first, second = (
        results(sigmoid_attention, inputs(case, dtype=torch.float16), **options(case)) for _ in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_decoding_splits_its_keys_and_adds_the_parts() -> None:
    case = replace(ONE, batch=1, queries=1, keys=500, heads=4, key_heads=1)
    q, k, _ = inputs(case, dtype=torch.float16)
    problem = problem_of(q, k, (-3.0, 0.2), (-1, 0, 499))
    tile = tile_for("decode", 32, True, torch.float16)
    chunk, splits = triton_launch.split_keys(problem, tile)
    assert splits == 8
    assert chunk == tile.keys
    assert triton_launch.split_keys(replace(problem, batch=300), tile) == (256, 2)
    assert max(relative_errors(sigmoid_attention, case, torch.float16)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("queries", [5, 16], ids=["32 rows", "64 rows"])
def test_a_decode_of_many_rows(queries: int) -> None:
    case = replace(ONE, queries=queries, keys=300, heads=4, key_heads=1)
    assert max(relative_errors(sigmoid_attention, case, torch.float16)) < TOLERANCE[torch.float16]


def test_a_sample_of_the_authors_grid() -> None:
    """Every 7,001st case of those with short rows; `tests/kernels/test_sigmoid_oracles.py` has the whole."""
    sample = list(grid(GRID_WIDTHS, ((113, 203), (128, 217), (113, 211), (108, 256))))[::7001]
    assert len(sample) == 3
    for case in sample:
        assert max(grid_errors(sigmoid_attention, case, batch=1)) < 2, case


@pytest.mark.parametrize("name", ["one key head", "segments", "window", "few queries"])
def test_opcheck(name: str) -> None:
    case = CASES[name]
    chosen = options(case, dtype=torch.float32)
    ids = chosen.get("segment_ids")
    left = case.window if isinstance(case.window, int) else -1
    arguments = (
        chosen["bias"] if case.trained_bias else None,
        chosen["alibi_slopes"],
        ids,
        ids if ids is None else ids.clone(),
        [-3.0, 0.3],
        [left, 0, case.keys - case.queries],
        torch.float32,
    )
    tensors = inputs(replace(case, queries=case.queries), dtype=torch.float32)
    torch.library.opcheck(torch.ops.triptych.sigmoid_attention.default, (*tensors, *arguments))


def test_compiles_whole() -> None:
    case = replace(CASES["one key head"], alibi="trained")
    compiled = torch.compile(sigmoid_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (40, 70):
        longer = replace(case, queries=length, keys=length)
        chosen = options(longer, dtype=torch.float32)
        expected = results(sigmoid_attention, inputs(longer, dtype=torch.float32), **chosen)
        ours = results(compiled, inputs(longer, dtype=torch.float32), **chosen)
        for actual, right in zip(ours, expected, strict=True):
            torch.testing.assert_close(actual, right)
