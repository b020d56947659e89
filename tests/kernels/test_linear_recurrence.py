"""Linear recurrences against their definition: exact where numbers are integers, gradients, errors.

With factors that are signs, or signed permutations of two numbers, and integer inputs, every intermediate is an
integer below 2^24: two right scans agree bit for bit, whatever the order of their sums.

Shape suffixes: B batch, T time, D channels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.linear_recurrence import linear_recurrence, linear_recurrence_reference
from tests.kernels.recurrence_problems import assert_bit_equal, integers, rotations

# Around the borders of chunks, which are as long as the square root of the length.
LENGTHS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 24, 25, 26, 48, 49, 50, 120, 121, 122)


@pytest.mark.parametrize("block", [False, True], ids=["diagonal", "block"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_bit_equal_for_signs_and_permutations(block: bool, reverse: bool) -> None:
    for time in LENGTHS:
        assert_bit_equal(time, block=block, reverse=reverse)


@settings(max_examples=60, deadline=None)
@given(
    time=st.integers(1, 300),
    block=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_bit_equal_at_any_length(time: int, block: bool, reverse: bool, seed: int) -> None:
    assert_bit_equal(time, block=block, reverse=reverse, seed=seed)


@pytest.mark.parametrize("reverse", [False, True])
def test_rotations_keep_their_length_over_many_steps(reverse: bool) -> None:
    a, b, state = rotations(4096)
    y = linear_recurrence(a, b, state, reverse=reverse)
    expected = linear_recurrence_reference(a.double(), b.double(), state.double(), reverse=reverse)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("block", [False, True], ids=["diagonal", "block"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradcheck(block: bool, reverse: bool) -> None:
    tensors = [x.double().requires_grad_() for x in integers(5, block=block)]

    def function(*given: Tensor) -> Tensor:
        return linear_recurrence(*given, reverse=reverse)

    assert torch.autograd.gradcheck(function, tensors)


def test_without_a_state_it_starts_from_zero() -> None:
    a, b, state = integers(9, block=False)
    expected = linear_recurrence(a, b, torch.zeros_like(state))
    assert torch.equal(linear_recurrence(a, b), expected)


def test_bfloat16_is_computed_in_float32() -> None:
    a, b, state = (x.bfloat16() for x in rotations(300))
    y = linear_recurrence(a, b, state)
    expected = linear_recurrence_reference(a.double(), b.double(), state.double())
    assert y.dtype == torch.bfloat16
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < 0.005


@pytest.mark.parametrize("block", [False, True], ids=["diagonal", "block"])
def test_opcheck_and_compile(block: bool) -> None:
    a, b, state = (x.requires_grad_() for x in integers(6, block=block))
    torch.library.opcheck(torch.ops.triptych.linear_recurrence.default, (a, b, state, True))
    compiled = torch.compile(linear_recurrence, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b, state), linear_recurrence(a, b, state))


ERRORS = {
    "length 0": (lambda a, b, h: (a[:, :0], b[:, :0], h), "b has a size of 0 .a sequence of length 0"),
    "b": (lambda a, b, h: (a, b[0], h), "b must be .batch, time, channels. or"),
    "dtype": (lambda a, b, h: (a.long(), b.long(), h), "b must be one of float64"),
    "a": (lambda a, b, h: (a[:, :3], b, h), "a must be .2, 9, 3., by b"),
    "a's dtype": (lambda a, b, h: (a.double(), b, h), "a must share b's dtype"),
    "state": (lambda a, b, h: (a, b, h[:1]), "state must be .2, 3. on cpu"),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_refused_by_name(change: Callable[..., tuple[torch.Tensor, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_recurrence(*change(*integers(9, block=False)))
