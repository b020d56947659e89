"""Synthetic tasks: their answers against plain loops over one row, and their rows as a function of the number."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.stream.stream import dealt_batches, open_stream
from data_pipelines.tasks import TASKS, TaskRows, build_task
from data_pipelines.tasks.state import multiplication_table

Oracle = Callable[[list[int]], list[int | None]]


def parity(row: list[int]) -> list[int | None]:
    return [sum(row[: i + 1]) % 2 for i in range(len(row))]


def keep_third(row: list[int]) -> list[int | None]:
    return [row[2] if i >= 2 else None for i in range(len(row))]


def recall(row: list[int]) -> list[int | None]:
    values = {row[0]: row[1], row[2]: row[3], row[4]: row[5]}
    return [values.get(symbol) if i >= 6 else None for i, symbol in enumerate(row)]


def two_hop(row: list[int]) -> list[int | None]:
    def find(i: int) -> int | None:
        return next((j for j in range(i, 0, -1) if row[j - 1] == row[i]), None)

    found = []
    for i in range(len(row)):
        first = find(i)
        second = None if first is None else find(first)
        found.append(None if second is None else row[second])
    return found


def arithmetic(row: list[int]) -> list[int | None]:
    text = [str(symbol) if symbol < 5 else "+-*"[symbol - 5] for symbol in row]
    return [eval("".join(text[: i + 1])) % 5 if symbol < 5 else None for i, symbol in enumerate(row)]


def cycle(row: list[int]) -> list[int | None]:
    return [sum((0, 1, -1)[symbol] for symbol in row[: i + 1]) % 5 for i in range(len(row))]


def alternating_group(row: list[int]) -> list[int | None]:
    even = [p for p in permutations(range(5)) if np.linalg.det(np.eye(5)[list(p)]) > 0]
    found: list[int | None] = []
    state = tuple(range(5))
    for symbol in row:
        state = tuple(even[symbol][i] for i in state)
        found.append(even.index(state))
    return found


ORACLES: dict[str, tuple[dict[str, object], Oracle]] = {
    "parity": ({}, parity),
    "keep_nth": ({"n": 3, "vocabulary": 7}, keep_third),
    "mqar": ({"pairs": 3, "vocabulary": 16}, recall),
    "k_hop": ({"hops": 2, "vocabulary": 4}, two_hop),
    "modular_arithmetic": ({}, arithmetic),
    "cycle_navigation": ({}, cycle),
    "a5": ({}, alternating_group),
}


def test_every_task_has_an_oracle() -> None:
    assert set(ORACLES) == set(TASKS)


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(9, 40))
def test_answers_are_those_of_a_plain_loop(name: str, seed: int, length: int) -> None:
    options, oracle = ORACLES[name]
    task = build_task({"name": name, **options})
    batch = TaskRows(task, length, seed, "train").batch([0, 5, 1])
    for row, targets, scored in zip(batch.tokens, batch.targets, batch.weights, strict=True):
        assert int(row.min()) >= 0 and int(row.max()) < task.vocabulary
        wanted = oracle(row.tolist())
        assert scored.tolist() == [answer is not None for answer in wanted]
        assert targets[scored].tolist() == [answer for answer in wanted if answer is not None]


@pytest.mark.parametrize("name", [name for name, kind in TASKS.items() if name != "mqar"])
def test_score_last_scores_the_last_answer_of_every_row(name: str) -> None:
    every = TaskRows(build_task({"name": name}), 40, 0, "train").batch(range(20))
    last = TaskRows(build_task({"name": name, "score": "last"}), 40, 0, "train")
    # Another option, another stream of draws: the same symbols are given to both.
    answers = last.task.answers(every.tokens.numpy())
    for scored, only in zip(every.weights, torch.from_numpy(answers.scored), strict=True):
        assert only.nonzero().flatten().tolist() == scored.nonzero().flatten().tolist()[-1:]


def test_all_queries() -> None:
    task = build_task({"name": "mqar", "queries": "all", "vocabulary": 32})
    batch = TaskRows(task, 24, 0, "train").batch([0])
    assert batch.weights[0].tolist() == [False] * 4 + [True] * 20


def test_a5_is_a_group_that_no_solvable_one_equals() -> None:
    table = multiplication_table()
    assert all(sorted(row) == list(range(60)) for row in table.tolist())
    assert (table[0] == np.arange(60)).all() and (table[:, 0] == np.arange(60)).all()
    x, y, z = np.random.default_rng(0).integers(60, size=(3, 200))
    assert (table[table[x, y], z] == table[x, table[y, z]]).all()
    assert (table != table.T).any()


def test_rows_are_a_function_of_seed_purpose_and_number() -> None:
    task = build_task({"name": "a5"})
    rows = TaskRows(task, 30, 1, "train")
    together, apart = rows.batch([3, 8]), rows.batch([8])
    assert torch.equal(together.sequences[1], apart.sequences[0])
    assert torch.equal(together.targets[1], apart.targets[0])
    others = [TaskRows(task, 30, 2, "train"), TaskRows(task, 30, 1, "evaluate")]
    assert all(not torch.equal(other.batch([8]).sequences, apart.sequences) for other in others)
    assert len({rows.fingerprint, *(other.fingerprint for other in others)}) == 3


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_stream_of_any_number_of_ranks_has_the_same_rows(world: int) -> None:
    rows = TaskRows(build_task({"name": "parity"}), 12, 0, "train")
    whole = rows.batch(range(16))
    for step in range(2):
        parts = []
        for rank in range(world):
            with open_stream(rows, 8, rank, world, steps=2) as stream:
                parts.append(list(stream)[step])
        assert torch.equal(torch.cat([part.sequences for part in parts]), whole.sequences[8 * step :][:8])
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets[8 * step :][:8])
        assert all(part.cursor.row == 8 * (step + 1) for part in parts)


def test_answers_travel_with_the_batch() -> None:
    batch = TaskRows(build_task({"name": "parity"}), 12, 0, "train").batch(range(5))
    parts = batch.split(2)
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)


def test_evaluation_counts_each_row_once_over_the_ranks() -> None:
    rows = TaskRows(build_task({"name": "parity"}), 12, 0, "evaluate")
    batches = [list(dealt_batches(rows, 10, 4, rank, 2)) for rank in range(2)]
    assert [len(found) for found in batches] == [2, 2]
    scored = {
        int(row): bool(weight.all())
        for found in batches
        for batch in found
        for row, weight in zip(batch.rows, batch.weights, strict=True)
    }
    assert scored == {row: row < 10 for row in range(16)}


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown task": ({"name": "paritty"}, ["paritty", "did you mean parity"]),
    "an unknown option": ({"name": "k_hop", "hop": 2}, ["no option hop", "did you mean hops"]),
    "a text for a number": ({"name": "k_hop", "hops": "two"}, ["hops = 'two'", "whole number"]),
    "an unknown choice": ({"name": "parity", "score": "first"}, ["every or last"]),
    "no hop": ({"name": "k_hop", "hops": 0}, ["hops", "at least 1"]),
    "n beyond the row": ({"name": "keep_nth", "n": 50}, ["n: 50", "sequence length, 40"]),
    "too many pairs": ({"name": "mqar", "pairs": 20}, ["60 places"]),
    "more pairs than keys": ({"name": "mqar", "pairs": 9, "vocabulary": 16}, ["from 1 to 7"]),
    "another group": ({"name": "a5", "vocabulary": 61}, ["must be 60"]),
    "no modulus": ({"name": "modular_arithmetic", "vocabulary": 4}, ["at least 5"]),
    "a short cycle": ({"name": "cycle_navigation", "vocabulary": 2}, ["at least 3"]),
    "one symbol": ({"name": "parity", "vocabulary": 1}, ["at least 2"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_with_what_is_right(case: str) -> None:
    values, parts = BAD[case]
    with pytest.raises(DataError) as caught:
        TaskRows(build_task(values), 40, 0, "train")
    assert all(part in str(caught.value) for part in parts), caught.value
