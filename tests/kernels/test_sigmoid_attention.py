"""Sigmoid attention against its definition in float64: outputs, every gradient, masks, errors.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.sigmoid_attention import blocked, op, sigmoid_attention, sigmoid_attention_reference


@dataclass(frozen=True)
class Case:
    batch: int = 2
    queries: int = 37
    keys: int = 37
    heads: int = 4
    key_heads: int = 4
    width: int = 8
    causal: bool = True
    alibi: bool = False
    segments: bool = False
    sorted_segments: bool = True


CASES = {
    "causal": Case(),
    "full": Case(causal=False),
    "several blocks": Case(batch=3, queries=300, keys=300, heads=2, key_heads=2),
    "not a multiple of the block": Case(queries=131, keys=131, alibi=True),
    "grouped": Case(heads=6, key_heads=2, alibi=True),
    "one key head": Case(heads=6, key_heads=1, queries=150, keys=150, segments=True, alibi=True),
    "longer keys": Case(queries=20, keys=200, alibi=True, heads=4, key_heads=2),
    "one query": Case(queries=1, keys=33, alibi=True),
    "longer keys, full": Case(queries=140, keys=200, causal=False, alibi=True),
    "segments": Case(queries=270, keys=270, segments=True, alibi=True),
    "segments, full": Case(queries=270, keys=270, segments=True, causal=False),
    "segments that come back": Case(queries=140, keys=140, segments=True, sorted_segments=False),
}


def inputs(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = (case.batch, case.keys, case.key_heads, case.width)
    shapes = [(case.batch, case.queries, case.heads, case.width), keys, keys]
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [draw.to(dtype).requires_grad_() for draw in draws]


def masks(case: Case, seed: int = 0) -> dict[str, Tensor | bool | None]:
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.rand(case.heads, generator=generator) if case.alibi else None
    ids = None
    if case.segments:
        changes = torch.rand(case.batch, case.queries, generator=generator) < 0.03
        ids = changes.long().cumsum(1) if case.sorted_segments else changes.long().cumsum(1) % 3
    return {"causal": case.causal, "alibi_slopes": slopes, "segment_ids": ids}


def results(attention, tensors: list[Tensor], **options) -> list[Tensor]:
    out = attention(*tensors, **options)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, tensors, gradient.to(out.dtype))]


def assert_equal_to_definition(case: Case, *, bias: float, seed: int = 0) -> None:
    options = {"bias": bias, **masks(case, seed)}
    expected = results(sigmoid_attention_reference, inputs(case, seed), **options)
    for actual, right in zip(
        results(sigmoid_attention, inputs(case, seed), **options), expected, strict=True
    ):
        torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-12)


@pytest.fixture(params=["kept", "computed again"])
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the weights in the backward pass: kept from the forward, and computed again."""
    if request.param == "computed again":
        monkeypatch.setattr(op, "KEPT_ELEMENTS", 0)


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_definition(case: Case) -> None:
    assert_equal_to_definition(case, bias=-math.log(case.keys))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    more_keys=st.integers(0, 20),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    causal=st.booleans(),
    alibi=st.booleans(),
    segments=st.sampled_from(["none", "sorted", "any"]),
    rows=st.sampled_from([1, 3, 8, 128]),
    elements=st.sampled_from([1, 100, 1000, 10**6]),
)
def test_any_shape_mask_and_tiling_equals_the_definition(
    batch, queries, more_keys, key_heads, group, causal, alibi, segments, rows, elements
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "CPU_ROWS", rows)
        patch.setattr(blocked, "CPU_TILE_ELEMENTS", elements)
        case = Case(
            batch=batch,
            queries=queries,
            keys=queries + (more_keys if segments == "none" else 0),
            heads=key_heads * group,
            key_heads=key_heads,
            width=4,
            causal=causal,
            alibi=alibi,
            segments=segments != "none",
            sorted_segments=segments == "sorted",
        )
        assert_equal_to_definition(case, bias=-2.0, seed=queries)


@pytest.mark.parametrize("length", [64, 4096, 65536])
def test_small_weights_are_right_relatively(length: int) -> None:
    """With v of one column of ones per key, the output is the sum of weights of size 1 / length."""
    case = Case(queries=64, keys=64)
    options = {"bias": -math.log(length), **masks(case)}
    expected = results(sigmoid_attention_reference, inputs(case), **options)
    actual = results(sigmoid_attention, inputs(case, dtype=torch.float32), **options)
    for ours, right in zip(actual, expected, strict=True):
        scale = right.abs().amax()
        torch.testing.assert_close(ours.double() / scale, right / scale, rtol=0, atol=2e-6)
    one_hot = torch.eye(64).expand(2, 4, 64, 64).transpose(1, 2).contiguous()  # v = I: the output is P itself
    q, k, _ = inputs(replace(case, width=64), dtype=torch.float32)
    weights = sigmoid_attention(q, k, one_hot, **options)
    right = sigmoid_attention_reference(q.double(), k.double(), one_hot.double(), **options)
    torch.testing.assert_close(weights.double(), right, rtol=2e-5, atol=0)


