"""Sigmoid attention against its definition in float64: outputs, every gradient, masks, errors.

Shape suffixes: B batch, T query time, S key time, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.sigmoid_attention import blocked_plan, op, sigmoid_attention, sigmoid_attention_reference
from tests.kernels.sigmoid_cases import Case, cases, inputs, options, relative_errors, results

CASES = {
    "causal": Case(),
    "full": Case(causal=False),
    "several blocks": Case(batch=3, queries=300, keys=300, heads=2, key_heads=2),
    "not a multiple of the block": Case(queries=131, keys=131, alibi="constant"),
    "grouped": Case(heads=6, key_heads=2, alibi="trained"),
    "one key head": Case(heads=6, key_heads=1, queries=150, keys=150, segments=True, alibi="constant"),
    "longer keys": Case(queries=20, keys=200, alibi="constant", heads=4, key_heads=2),
    "one query": Case(queries=1, keys=33, alibi="constant"),
    "longer keys, full": Case(queries=140, keys=200, causal=False, alibi="trained"),
    "more queries than keys": Case(queries=300, keys=120, trained_bias=True),
    "segments": Case(queries=270, keys=270, segments=True, alibi="trained", trained_bias=True),
    "segments, full": Case(queries=270, keys=270, segments=True, causal=False),
    "segments of other keys": Case(queries=140, keys=200, segments=True, offset=10),
    "window": Case(queries=300, keys=300, window=50, alibi="trained"),
    "two-sided window": Case(queries=270, keys=300, causal=False, window=(20, 150), trained_bias=True),
    "window and segments": Case(queries=270, keys=270, window=30, segments=True, heads=4, key_heads=2),
    "a range of keys far behind": Case(queries=140, keys=50, offset=200, alibi="trained"),
    "keys that come later": Case(queries=140, keys=50, offset=-60, alibi="constant"),
    "no visible key": Case(queries=20, keys=30, offset=-40),
}


def assert_equal_to_definition(case: Case, *, seed: int = 0) -> None:
    expected = results(sigmoid_attention_reference, inputs(case, seed), **options(case, seed))
    ours = results(sigmoid_attention, inputs(case, seed), **options(case, seed))
    for actual, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-12)


@pytest.fixture(params=["kept", "computed again"])
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the weights in the backward pass: kept from the forward, and computed again."""
    if request.param == "computed again":
        monkeypatch.setattr(op, "KEPT_ELEMENTS", 0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_equal_the_definition(case: Case) -> None:
    assert_equal_to_definition(case)


@pytest.mark.parametrize("name", ["segments", "window", "grouped", "no visible key"])
def test_weights_computed_again_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "KEPT_ELEMENTS", 0)
    # The custom op gives per-head gradients in fp32, summed in the width of the inputs.
    case = CASES[name]
    expected = results(sigmoid_attention_reference, inputs(case), **options(case))
    for actual, right in zip(
        results(sigmoid_attention, inputs(case), **options(case)), expected, strict=True
    ):
        tolerance = 1e-10 if actual.dim() > 1 else 1e-6
        torch.testing.assert_close(actual, right, rtol=tolerance, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    case=cases(),
    rows=st.sampled_from([1, 3, 8, 128]),
    elements=st.sampled_from([1, 100, 1000, 10**6]),
)
def test_any_shape_mask_and_tiling_equals_the_definition(case: Case, rows: int, elements: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_plan, "CPU_ROWS", rows)
        patch.setattr(blocked_plan, "CPU_TILE_ELEMENTS", elements)
        assert_equal_to_definition(case, seed=case.queries)


