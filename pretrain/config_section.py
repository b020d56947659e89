"""What every section of a config is, and what is told of a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Auto = Literal["auto"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


@dataclass(frozen=True)
class Problem:
    path: str
    message: str
    value: Any = None
    has_value: bool = False

    def __str__(self) -> str:
        return (
            f"{self.path} = {self.value}: {self.message}"
            if self.has_value
            else f"{self.path}: {self.message}"
        )


def told(what: str, problems: Sequence[Problem], advice: str = "") -> str:
    """The text of an error: how many problems, one line each, and what to do about several of them."""
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    lines = [str(problem) for problem in problems] + ([advice] if advice else [])
    return "\n  ".join([f"{what}, {count}:", *lines])


def one_of(numbers: Sequence[int]) -> str:
    """ "1", "1 or 2", "1, 2 or 4"."""
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
