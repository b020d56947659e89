"""Which tokens are masked: a pure function of the row, spread evenly over a step, and never structure."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.rows.mixing import Mixture
from data_pipelines.stream.batch import Batch, Corruption
from data_pipelines.tokens.roles import CONDITION, STRUCTURE, TARGET, Roles, read_roles
from pretrain.objectives.corruption import PARTS
from pretrain.objectives.counters import hashed, key, stratified, uniform
from pretrain.objectives.diffusion_schedules import schedule_of
from pretrain.objectives.masked_diffusion import PART_SCALARS
from tests.pretrain.objectives.rows import (
    VOCABULARY,
    DrawnRows,
    RepeatedRow,
    every_modality,
    objective_of,
    small_model,
)


def corruption_of(batch: Batch) -> Corruption:
    assert batch.corruption is not None
    return batch.corruption


def roles_of(batch: Batch) -> Roles:
    return read_roles(VOCABULARY, batch.tokens, batch.positions.long())


def masked(batch: Batch) -> torch.Tensor:
    return corruption_of(batch).inputs == VOCABULARY.mask


def scored(batch: Batch) -> torch.Tensor:
    """(B, T) bool: the places to predict."""
    found = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    found.view(-1)[corruption_of(batch).places] = True
    return found


SETTINGS: list[dict[str, Any]] = [
    {},
    {"masking": "bernoulli", **every_modality(schedule="cosine")},
    {"complementary": True, "condition_dropout": 0.5},
    {"condition": "joint", "whole_modality": 0.5, "complementary": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_rows_masks_depend_on_its_number_alone(settings: dict[str, Any]) -> None:
    rows = objective_of(**settings).rows(DrawnRows())
    whole = corruption_of(rows.batch(range(24)))
    for some in (
        [range(24)],
        [range(n, n + 3) for n in range(0, 24, 3)],
        [[23], range(5, 23), [0, 4, 2, 1, 3]],
    ):
        for numbers in some:
            part = corruption_of(pickle.loads(pickle.dumps(rows)).batch(list(numbers)))
            for place, number in enumerate(numbers):
                ours, theirs = part.rows(place, place + 1), whole.rows(number, number + 1)
                assert ours.row_places == theirs.row_places
                for name in (
                    "inputs",
                    "places",
                    "weights",
                    "elbo_weights",
                    "loss_parts",
                    "targets",
                    "loss_part_targets",
                ):
                    assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    others = corruption_of(objective_of(seed=1, **settings).rows(DrawnRows()).batch(range(24)))
    assert not torch.equal(others.inputs, whole.inputs)


@pytest.mark.parametrize("settings", SETTINGS)
def test_splitting_a_batch_keeps_rows_and_places_together(settings: dict[str, Any]) -> None:
    batch = objective_of(**settings).rows(DrawnRows()).batch(range(10))
    expected = batch.tokens[scored(batch)]
    micro_batches = batch.split(3)
    assert [len(part.rows) for part in micro_batches] == [3, 3, 3, 1]
    assert torch.equal(torch.cat([part.tokens[scored(part)] for part in micro_batches]), expected)
    assert torch.equal(
        torch.cat([corruption_of(part).weights for part in micro_batches]), corruption_of(batch).weights
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_structure_is_shown_and_what_is_predicted_is_masked(settings: dict[str, Any]) -> None:
    batch = objective_of(**settings).rows(DrawnRows()).batch(range(64))
    part = roles_of(batch).role
    assert not masked(batch)[part == STRUCTURE].any()
    assert masked(batch)[scored(batch)].all()
    inputs = corruption_of(batch).inputs
    assert torch.equal(inputs[~masked(batch)], batch.tokens[~masked(batch)])
    if "condition" not in settings:
        assert part[scored(batch)].eq(TARGET).all()
    assert corruption_of(batch).row_places == tuple(scored(batch).sum(1).tolist())


def test_a_dropped_condition_is_masked_whole_and_out_of_the_bound() -> None:
    batch = objective_of(condition_dropout=0.25).rows(DrawnRows()).batch(range(400))
    roles, corruption = roles_of(batch), corruption_of(batch)
    condition = roles.role == CONDITION
    dropped, pairs = 0, 0
    weight_BT = torch.zeros(batch.tokens.shape)
    weight_BT.view(-1)[corruption.places] = corruption.elbo_weights
    for row in range(400):
        for segment in batch.segment_ids[row].unique():
            here = batch.segment_ids[row] == segment
            given = condition[row] & here
            if given.any():
                pairs += 1
                hidden = masked(batch)[row][given]
                assert hidden.all() or not hidden.any()
                dropped += int(hidden.all())
                assert (weight_BT[row][here & scored(batch)[row]] > 0).all() != hidden.all()
    assert dropped / pairs == pytest.approx(0.25, abs=0.06)
    learned = (roles.role == TARGET).sum(1)
    assert torch.equal(corruption.targets, learned.int())
    assert corruption.loss_part_targets[:, 0].sum() < learned.sum()


def test_a_whole_masked_side_is_not_learned() -> None:
    batch = objective_of(condition="joint", whole_modality=1.0).rows(DrawnRows()).batch(range(200))
    roles = roles_of(batch)
    sides = []
    for row in range(200):
        for segment in batch.segment_ids[row].unique():
            here = (batch.segment_ids[row] == segment) & (roles.task[row] > 0)
            parts = [here & (roles.role[row] == side) for side in (CONDITION, TARGET)]
            if parts[0].any():
                learned = [bool(scored(batch)[row][part].any()) for part in parts]
                whole = [bool(masked(batch)[row][part].all()) for part in parts]
                assert sum(learned) == 1 and whole[learned.index(False)]
                sides.append(learned.index(False))
    assert 0.4 < np.mean(sides) < 0.6
    assert corruption_of(batch).elbo_weights[corruption_of(batch).loss_parts[:, 1] != 4].eq(0).all()


@pytest.mark.parametrize("masking", ["fixed_count", "bernoulli"])
def test_complementary_rows_supervise_every_token_once(masking: str) -> None:
    rows = objective_of(complementary=True, masking=masking, **every_modality(schedule="cosine")).rows(
        DrawnRows()
    )
    batch = rows.batch(range(60))
    first, second = slice(0, None, 2), slice(1, None, 2)
    assert torch.equal(batch.tokens[first], batch.tokens[second])
    target = roles_of(batch).role == TARGET
    assert torch.equal(scored(batch)[first] ^ scored(batch)[second], target[first])
    assert rows.fingerprint != DrawnRows().fingerprint
    assert rows.batch(range(4)).cursor.fingerprint == rows.fingerprint
    alone = rows.batch([7])
    assert torch.equal(alone.tokens[0], batch.tokens[7])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
@pytest.mark.parametrize("complementary", [False, True])
def test_ratios_are_stratified_over_a_step_for_every_source(schedule: str, complementary: bool) -> None:
    """Independent draws would be some 0.87 / sqrt(n) from the schedule at worst: 0.16 and 0.2."""
    n = 200
    rows = RepeatedRow(row=[[4] * n], length=n, mixture=Mixture([0.6, 0.4]))
    settings = every_modality(schedule=schedule)
    objective = objective_of(complementary=complementary, **settings)
    below = schedule_of(objective.section.text).below
    size = 96 if complementary else 48
    for step in range(4):
        numbers = np.arange(step * size, (step + 1) * size)
        masked_share = scored(objective.rows(rows).batch(numbers.tolist())).sum(1).numpy() / n
        if complementary:
            numbers, masked_share = numbers[::2] // 2, masked_share[::2]
        source = rows.mixture.draws(numbers)[0]
        for one in (0, 1):
            quantiles = np.sort(below(masked_share[source == one] - 0.5 / n))
            count = len(quantiles)
            assert np.abs(quantiles - (np.arange(count) + 0.5) / count).max() < 0.09


def test_documents_of_a_row_and_sources_draw_apart() -> None:
    shift = hashed(key(0, "train") ^ key("ratio"), np.array([0, 1]))
    assert shift[0] != shift[1]
    draws = np.arange(64)
    first, second = (stratified(shift[:1].repeat(64), draws, np.full(64, document)) for document in (0, 1))
    assert np.allclose((second - first) % 1, np.sqrt(2) - 1)


@given(st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 4096))
def test_random_numbers_of_counters(row: int, seed: int, place: int) -> None:
    one = hashed(key(seed, "a"), np.array(row), np.array(place))
    assert 0 < uniform(one) < 1
    assert one == hashed(key(seed, "a"), np.array([row]), np.array([place]))[0]
    assert one != hashed(key(seed, "b"), np.array(row), np.array(place))
    assert one != hashed(key(seed, "a"), np.array(row + 1), np.array(place))


def test_hashes_are_even() -> None:
    values = uniform(hashed(key(0), np.arange(200)[:, None], np.arange(100)))
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.03


def test_weights_follow_the_settings() -> None:
    clipped = corruption_of(
        objective_of(**every_modality(weight="clipped", clip=1.5)).rows(DrawnRows()).batch(range(40))
    )
    assert clipped.weights.max() == 1.5
    assert torch.equal(
        clipped.weights, clipped.elbo_weights.where(clipped.elbo_weights > 0, clipped.weights).clamp(max=1.5)
    )
    plain = objective_of(
        image={"weight": "none", "schedule": "cosine", "scale": 0.5}, text={"weight": "none"}
    )
    corruption = corruption_of(plain.rows(DrawnRows()).batch(range(40)))
    image = corruption.loss_parts[:, 0] == PARTS.index("elbo/image")
    torch.testing.assert_close(corruption.weights[image], torch.full((int(image.sum()),), 0.5 * np.pi / 2))
    assert corruption.weights[~image].eq(2).all()


def test_an_evaluation_shows_all_conditions_and_draws_anew() -> None:
    objective = objective_of(
        condition_dropout=1.0, complementary=True, masking="bernoulli", evaluation_draws=3
    )
    batches = list(objective.evaluation_batches([DrawnRows().batch(range(8))]))
    assert len(batches) == 3
    assert not torch.equal(masked(batches[0]), masked(batches[1]))
    for batch in batches:
        assert not masked(batch)[roles_of(batch).role == CONDITION].any()
        assert torch.equal(corruption_of(batch).weights, corruption_of(batch).elbo_weights)
        assert torch.equal(corruption_of(batch).loss_part_targets[:, 0], corruption_of(batch).targets)
    again = list(objective.evaluation_batches([DrawnRows().batch(range(8))]))
    assert all(torch.equal(masked(a), masked(b)) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("images", ["1d", "2d"])
def test_specials_are_never_predicted_and_the_loss_is_of_masked_tokens_alone(images: str) -> None:
    model = small_model(image_positions=images)
    objective = objective_of(axes=model.position_axes)
    batch = objective.rows(DrawnRows()).batch(range(16))
    assert batch.positions.shape[2:] == ((2,) if images == "2d" else ())
    logits = model.head(model(corruption_of(batch).inputs, batch.segment_ids, batch.positions))
    logits[..., VOCABULARY.first_special :] = -torch.inf
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten(), reduction="none")
    expected = (each[corruption_of(batch).places] * corruption_of(batch).weights).sum()
    loss = objective(model, batch)
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.parts[1:4].sum(0), loss.parts[0])
    torch.testing.assert_close(loss.parts[4:9].sum(0), loss.parts[0])


def test_a_batch_without_a_masked_token_has_a_gradient_of_zero() -> None:
    objective, model = objective_of(complementary=True), small_model()
    rows = objective.rows(RepeatedRow(row=[[4]]))
    batch = next(batch for n in range(50) if not scored(batch := rows.batch([n])).any())
    loss = objective(model, batch)
    loss.total.backward()
    assert loss.total == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_every_part_has_its_help() -> None:
    assert tuple(PART_SCALARS) == PARTS