@settings(max_examples=30, deadline=None)
@given(case=cases(), cut=st.integers(1, 59))
def test_sums_over_ranges_of_keys_add_up(case: Case, cut: int) -> None:
    """Output and gradients over keys [0, cut) and [cut, S) sum to those over all keys."""
    case = replace(case, keys=case.keys + 1)
    cut = 1 + cut % (case.keys - 1) if case.keys > 2 else 1
    offset = case.keys - case.queries if case.offset is None else case.offset
    chosen = {**options(case), "query_offset": offset}
    if case.segments and "key_segment_ids" not in chosen:
        chosen["key_segment_ids"] = chosen["segment_ids"]
    q, k, v = inputs(case)
    whole = results(sigmoid_attention, [q, k, v], **chosen)

    def in_two(q: Tensor, k: Tensor, v: Tensor, **chosen: Any) -> Tensor:
        ids = chosen.pop("key_segment_ids", None)
        total = torch.zeros_like(q)
        for first, last in ((0, cut), (cut, case.keys)):
            part = {**chosen, "query_offset": offset - first}
            if isinstance(ids, Tensor):
                part["key_segment_ids"] = ids[:, first:last]
            total = total + sigmoid_attention(q, k[:, first:last], v[:, first:last], **part)
        return total

    for actual, right in zip(results(in_two, [q, k, v], **chosen), whole, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-12)


def test_cu_seqlens_are_segment_ids_by_another_name() -> None:
    case = Case(batch=1, queries=50, keys=50)
    starts = torch.tensor([0, 13, 13, 40, 50], dtype=torch.int32)
    ids = torch.repeat_interleave(torch.arange(4), starts.diff().long())[None]
    by_ids = results(sigmoid_attention, inputs(case), bias=-2.0, segment_ids=ids)
    by_starts = results(sigmoid_attention, inputs(case), bias=-2.0, cu_seqlens=starts)
    for ours, right in zip(by_starts, by_ids, strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("length", [4096, 16384, 65536])
def test_small_weights_are_right_relatively(length: int) -> None:
    """At bias -ln n a weight is about 1 / n: an absolute error of that size must not pass."""
    case = Case(queries=64, keys=64)
    bias = -math.log(length)
    expected = results(sigmoid_attention_reference, inputs(case), bias=bias)
    actual = results(sigmoid_attention, inputs(case, dtype=torch.float32), bias=bias)
    for ours, right in zip(actual, expected, strict=True):
        scale = right.abs().amax()
        torch.testing.assert_close(ours.double() / scale, right / scale, rtol=0, atol=2e-6)
    one_hot = torch.eye(64).expand(2, 4, 64, 64).transpose(1, 2).contiguous()  # v = I: the output is P itself
    q, k, _ = inputs(replace(case, width=64), dtype=torch.float32)
    weights = sigmoid_attention(q, k, one_hot, bias=bias)
    right = sigmoid_attention_reference(q.double(), k.double(), one_hot.double(), bias=bias)
    torch.testing.assert_close(weights.double(), right, rtol=2e-5, atol=0)


def test_bf16_weights_are_right_relatively() -> None:
    """Scores near -ln n keep two or three binary digits in bf16: the bias must join them in fp32."""
    case = Case(queries=64, keys=64, width=64)
    q, k, _ = inputs(case, dtype=torch.bfloat16)
    identity = torch.eye(64).expand(2, 4, 64, 64).transpose(1, 2).bfloat16().contiguous()
    bias = -math.log(4096)
    weights = sigmoid_attention(q, k, identity, bias=bias).double()
    right = sigmoid_attention_reference(q.double(), k.double(), identity.double(), bias=bias)
    visible = right > 0
    relative = ((weights - right)[visible] / right[visible]).abs()
    assert relative.max() < 0.02
    assert weights[~visible].abs().max() == 0


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("name", ["causal", "several blocks", "grouped", "segments", "window"])
def test_bf16_output_and_gradients(name: str) -> None:
    assert max(relative_errors(sigmoid_attention, CASES[name], torch.bfloat16)) < 0.01


def test_partial_sums_keep_fp32() -> None:
    case = Case(queries=8, keys=300)
    q, k, v = inputs(case, dtype=torch.bfloat16)
    out = sigmoid_attention(q, k, v, bias=-6.0, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert {x.dtype for x in gradients} == {torch.bfloat16}
    assert torch.equal(out.bfloat16(), sigmoid_attention(q, k, v, bias=-6.0))


def test_a_query_without_a_key_gives_nothing() -> None:
    out, *gradients = results(sigmoid_attention, inputs(CASES["no visible key"]), bias=-3.0, query_offset=-40)
    assert all(x.abs().max() == 0 for x in (out, *gradients))


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
    case = Case(batch=1, queries=5, keys=7, heads=4, key_heads=2, width=3, alibi="trained", trained_bias=True)
    chosen = options(case)
    per_head = [chosen.pop("bias"), chosen.pop("alibi_slopes")]
    # Through the custom op, per-head gradients are fp32: as exact as the differences they are compared with.
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias, slopes: sigmoid_attention(q, k, v, bias=bias, alibi_slopes=slopes, **chosen),
        [*inputs(case), *per_head],
        atol=1e-5,
        rtol=1e-5,
    )


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, v = inputs(CASES["causal"])
    q.requires_grad_(False)
    k.requires_grad_(False)
    sigmoid_attention(q, k, v, bias=-3.0).sum().backward()
    assert q.grad is None
    assert k.grad is None
    assert v.grad is not None


def test_autocast_computes_in_its_dtype() -> None:
    q, k, v = inputs(CASES["causal"], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sigmoid_attention(q, k.bfloat16(), v, bias=-3.0)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sigmoid_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=-3.0))


