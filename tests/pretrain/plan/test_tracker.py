"""The tracker counts the same on real tensors and on tensors without storage."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from models import families
from models.initialise import initialise
from pretrain.plan.tracker import TensorTracker
from tests.harness import run_ranks

MODELS: dict[str, dict[str, Any]] = {
    "sigmoid": {"layers": 2, "width": 32, "heads": 4, "vocabulary": 64},
    "pararnn": {"cell": "lstm", "layers": 2, "width": 32, "heads": 2, "vocabulary": 64},
    "trimodal": {"layers": 2, "width": 32, "heads": 4, "vocabulary": 64},
}


def passes(name: str, *, fake: bool) -> tuple[int, int, int]:
    """Bytes held between the passes, the most during them, and those left."""
    family = families[name]
    config = family.config(**MODELS[name]).resolved(vocabulary=64, sequence_length=16)
    with FakeTensorMode() if fake else contextlib.nullcontext():
        model = family.build(config)
        if not fake:
            initialise(model, 1)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tokens_BT = torch.zeros((2, 16), dtype=torch.int64)
        with TensorTracker() as tracker:
            out = model(tokens_BT, None, None).square().sum()
            kept = tracker.live
            out.backward()
            del out
    return kept, tracker.peak, tracker.live


@pytest.mark.parametrize("name", list(MODELS))
def test_passes_hold_as_much_on_tensors_without_storage(name: str) -> None:
    assert passes(name, fake=True) == passes(name, fake=False)


def test_memory_is_that_of_storages_while_they_live() -> None:
    before = torch.zeros(256)
    with TensorTracker() as tracker:
        made = before + 1
        views = [made[:10], made.view(16, 16).t(), before[3:]]
        assert tracker.live == 1024
        again = made * 2
        assert (tracker.live, tracker.peak) == (2048, 2048)
        del made, views
        assert (tracker.live, tracker.peak) == (1024, 2048)
        again.add_(1)
    assert tracker.live == 1024


def traffic() -> dict[str, int]:
    group = dist.new_group()
    whole, part = torch.zeros(64), torch.zeros(32)
    with TensorTracker(lambda found: "mine" if found.group_name == group.group_name else "other") as tracker:
        dist.all_reduce(whole, group=group)
        dist.all_gather_into_tensor(whole, part, group=group)
        dist.reduce_scatter_tensor(part, whole, group=group)
        dist.all_reduce(torch.zeros(1))
        dist.all_to_all_single(torch.empty_like(part), part, group=group)
    with TensorTracker(smallest_call=64) as large:
        dist.all_reduce(torch.zeros(1))
    assert not large.traffic
    return {f"{name} {kind}": size for (name, kind), size in tracker.traffic.items()}


def test_collectives_count_their_larger_side_under_the_group_s_name() -> None:
    expected = {
        "mine allreduce": 256,
        "mine allgather_base": 256,
        "mine reduce_scatter_base": 256,
        "mine alltoall_base": 128,
        "other allreduce": 4,
    }
    assert run_ranks(2, traffic) == [expected, expected]
