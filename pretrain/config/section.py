"""What every section of a config is, and what is told of a wrong one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Auto = Literal["auto"]
SHOWN_CHARACTERS = 200


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


@dataclass(frozen=True)
class Problem:
    path: str
    message: str
    value: Any = None
    has_value: bool = False

    def __str__(self) -> str:
        shown = f"{self.path} = {_brief(self.value)}" if self.has_value else self.path
        return f"{shown}: {self.message}"


def _brief(value: Any) -> str:
    """A value in one line, however large it is."""
    text = " ".join(str(value).splitlines())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def told(what: str, problems: Sequence[Problem], advice: str = "") -> str:
    """The text of an error: how many problems, one line each, and what to do about several of them."""
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    lines = [str(problem) for problem in problems] + ([advice] if advice else [])
    return "\n  ".join([f"{what}, {count}:", *lines])


def one_of(numbers: Sequence[int]) -> str:
    """ "1", "1 or 2", "1, 2 or 4"."""
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def divisors_of(number: int) -> list[int]:
    """All of them, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