@pytest.mark.parametrize("name", ["causal", "one key head", "segments", "window"])
def test_the_custom_op_passes_opcheck(name: str) -> None:
    case = CASES[name]
    chosen = options(case, dtype=torch.float32)
    bias = chosen["bias"] if case.trained_bias else None
    ids = chosen.get("segment_ids")
    band = [case.window if isinstance(case.window, int) else -1, 0, 0]
    torch.library.opcheck(
        torch.ops.triptych.sigmoid_attention.default,
        (
            *inputs(case, dtype=torch.float32),
            bias,
            chosen["alibi_slopes"],
            ids,
            ids if ids is None else ids.clone(),
            [-3.0, 0.3],
            band,
            torch.float32,
        ),
    )


def test_compiles_whole_and_once_for_all_lengths() -> None:
    case = replace(CASES["grouped"], trained_bias=True, window=20)
    compiled = torch.compile(sigmoid_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (37, 50, 61):
        longer = replace(case, queries=length, keys=length)
        chosen = options(longer, dtype=torch.float32)
        expected = results(sigmoid_attention, inputs(longer, dtype=torch.float32), **chosen)
        ours = results(compiled, inputs(longer, dtype=torch.float32), **chosen)
        for actual, right in zip(ours, expected, strict=True):
            torch.testing.assert_close(actual, right)


def test_fake_tensors_pass_through() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 5, 4, 8, device="cuda", dtype=torch.bfloat16)
        out = sigmoid_attention(q, q, q, bias=-1.0, out_dtype=torch.float32)
        assert (out.device.type, out.dtype, out.shape) == ("cuda", torch.float32, q.shape)
        slopes = torch.empty(4, requires_grad=True)  # autograd on a fake CUDA tensor would want a real device
        q = torch.empty(2, 5, 4, 8, requires_grad=True)
        sigmoid_attention(q, q, q, bias=-1.0, alibi_slopes=slopes).sum().backward()
        assert q.grad is not None
        assert slopes.grad is not None


def test_fp32_takes_the_kernels_where_tf32_is_allowed() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        with FakeTensorMode():
            q = torch.empty(1, 1, 1, 64, device="cuda")
            for precision in ("ieee", "tf32"):
                matmul.fp32_precision = precision
                assert op.takes_triton(q) == (precision == "tf32")
                assert op.takes_triton(q.half())
                assert not op.takes_triton(q.double())
    finally:
        matmul.fp32_precision = before


