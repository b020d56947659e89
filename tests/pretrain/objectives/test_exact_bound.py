"""The estimated likelihood bound equals the exact one, computed by going through every mask of small documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from data_pipelines.tokens.roles import CONDITION, TARGET, read_roles
from models.layers.head import Head
from pretrain.objectives.corruption import PARTS
from pretrain.objectives.masked_diffusion import MaskedDiffusion
from tests.pretrain.objectives.rows import (
    ROW,
    VOCABULARY,
    RepeatedRow,
    batch_of,
    every_modality,
    objective_of,
    small_model,
)

SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "linear"},
    {"schedule": "cosine"},
    {"schedule": "polynomial", "power": 2},
    {"schedule": "polynomial", "power": 0.5},
]
TASKS = ("text-to-image", "text", "audio-to-text")
MASKINGS = ("fixed_count", "bernoulli")
ROWS, REPEATS = {"fixed_count": 64, "bernoulli": 256}, 24
MODEL = small_model()


@cache
def exact_bounds(joint: bool) -> dict[str, float]:
    """Nats per target token of each task: the mean over k uniform in 1 ... n, and over all sets of k tokens."""
    found = {}
    for task, document in zip(TASKS, ROW, strict=True):
        batch = batch_of([[document]], 32, [0])
        roles = read_roles(VOCABULARY, batch.tokens, batch.positions.long())
        may = (roles.role == TARGET) | (joint & (roles.role == CONDITION))
        places = may[0].nonzero().flatten().tolist()
        n = len(places)
        total = 0.0
        for k in range(1, n + 1):
            for masked in itertools.combinations(places, k):
                total += masked_nats(batch.tokens, batch.segment_ids, batch.positions, masked) / (
                    k * math.comb(n, k)
                )
        found[task] = total / n
    return found


def masked_nats(
    tokens: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor, masked: tuple[int, ...]
) -> float:
    where = torch.tensor(masked)
    inputs = tokens.clone()
    inputs[0, where] = VOCABULARY.mask
    with torch.no_grad():
        logits = MODEL.head(MODEL(inputs, segments, positions))[0, where, : VOCABULARY.first_special]
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, where], reduction="sum"))


def estimates(objective: MaskedDiffusion) -> dict[str, torch.Tensor]:
    """By task, means of steps, each of another seed: independent of each other, stratified in themselves."""
    found: dict[str, list[float]] = {task: [] for task in TASKS}
    for seed in range(REPEATS):
        seeded = MaskedDiffusion(objective.section, VOCABULARY, seed)
        batch = seeded.rows(RepeatedRow()).batch(range(ROWS[objective.section.masking]))
        with torch.no_grad():
            parts = seeded(MODEL, batch).parts.tolist()
        for task in TASKS:
            total, weight = parts[PARTS.index(f"elbo_task/{task}")]
            found[task].append(total / weight)
    return {task: torch.tensor(values, dtype=torch.float64) for task, values in found.items()}


def agree(found: torch.Tensor, exact: float) -> None:
    """Within 4.5 standard errors, which must be small: by chance once in some 6,000 times, and seeds are fixed."""
    error = found.std() / math.sqrt(len(found))
    assert error < 0.08 * exact, "too noisy to tell anything"
    assert abs(found.mean() - exact) < 4.5 * error + 1e-6, (found.mean(), exact, error)


def combinations() -> Iterator[Any]:
    """All of them; `slow` but every schedule with one masking, and every masking with and without complements."""
    for number, schedule in enumerate(SCHEDULES):
        for masking, complementary in itertools.product(MASKINGS, (False, True)):
            usual = (masking, complementary) == (MASKINGS[number % 2], number // 2 == 1)
            name = "-".join(map(str, [*schedule.values(), masking, complementary]))
            marks = [] if usual else [pytest.mark.slow]
            yield pytest.param(schedule, masking, complementary, id=name, marks=marks)


@pytest.mark.parametrize(("schedule", "masking", "complementary"), combinations())
def test_the_bound_is_exact_for_every_schedule_and_masking(
    schedule: dict[str, Any], masking: str, complementary: bool
) -> None:
    if masking == "bernoulli" and schedule.get("power") == 0.5:
        schedule = {
            "schedule": "polynomial",
            "power": 1.5,
        }  # few masks weigh 1 / r^2 at a power of 1/2: noise alone
    objective = objective_of(masking=masking, complementary=complementary, **every_modality(**schedule))
    for task, found in estimates(objective).items():
        agree(found, exact_bounds(joint=False)[task])


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("whole_modality", [0.0, 0.4])
def test_the_joint_bound_is_exact(whole_modality: float, complementary: bool) -> None:
    settings: dict[str, Any] = {
        "condition": "joint",
        "whole_modality": whole_modality,
        "complementary": complementary,
    }
    for task, found in estimates(objective_of(**settings)).items():
        agree(found, exact_bounds(joint=True)[task])


@pytest.mark.parametrize("weight", ["none", "clipped"])
def test_the_bound_is_reported_whatever_is_trained(weight: str) -> None:
    settings = every_modality(schedule="cosine", weight=weight, clip=0.3, scale=0.5)
    objective = objective_of(condition_dropout=0.5, **settings)
    for task, found in estimates(objective).items():
        agree(found, exact_bounds(joint=False)[task])


def test_exact_conditionals_give_the_exact_likelihood() -> None:
    """A model that knows p(x_i | what is shown) has a tight bound: -ln p(x)."""
    torch.manual_seed(0)
    joint = torch.rand(3, 3, 3, dtype=torch.float64)
    joint /= joint.sum()

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Head(64, 64)
            torch.nn.init.eye_(self.head.weight)

        def forward(
            self, tokens: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor
        ) -> torch.Tensor:
            logits = torch.full((*tokens.shape, 64), -1e9)
            for row, shown in enumerate(tokens[:, :3].tolist()):
                fixed = joint
                for axis, token in enumerate(shown):
                    if token != VOCABULARY.mask:
                        fixed = fixed * torch.eye(3)[token].view([-1 if a == axis else 1 for a in range(3)])
                for axis in range(3):
                    others = [a for a in range(3) if a != axis]
                    logits[row, axis, :3] = (fixed.sum(others) / fixed.sum()).clamp(min=1e-12).log()
            return logits

    document = [2, 0, 1]
    exact = -math.log(joint[2, 0, 1])
    objective, table = objective_of(), Table()
    batch = batch_of([[document]] * 96, 4, list(range(96)))
    found = []
    for draw in range(12):
        (prepared,) = objective.evaluation_batches([batch], [draw])
        total, weight = objective(table, prepared).parts[0].tolist()
        found.append(3 * total / weight)
    agree(torch.tensor(found), exact)
