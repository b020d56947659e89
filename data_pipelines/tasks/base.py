"""What a synthetic task is. B rows, T time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

Problem = tuple[str, str]


@dataclass(frozen=True)
class Answers:
    targets: np.ndarray  # (B, T) int64; anything where it is not scored
    scored: np.ndarray  # (B, T) bool: where the model is to answer


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Random input symbols, and answers that are a function of them alone."""

    name: ClassVar[str]
    vocabulary: int
    """Symbols of inputs and answers together."""

    @abstractmethod
    def symbols(self, random: np.random.Generator, length: int) -> np.ndarray:
        """One row's input, (T,) integers below the vocabulary."""

    @abstractmethod
    def answers(self, symbols_BT: np.ndarray) -> Answers:
        """What is right at each place of each row."""

    def problems(self, length: int) -> list[Problem]:
        """(option, what is wrong and what would be right) of every invalid option, at this sequence length."""
        return [("vocabulary", f"{self.vocabulary} must be at least 2")] if self.vocabulary < 2 else []


@dataclass(frozen=True, kw_only=True)
class ScoredTask(Task):
    """Answers wherever there is one, or the last of each row alone; uniform symbols, unless it draws others."""

    score: Literal["every", "last"] = "every"

    @property
    def inputs(self) -> int:
        """Input symbols are below this."""
        return self.vocabulary

    @abstractmethod
    def all_answers(self, symbols_BT: np.ndarray) -> Answers:
        """What is right, wherever there is an answer."""

    def symbols(self, random: np.random.Generator, length: int) -> np.ndarray:
        return random.integers(self.inputs, size=length)

    def answers(self, symbols_BT: np.ndarray) -> Answers:
        found = self.all_answers(symbols_BT)
        return replace(found, scored=only_last(found.scored)) if self.score == "last" else found


def only_last(scored_BT: np.ndarray) -> np.ndarray:
    """The last mark of each row alone."""
    marks_after_BT = scored_BT[:, ::-1].cumsum(1)[:, ::-1]
    return scored_BT & (marks_after_BT == 1)
