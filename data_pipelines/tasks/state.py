"""Tasks of state tracking: the answer at each place is the state of a finite automaton. B rows, T time."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import ClassVar

import numpy as np

from data_pipelines.tasks.base import Answers, Problem, ScoredTask


@dataclass(frozen=True, kw_only=True)
class StateTask(ScoredTask):
    """Symbols move a state; the answer is the state after each of them."""

    @abstractmethod
    def states(self, symbols_BT: np.ndarray) -> np.ndarray:
        """The state after each symbol, (B, T)."""

    def all_answers(self, symbols_BT: np.ndarray) -> Answers:
        return Answers(self.states(symbols_BT), np.ones(symbols_BT.shape, bool))


@dataclass(frozen=True, kw_only=True)
class Parity(StateTask):
    """The exclusive or of all bits so far. One symbol of the vocabulary is spare, as in the ParaRNN paper's sizes."""

    name: ClassVar[str] = "parity"
    vocabulary: int = 3

    @property
    def inputs(self) -> int:
        return 2

    def states(self, symbols_BT: np.ndarray) -> np.ndarray:
        return symbols_BT.cumsum(1) % 2


@dataclass(frozen=True, kw_only=True)
class CycleNavigation(StateTask):
    """The place on a cycle after steps of 0, +1 and -1. Source: Delétang et al. 2022, arXiv:2207.02098."""

    name: ClassVar[str] = "cycle_navigation"
    vocabulary: int = 5
    """The cycle's length."""

    @property
    def inputs(self) -> int:
        return 3

    def states(self, symbols_BT: np.ndarray) -> np.ndarray:
        steps_BT = np.array([0, 1, -1])[symbols_BT]
        return steps_BT.cumsum(1) % self.vocabulary

    def problems(self, length: int) -> list[Problem]:
        if self.vocabulary < 3:
            return [("vocabulary", f"{self.vocabulary} must be at least 3, for the three steps")]
        return []


@dataclass(frozen=True, kw_only=True)
class A5(StateTask):
    """The word problem of A5, the even permutations of five things: the product of all elements so far.

    No solvable group is harder for it: fixed-depth Transformers and linear recurrences cannot. Source: Merrill et
    al. 2024, arXiv:2404.08819.
    """

    name: ClassVar[str] = "a5"
    vocabulary: int = 60

    def states(self, symbols_BT: np.ndarray) -> np.ndarray:
        table = multiplication_table()
        states_BT = np.empty(symbols_BT.shape, np.int64)
        state_B = np.zeros(len(symbols_BT), np.int64)  # the identity
        for place in range(symbols_BT.shape[1]):
            state_B = table[symbols_BT[:, place], state_B]
            states_BT[:, place] = state_B
        return states_BT

    def problems(self, length: int) -> list[Problem]:
        return (
            [] if self.vocabulary == 60 else [("vocabulary", f"{self.vocabulary} must be 60, A5's elements")]
        )


@cache
def multiplication_table() -> np.ndarray:
    """(60, 60): the number of the element "first y, then x" at [x, y]. Element 0 is the identity."""
    elements = [p for p in permutations(range(5)) if _inversions(p) % 2 == 0]
    number = {element: index for index, element in enumerate(elements)}
    return np.array([[number[tuple(x[i] for i in y)] for y in elements] for x in elements])


def _inversions(permutation: tuple[int, ...]) -> int:
    return sum(a > b for i, a in enumerate(permutation) for b in permutation[i + 1 :])


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(ScoredTask):
    """The value, modulo m, of an expression of numbers and the operators + - *, after each number.

    Numbers are the symbols 0 to m - 1, then come +, - and *; * binds stronger. A number and an operator take
    turns. Source: Delétang et al. 2022, arXiv:2207.02098, its task without brackets.
    """

    name: ClassVar[str] = "modular_arithmetic"
    vocabulary: int = 8
    """The modulus + 3."""

    @property
    def modulus(self) -> int:
        return self.vocabulary - 3

    def symbols(self, random: np.random.Generator, length: int) -> np.ndarray:
        row = random.integers(self.modulus, size=length)
        row[1::2] = self.modulus + random.integers(3, size=length // 2)
        return row

    def all_answers(self, symbols_BT: np.ndarray) -> Answers:
        rows, length = symbols_BT.shape
        number_BT = symbols_BT < self.modulus
        targets = np.zeros((rows, length), np.int64)
        done_B, sign_B, product_B = np.zeros(rows, np.int64), np.ones(rows, np.int64), np.ones(rows, np.int64)
        for place in range(length):
            symbol, number = symbols_BT[:, place], number_BT[:, place]
            product_B = np.where(number, product_B * symbol % self.modulus, product_B)
            ends_term = ~number & (symbol < self.modulus + 2)
            done_B = np.where(ends_term, done_B + sign_B * product_B, done_B)
            sign_B = np.where(ends_term, np.where(symbol == self.modulus, 1, -1), sign_B)
            product_B = np.where(ends_term, 1, product_B)
            targets[:, place] = (done_B + sign_B * product_B) % self.modulus
        return Answers(targets, number_BT)

    def problems(self, length: int) -> list[Problem]:
        if self.vocabulary < 5:
            return [
                ("vocabulary", f"{self.vocabulary} must be at least 5: a modulus of 2 and three operators")
            ]
        return []
