"""A head whose vocabulary is divided gives what a whole one gives; placements cover a tensor once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models.layers.head import Head
from models.layers.loss import each_cross_entropy, token_cross_entropy
from pretrain.config import ParallelSection
from pretrain.parallel.mesh import Axis, build_mesh
from pretrain.parallel.tensor import even_placement, vocabulary_placement
from pretrain.parallel.weights import local_part
from pretrain.parallel.without_cuda import stand_in_for_cuda
from tests.harness import run_ranks

WIDTH, TOKENS = 6, 10


def plain_head(vocabulary: int) -> Head:
    head = Head(WIDTH, vocabulary)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    return head


def losses_and_gradients(head: Head, size: int | None, chunk: int) -> list[Tensor]:
    """Two losses, z term, logits, and the gradient of the hidden states. The head keeps its own."""
    random = torch.Generator().manual_seed(1)
    hidden_BTC = torch.randn(2, TOKENS // 2, WIDTH, generator=random, requires_grad=True)
    targets_BT = torch.randint(0, size or head.out_features, (2, TOKENS // 2), generator=random)
    weights_BT = torch.rand(2, TOKENS // 2, generator=random)
    loss, z_term = token_cross_entropy(
        head, hidden_BTC, targets_BT, weights_BT, z_loss=0.1, chunk_tokens=chunk
    )
    flat = hidden_BTC.flatten(0, 1)
    each_N = each_cross_entropy(head, flat, targets_BT.flatten(), size=size, chunk_tokens=chunk)
    none = each_cross_entropy(head, flat[:0], targets_BT.flatten()[:0], size=size, chunk_tokens=chunk)
    (loss + z_term + (each_N * weights_BT.flatten()).sum() + none.sum()).backward()
    assert hidden_BTC.grad is not None
    with torch.no_grad():
        return [loss.detach(), z_term.detach(), each_N.detach(), head(hidden_BTC), hidden_BTC.grad]


def _divided(vocabulary: int, size: int | None, chunk: int) -> None:
    from pretrain.parallel.tensor_layers import SharedHead

    axis = build_mesh(ParallelSection(tensor=dist.get_world_size())).tensor
    stand_in_for_cuda()
    plain = plain_head(vocabulary)
    shared = SharedHead(plain, axis)
    placement = vocabulary_placement((vocabulary, WIDTH), axis)

    def cut(whole: Tensor) -> Tensor:
        return local_part(whole, placement, tuple(shared.weight.shape))

    shared.weight.data = cut(plain.weight.detach())
    expected = losses_and_gradients(plain, size, chunk)
    found = losses_and_gradients(shared, size, chunk)
    dist.all_reduce(found[-1])  # each rank has its part of the gradient: the region's entry sums it
    torch.testing.assert_close(found, expected)
    assert plain.weight.grad is not None
    torch.testing.assert_close(shared.weight.grad, cut(plain.weight.grad))


@pytest.mark.parametrize(
    ("ranks", "vocabulary", "size", "chunk"),
    [(2, 8, None, 100), (2, 7, 5, 3), (3, 7, 4, 100), (4, 5, None, 4), (4, 5, 2, 100)],
)
def test_a_divided_head_is_the_whole_one(ranks: int, vocabulary: int, size: int | None, chunk: int) -> None:
    """Also where ranks hold nothing that can be predicted, or nothing but what fills the vocabulary up."""
    run_ranks(ranks, _divided, vocabulary, size, chunk)


@given(
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    ranks=st.integers(1, 4),
    dim=st.integers(0, 1),
    vocabulary=st.integers(1, 20),
)
def test_the_ranks_together_hold_everything_once(
    parts: list[int], ranks: int, dim: int, vocabulary: int
) -> None:
    stacked = tuple(ranks * part for part in parts)
    shape = (sum(stacked), 3) if dim == 0 else (3, sum(stacked))
    axes = [Axis(None, rank, ranks) for rank in range(ranks)]  # type: ignore[arg-type]  # no group is asked
    even = [even_placement(shape, dim, stacked, axis) for axis in axes]
    words = [vocabulary_placement((vocabulary, 3), axis) for axis in axes]
    for placements in (even, words):
        rows, columns = placements[0].shape
        shape = (rows, columns)
        whole = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape) + 1
        seen = torch.zeros_like(whole)
        for placement in placements:
            assert placement.dim is not None
            rows = -(-shape[placement.dim] // ranks)
            local = local_part(whole, placement, (rows, 3) if placement.dim == 0 else (3, rows))
            for here, there, length in placement.segments:
                part = local.narrow(placement.dim, here, length)
                seen.narrow(placement.dim, there, length).add_(part)
        assert torch.equal(seen, whole)