def test_bf16_weights_are_right_relatively() -> None:
    """Scores near -ln n keep two or three binary digits in bf16: the bias must join them in fp32."""
    case = Case(queries=64, keys=64, width=64)
    q, k, _ = inputs(case, dtype=torch.bfloat16)
    identity = torch.eye(64).expand(2, 4, 64, 64).transpose(1, 2).bfloat16()
    bias = -math.log(4096)
    weights = sigmoid_attention(q, k, identity, bias=bias).double()
    right = sigmoid_attention_reference(q.double(), k.double(), identity.double(), bias=bias)
    visible = right > 0
    relative = ((weights - right)[visible] / right[visible]).abs()
    assert relative.max() < 0.02
    assert weights[~visible].abs().max() == 0


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("name", ["causal", "several blocks", "grouped", "segments"])
def test_bf16_output_and_gradients(name: str) -> None:
    case = CASES[name]
    options = {"bias": -math.log(case.keys), **masks(case)}
    tensors = inputs(case, dtype=torch.bfloat16)
    actual = results(sigmoid_attention, tensors, **options)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    for ours, right in zip(actual, results(sigmoid_attention_reference, doubles, **options), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - right).norm() / right.norm() < 0.01


def test_future_keys_change_nothing() -> None:
    case = Case(queries=200, keys=200)
    q, k, v = (x.detach() for x in inputs(case))
    before = sigmoid_attention(q, k, v, bias=-3.0)
    k[:, 151:], v[:, 151:] = 7.0, -9.0
    after = sigmoid_attention(q, k, v, bias=-3.0)
    assert torch.equal(before[:, :151], after[:, :151])


def test_hidden_segments_change_nothing_and_get_no_gradient() -> None:
    q, k, v = inputs(Case(batch=1, queries=40, keys=40))
    ids = (torch.arange(40) >= 25).long()[None]
    out = sigmoid_attention(q, k, v, bias=-3.0, segment_ids=ids, causal=False)
    gradient_k, gradient_v = torch.autograd.grad(out[:, :25].sum(), (k, v))
    assert gradient_k[:, 25:].abs().max() == 0
    assert gradient_v[:, 25:].abs().max() == 0
    assert gradient_v[:, :25].abs().min() > 0


@pytest.mark.usefixtures("_memory")
def test_gradcheck() -> None:
    case = Case(batch=1, queries=5, keys=7, heads=4, key_heads=2, width=3, alibi=True)
    slopes = masks(case)["alibi_slopes"]
    assert torch.autograd.gradcheck(
        lambda q, k, v: sigmoid_attention(q, k, v, bias=-1.0, alibi_slopes=slopes), inputs(case)
    )


@pytest.mark.parametrize("name", ["causal", "one key head", "segments"])
def test_the_custom_op_passes_opcheck(name: str) -> None:
    case = CASES[name]
    options = masks(case)
    arguments = (-3.0, 0.3, case.causal, options["alibi_slopes"], options["segment_ids"])
    torch.library.opcheck(
        torch.ops.triptych.sigmoid_attention.default, (*inputs(case, dtype=torch.float32), *arguments)
    )


def test_compiles_whole() -> None:
    case = CASES["grouped"]
    options = {"bias": -3.0, **masks(case)}
    compiled = torch.compile(sigmoid_attention, fullgraph=True, backend="aot_eager")
    expected = results(sigmoid_attention, inputs(case, dtype=torch.float32), **options)
    for ours, right in zip(
        results(compiled, inputs(case, dtype=torch.float32), **options), expected, strict=True
    ):
        torch.testing.assert_close(ours, right)


GOOD = torch.zeros(2, 5, 4, 8)
BAD_CALLS = {
    "rank": ({"q": torch.zeros(5, 4, 8)}, "q must be"),
    "dtype": ({"q": GOOD.int(), "k": GOOD.int(), "v": GOOD.int()}, "q must be one of"),
    "mixed dtypes": ({"k": GOOD.double()}, "k must share q's dtype"),
    "device": ({"v": GOOD.to("meta")}, "v must share"),
    "batch": ({"k": GOOD[:1], "v": GOOD[:1]}, "k must be"),
    "k and v": ({"v": GOOD[:, :4]}, "v must have k's shape"),
    "fewer keys": ({"k": GOOD[:, :3], "v": GOOD[:, :3]}, "at least as many positions"),
    "empty": ({"q": GOOD[:0], "k": GOOD[:0], "v": GOOD[:0]}, "no size may be 0"),
    "groups": ({"k": GOOD[:, :, :3], "v": GOOD[:, :, :3]}, "4 heads must be a multiple"),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes must be \\(4,\\)"),
    "trained slopes": ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, "constants"),
    "ids with a cache": (
        {"q": GOOD[:, :2], "segment_ids": torch.zeros(2, 2, dtype=torch.long)},
        "segment_ids are for self attention",
    ),
    "ids shape": ({"segment_ids": torch.zeros(2, 4, dtype=torch.long)}, "segment_ids must be \\(2, 5\\)"),
    "ids dtype": ({"segment_ids": torch.zeros(2, 5)}, "segment_ids must be integers"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_bad_argument_is_named(changes: dict[str, Tensor], message: str) -> None:
    call = {"q": GOOD, "k": GOOD, "v": GOOD, **changes}
    with pytest.raises(ValueError, match=message):
        sigmoid_attention(call.pop("q"), call.pop("k"), call.pop("v"), bias=-1.0, **call)
