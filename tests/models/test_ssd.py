"""Mamba-2's chunked form against the recurrence itself, walked position by position.

Shape suffixes: B batch, T time, H heads, P head width, G groups, N state width.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.mamba2.ssd import SSMInputs, chunked, ssm


def some_inputs(parts: list[int], *, groups: int = 1, state: bool = True, seed: int = 0) -> SSMInputs:
    torch.manual_seed(seed)
    time, double = sum(parts), torch.float64
    return SSMInputs(
        x_BTHP=torch.randn(2, time, 4, 3, dtype=double, requires_grad=True),
        dt_BTH=(torch.rand(2, time, 4, dtype=double) * 2).requires_grad_(),
        rate_H=(-torch.rand(4, dtype=double) * 3).requires_grad_(),
        in_BTGN=torch.randn(2, time, groups, 5, dtype=double, requires_grad=True),
        out_BTGN=torch.randn(2, time, groups, 5, dtype=double, requires_grad=True),
        state_BHPN=torch.randn(2, 4, 3, 5, dtype=double, requires_grad=True) if state else None,
        segment_ids_BT=torch.cat([torch.full((2, n), i % 2) for i, n in enumerate(parts)], dim=1),
    )


def sequential(inputs: SSMInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition."""
    batch, time, heads, width = inputs.x_BTHP.shape
    group = heads // inputs.in_BTGN.shape[2]
    in_BTHN, out_BTHN = (m.repeat_interleave(group, 2) for m in (inputs.in_BTGN, inputs.out_BTGN))
    state = inputs.state_BHPN
    if state is None:
        state = torch.zeros(batch, heads, width, in_BTHN.shape[3], dtype=torch.float64)
    outputs, ids = [], inputs.segment_ids_BT
    for t in range(time):
        if ids is not None and t and ids[0, t] != ids[0, t - 1]:
            state = torch.zeros_like(state)
        decay = (inputs.dt_BTH[:, t] * inputs.rate_H).exp()
        drive = inputs.dt_BTH[:, t, :, None] * inputs.x_BTHP[:, t]
        state = state * decay[..., None, None] + drive[..., None] * in_BTHN[:, t, :, None]
        outputs.append((state * out_BTHN[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), state


@settings(deadline=None, max_examples=40)
@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    chunk=st.integers(1, 8),
    groups=st.sampled_from([1, 2, 4]),
    state=st.booleans(),
)
def test_chunks_equal_the_recurrence_gradients_too(
    parts: list[int], chunk: int, groups: int, state: bool
) -> None:
    inputs = some_inputs(parts, groups=groups, state=state)
    found, expected = chunked(inputs, chunk), sequential(inputs)
    torch.testing.assert_close(found, expected)
    weights = [torch.randn_like(x) for x in expected]
    leaves = [x for x in vars(inputs).values() if x is not None and x.is_floating_point()]
    grads = [
        torch.autograd.grad([(x * w).sum() for x, w in zip(pair, weights, strict=True)], leaves)
        for pair in (found, expected)
    ]
    torch.testing.assert_close(grads[0], grads[1])


def test_long_decays_do_not_overflow() -> None:
    inputs = dataclasses.replace(some_inputs([64]), rate_H=torch.full((4,), -500.0, dtype=torch.float64))
    out, state = chunked(inputs, 16)
    assert out.isfinite().all() and state.isfinite().all()


def test_the_package_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="kernel: torch"):
        ssm(some_inputs([4]), 2, "mamba_ssm")
