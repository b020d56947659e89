"""Tasks of memory: keep a symbol, look a key up, follow pointers. B rows, T time, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from data_pipelines.tasks.base import Answers, Problem, ScoredTask, Task


@dataclass(frozen=True, kw_only=True)
class KeepNth(ScoredTask):
    """Say the n-th symbol, at every place from the n-th on or at the last one."""

    name: ClassVar[str] = "keep_nth"
    vocabulary: int = 128
    n: int = 5

    def all_answers(self, symbols_BT: np.ndarray) -> Answers:
        scored = np.zeros(symbols_BT.shape, bool)
        scored[:, self.n - 1 :] = True
        kept = np.broadcast_to(symbols_BT[:, self.n - 1 : self.n], symbols_BT.shape)
        return Answers(kept.astype(np.int64), scored)

    def problems(self, length: int) -> list[Problem]:
        found = super().problems(length)
        if not 1 <= self.n <= length:
            found.append(("n", f"{self.n} must be from 1 to the sequence length, {length}"))
        return found


@dataclass(frozen=True, kw_only=True)
class Mqar(Task):
    """Multi-query associative recall: key-value pairs first, then each key once more among zeros (`queries:
    once`), or a key at every place (`queries: all`). The answer to a key is its value.

    Keys are drawn from 1 to V/2 - 1, values from V/2 to V - 1. Source: Arora et al. 2023 (Zoology), with the sizes
    of Danieli et al. 2025 (ParaRNN), appendix C.2.
    """

    name: ClassVar[str] = "mqar"
    vocabulary: int = 128
    pairs: int = 2
    queries: Literal["once", "all"] = "once"

    def symbols(self, random: np.random.Generator, length: int) -> np.ndarray:
        half, told = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + random.choice(half - 1, self.pairs, replace=False)
        row = np.zeros(length, np.int64)
        row[0:told:2], row[1:told:2] = keys, random.integers(half, self.vocabulary, self.pairs)
        if self.queries == "all":
            row[told:] = random.choice(keys, length - told)
        else:
            row[told + random.choice(length - told, self.pairs, replace=False)] = keys
        return row

    def answers(self, symbols_BT: np.ndarray) -> Answers:
        told = 2 * self.pairs
        keys_BK, values_BK = symbols_BT[:, 0:told:2], symbols_BT[:, 1:told:2]
        asked_BTK = symbols_BT[:, :, None] == keys_BK[:, None, :]
        asked_BTK[:, :told] = False
        return Answers((asked_BTK * values_BK[:, None, :]).sum(2), asked_BTK.any(2))

    def problems(self, length: int) -> list[Problem]:
        found = super().problems(length)
        half = self.vocabulary // 2
        if not 1 <= self.pairs <= half - 1:
            found.append(
                ("pairs", f"{self.pairs} must be from 1 to {half - 1}, the number of different keys")
            )
        if length < 3 * self.pairs:
            found.append(
                ("pairs", f"{self.pairs} pairs and their queries need {3 * self.pairs} places, not {length}")
            )
        return found


@dataclass(frozen=True, kw_only=True)
class KHop(ScoredTask):
    """k-hop induction heads: say the symbol found by going back k times to what followed the last occurrence.

    find(i) is the last j <= i with symbol j - 1 equal to symbol i; the answer at i is the symbol at find^k(i),
    wherever that exists. Source: Sanford et al. 2024, arXiv:2402.09268.
    """

    name: ClassVar[str] = "k_hop"
    vocabulary: int = 10
    hops: int = 1

    def all_answers(self, symbols_BT: np.ndarray) -> Answers:
        """One table per hop and row, from a symbol to its answer so far: O(T k) for each row.

        The table of hop m says, for each symbol, what m hops from its next occurrence will find: hop 1's is the
        symbol that followed it last, hop m's is what hop m - 1 found at that follower.
        """
        rows, length = symbols_BT.shape
        row = np.arange(rows)
        tables = np.full((self.hops, rows, self.vocabulary), -1, np.int64)
        targets = np.full((rows, length), -1, np.int64)
        for place in range(1, length):
            before, here = symbols_BT[:, place - 1], symbols_BT[:, place]
            found = here
            for table in tables:
                table[row, before] = found
                found = table[row, here]
            targets[:, place] = found
        return Answers(np.maximum(targets, 0), targets >= 0)

    def problems(self, length: int) -> list[Problem]:
        found = super().problems(length)
        if self.hops < 1:
            found.append(("hops", f"{self.hops} must be at least 1"))
        if length < 2:
            found.append(("hops", f"a sequence of {length} has nothing to look back at"))
        return found
