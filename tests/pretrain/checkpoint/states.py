"""States of plain tensors, for tests of the store that need no engine."""

from __future__ import annotations

import math

import torch

from pretrain.checkpoint import Fragment, Placement, TrainingState

SHAPES = {"embedding.weight": (61, 8), "norm.weight": (8,), "head.weight": (61, 8)}
KINDS = ("master", "exp_avg", "exp_avg_sq")


def make_state(
    seed: int = 0,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    *,
    rank: int = 0,
    ranks: int = 1,
    meta: dict[str, object] | None = None,
) -> TrainingState:
    """This rank's equal part of each parameter; the values are the same for any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    fragments = []
    for name, shape in shapes.items():
        elements = math.prod(shape)
        length = -(-elements // ranks)
        first, last = min(rank * length, elements), min((rank + 1) * length, elements)
        tensors = {kind: torch.randn(elements, generator=generator)[first:last].clone() for kind in KINDS}
        step = torch.tensor(float(seed))
        fragments.append(Fragment(name, shape, first, tensors, step, Placement.whole(shape)))
    return TrainingState(fragments, meta or {"step": seed})


def is_equal(one: TrainingState, other: TrainingState) -> bool:
    """Whether tensors and step counts are the same."""
    return all(
        torch.equal(a.step, b.step) and all(torch.equal(a.tensors[kind], b.tensors[kind]) for kind in KINDS)
        for a, b in zip(one.fragments, other.fragments, strict=True)
    )