GOOD = torch.zeros(2, 5, 4, 8)
IDS = torch.zeros(2, 5, dtype=torch.long)
BAD_CALLS = {
    "rank": ({"q": torch.zeros(5, 4, 8)}, "q must be"),
    "dtype": ({"q": GOOD.int(), "k": GOOD.int(), "v": GOOD.int()}, "q must be one of"),
    "mixed dtypes": ({"k": GOOD.double()}, "k must share q's dtype"),
    "device": ({"v": GOOD.to("meta")}, "v must share"),
    "batch": ({"k": GOOD[:1], "v": GOOD[:1]}, "k must be"),
    "k and v": ({"v": GOOD[:, :4]}, "v must have k's shape"),
    "empty": ({"q": GOOD[:0], "k": GOOD[:0], "v": GOOD[:0]}, "no size may be 0"),
    "no keys": ({"k": GOOD[:, :0], "v": GOOD[:, :0]}, "no size may be 0"),
    "groups": ({"k": GOOD[:, :, :3], "v": GOOD[:, :, :3]}, "4 heads must be a multiple"),
    "head width": (
        {name: torch.zeros(1, 2, 1, 257) for name in "qkv"},
        "head width may be 1 to 256, got 257",
    ),
    "strided": ({"k": torch.zeros(2, 5, 8, 4).transpose(2, 3)}, "k's last dimension must be contiguous"),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes must be \\(4,\\)"),
    "integer slopes": ({"alibi_slopes": torch.zeros(4, dtype=torch.long)}, "alibi_slopes must be floating"),
    "bias per position": ({"bias": torch.zeros(5)}, "bias must be \\(4,\\)"),
    "infinite bias": ({"bias": -math.inf}, "bias and scale must be finite"),
    "negative window": ({"window": -1}, "window must be a width >= 0"),
    "half a negative window": ({"window": (3, -2)}, "window must be a width >= 0"),
    "window as a list": ({"window": [3, 2]}, "window must be a width >= 0"),
    "window of half keys": ({"window": 2.5}, "window must be a width >= 0"),
    "offset of half keys": ({"query_offset": 0.5}, "query_offset must be an integer"),
    "ids with a cache": ({"q": GOOD[:, :2], "segment_ids": IDS[:, :2]}, "give key_segment_ids too"),
    "key ids alone": ({"key_segment_ids": IDS}, "key_segment_ids need segment_ids"),
    "ids shape": ({"segment_ids": IDS[:, :4]}, "segment_ids must be \\(2, 5\\)"),
    "ids dtype": ({"segment_ids": torch.zeros(2, 5)}, "segment_ids must be integers"),
    "ids that come back": (
        {"segment_ids": torch.tensor([[0, 0, 1, 1, 0]] * 2)},
        "segment_ids must never decrease",
    ),
    "both kinds of documents": (
        {"segment_ids": IDS, "cu_seqlens": torch.tensor([0, 5])},
        "cu_seqlens and segment_ids say the same",
    ),
    "documents of several rows": ({"cu_seqlens": torch.tensor([0, 5])}, "one packed row"),
    "output dtype": ({"out_dtype": torch.float16}, "out_dtype must be q's dtype"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_bad_argument_is_named(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"q": GOOD, "k": GOOD, "v": GOOD, "bias": -1.0, **changes}
    with pytest.raises(ValueError, match=message):
        sigmoid_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize("starts", [[0, 4], [1, 5], [0, 3, 2, 5]])
def test_documents_that_do_not_span_the_row_are_refused(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
        sigmoid_attention(GOOD[:1], GOOD[:1], GOOD[:1], bias=-1.0, cu_seqlens=torch.tensor(starts))


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match="no argument query_ofset"):
        sigmoid_attention(GOOD, GOOD, GOOD, bias=-1.0, query_ofset=3)  # type: ignore[call-arg]
