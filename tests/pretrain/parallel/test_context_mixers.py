"""Mixers of ranks that share rows: outputs and gradients are those of the plain mixer on whole rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data_pipelines.stream.sequence_part import SequencePart
from kernels.newton_rnn import Solver
from models.layers.attention import Attention, AttentionShape
from models.layers.conv import CausalConv
from models.mamba2.config import Mamba2Config
from models.mamba2.mixer import Mamba2Mixer
from models.pararnn.cells import CELLS, Cell, CellShape
from models.sigmoid.mixer import SigmoidAttention
from models.softmax.mixer import SoftmaxAttention
from pretrain.parallel.context_attention import gathered_attend, swapped
from pretrain.parallel.context_recurrence import (
    haloed_convolution,
    summarised_solve,
    swapped_scan,
    swapped_solve,
)
from tests.pretrain.parallel.threads import ThreadExchange, run_threads

ROWS, TIME, WIDTH = 2, 24, 16
NEWTON = Solver(method="newton", iterations=8, max_iterations=8)
Share = Callable[[Any, SequencePart, ThreadExchange], None]


def segment_ids(lengths: list[list[int]]) -> Tensor:
    """Documents of these lengths in each row, and one more that fills it up."""
    rows = []
    for documents in lengths:
        ids = [number for number, length in enumerate([*documents, TIME]) for _ in range(length)]
        rows.append(ids[:TIME])
    return torch.tensor(rows, dtype=torch.int16)


documents = st.lists(
    st.lists(st.integers(1, TIME), max_size=6), min_size=ROWS, max_size=ROWS
)  # also cuts at the cuts between ranks, and documents of one token


def drawn(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.double()


def positions_of(ids_BT: Tensor) -> Tensor:
    """Within each document."""
    found = torch.zeros_like(ids_BT, dtype=torch.long)
    for t in range(1, ids_BT.shape[1]):
        found[:, t] = (found[:, t - 1] + 1) * (ids_BT[:, t] == ids_BT[:, t - 1])
    return found


def run(
    build: Callable[[], nn.Module], share: Share, ids_BT: Tensor, order: str, ranks: int, channels: int
) -> None:
    """Compare the module on whole rows with the module on parts: outputs, gradients of inputs and of weights."""
    generator = torch.Generator().manual_seed(2)
    x_BTC = torch.randn(ROWS, TIME, channels, generator=generator, dtype=torch.float64)
    goal_BTC = torch.randn(ROWS, TIME, channels, generator=generator, dtype=torch.float64)
    positions_BT = positions_of(ids_BT)
    plain = build()
    whole = x_BTC.clone().requires_grad_()
    expected = outputs(plain, whole, ids_BT, positions_BT)
    (expected * goal_BTC).sum().backward()

    def part_of_rank(exchange: ThreadExchange) -> tuple[SequencePart, Tensor, Tensor, list[Tensor]]:
        part = SequencePart(exchange.rank, ranks, order)  # type: ignore[arg-type]
        module = build()
        share(module, part, exchange)
        mine = part.take(x_BTC).requires_grad_()
        made = outputs(module, mine, ids_BT, part.take(positions_BT))
        (made * part.take(goal_BTC)).sum().backward()
        assert mine.grad is not None
        weights = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        return part, made.detach(), mine.grad, weights

    summed = [torch.zeros_like(parameter) for parameter in plain.parameters()]
    for part, made, gradient, weights in run_threads(ranks, part_of_rank):
        torch.testing.assert_close(made, part.take(expected.detach()), rtol=1e-8, atol=1e-10)
        assert whole.grad is not None
        torch.testing.assert_close(gradient, part.take(whole.grad), rtol=1e-8, atol=1e-10)
        summed = [a + b for a, b in zip(summed, weights, strict=True)]
    for (name, parameter), total in zip(plain.named_parameters(), summed, strict=True):
        torch.testing.assert_close(total, parameter.grad, rtol=1e-8, atol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023


def outputs(module: nn.Module, x_BTC: Tensor, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
    if isinstance(module, Attention):
        return module(x_BTC, ids_BT, positions_BT)
    made = module(x_BTC, ids_BT)
    return made[0] if isinstance(made, tuple) else made


def attention(kind: str, positions: str, causal: bool) -> Callable[[], nn.Module]:
    shape = AttentionShape(
        width=WIDTH,
        heads=8,
        kv_heads=4,
        positions=positions,  # type: ignore[arg-type]
        rope_base=100.0,
        qk_norm=True,
        norm_epsilon=1e-5,
        causal=causal,
    )
    return lambda: drawn(SigmoidAttention(shape, -2.0) if kind == "sigmoid" else SoftmaxAttention(shape))


def share_gathered(module: SigmoidAttention, part: SequencePart, exchange: ThreadExchange) -> None:
    module.attend = gathered_attend(module, part, exchange)  # type: ignore[method-assign, assignment]


def share_swapped(module: Attention, part: SequencePart, exchange: ThreadExchange) -> None:
    module.attend = swapped(module, SoftmaxAttention.crossing, exchange)  # type: ignore[method-assign]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("positions", "causal", "order"),
    [("alibi", True, "balanced"), ("rope", True, "contiguous"), ("rope", False, "contiguous")],
)
@settings(max_examples=8, deadline=None)
@given(lengths=documents)
def test_sigmoid_attention_gathers_keys(
    positions: str, causal: bool, order: str, ranks: int, lengths: list[list[int]]
) -> None:
    build = attention("sigmoid", positions, causal)
    run(build, share_gathered, segment_ids(lengths), order, ranks, WIDTH)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("positions", "causal"), [("alibi", True), ("rope", True), ("rope", False)])
@settings(max_examples=8, deadline=None)
@given(lengths=documents)
def test_softmax_attention_swaps_heads(
    positions: str, causal: bool, ranks: int, lengths: list[list[int]]
) -> None:
    build = attention("softmax", positions, causal)
    run(build, share_swapped, segment_ids(lengths), "contiguous", ranks, WIDTH)


def cell(name: str) -> Callable[[], nn.Module]:
    shape = CellShape(width=12, heads=3, clip=0.9, solver=NEWTON)
    return lambda: drawn(CELLS[name](shape))


def share_channels(module: Cell, part: SequencePart, exchange: ThreadExchange) -> None:
    module.solve = swapped_solve(module, exchange)  # type: ignore[method-assign, assignment]


def share_summaries(module: Cell, part: SequencePart, exchange: ThreadExchange) -> None:
    module.solve = summarised_solve(module, exchange)  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("share", [share_channels, share_summaries])
@pytest.mark.parametrize(
    "name", ["gru", "lstm"]
)  # a step function's Jacobian is not for threads: test_context.py
@pytest.mark.parametrize("ranks", [2, 3])
@settings(max_examples=6, deadline=None)
@given(lengths=documents)
def test_recurrences_cross_ranks(name: str, share: Share, ranks: int, lengths: list[list[int]]) -> None:
    run(cell(name), share, segment_ids(lengths), "contiguous", ranks, 12)


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("ranks", [2, 4])
@settings(max_examples=10, deadline=None)
@given(lengths=documents)
def test_a_convolution_reaches_into_the_rank_before(ranks: int, taps: int, lengths: list[list[int]]) -> None:
    def share(module: CausalConv, part: SequencePart, exchange: ThreadExchange) -> None:
        module.forward = haloed_convolution(module, exchange)  # type: ignore[method-assign, assignment]

    build: Callable[[], nn.Module] = lambda: drawn(CausalConv(5, taps))  # noqa: E731
    run(build, share, segment_ids(lengths), "contiguous", ranks, 5)


@pytest.mark.parametrize(("ranks", "groups"), [(2, 1), (2, 4), (4, 2)])
@settings(max_examples=6, deadline=None)
@given(lengths=documents)
def test_mamba2_swaps_heads(ranks: int, groups: int, lengths: list[list[int]]) -> None:
    config = Mamba2Config(layers=1, width=8, heads=4, groups=groups, state_width=3, conv_width=3, chunk=5)

    def share(module: Mamba2Mixer, part: SequencePart, exchange: ThreadExchange) -> None:
        module.scan = swapped_scan(module, exchange)  # type: ignore[method-assign, assignment]
        for conv in (module.conv, module.maps_conv):
            conv.forward = haloed_convolution(conv, exchange)  # type: ignore[method-assign, assignment]

    run(lambda: drawn(Mamba2Mixer(config)), share, segment_ids(lengths), "contiguous", ranks, 8)


def sent(ranks: int, build: Callable[[], nn.Module], share: Share, channels: int) -> list[tuple[int, int]]:
    """Elements that each rank sends in a forward and in a backward pass."""

    def part_of_rank(exchange: ThreadExchange) -> tuple[int, int]:
        module = build()
        share(module, SequencePart(exchange.rank, ranks, "contiguous"), exchange)
        x_BTC = torch.ones(ROWS, TIME // ranks, channels, dtype=torch.float64, requires_grad=True)
        made = outputs(module, x_BTC, segment_ids([[], []]), torch.zeros(ROWS, TIME // ranks))
        forward = exchange.sent
        made.sum().backward()
        return forward, exchange.sent - forward

    return run_threads(ranks, part_of_rank)


def test_the_bytes_that_the_modules_promise() -> None:
    """Elements per layer, as `context_attention` and `context_recurrence` tell them."""
    ranks, own = 4, ROWS * TIME // 4
    keys = own * WIDTH // 2  # 4 of 8 heads
    gathered = sent(ranks, attention("sigmoid", "rope", True), share_gathered, WIDTH)
    assert gathered == [(2 * (ranks - 1) * keys,) * 2] * ranks
    swapped = sent(ranks, attention("softmax", "rope", True), share_swapped, WIDTH)
    assert swapped == [((ranks - 1) * 6 * keys // ranks,) * 2] * ranks
    channels = sent(ranks, cell("gru"), share_channels, 12)
    assert channels == [((ranks - 1) * own * 4 * 12 // ranks,) * 2] * ranks
    iterations, state = NEWTON.iterations, ROWS * 12
    for name, (carried, returned, halo) in {"gru": (3, 2, 1), "lstm": (8, 6, 2)}.items():
        summaries = sent(ranks, cell(name), share_summaries, 12)
        forward = (ranks - 1) * carried * state * iterations + 1  # and the residual's maximum
        # To the rank on the right also the guess; the last has none there.
        assert [pair[0] for pair in summaries] == [forward + halo * state] * (ranks - 1) + [forward]
        assert [pair[1] for pair in summaries] == [(ranks - 1) * returned * state] * ranks
