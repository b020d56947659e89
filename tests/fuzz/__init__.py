"""Fuzzers of everything that a user can hand in: `python -m tests.fuzz [NAME ...] --cases 1000`.

Each module named in MODULES has FUZZERS, a list; `tests/fuzz/test_sample.py` runs a few cases of each.
"""

from __future__ import annotations

import importlib
import importlib.util

from tests.fuzz.base import Fuzzer

MODULES = ("builds", "raw_text", "media", "tokenizers_and_codecs", "questions", "datasets", "configs", "runs")


def _collected() -> dict[str, Fuzzer]:
    there = [name for name in MODULES if importlib.util.find_spec(f"tests.fuzz.{name}")]
    fuzzers = [one for name in there for one in importlib.import_module(f"tests.fuzz.{name}").FUZZERS]
    names = [one.name for one in fuzzers]
    assert len(set(names)) == len(names), f"two fuzzers have one name: {names}"
    return {one.name: one for one in fuzzers}


FUZZERS: dict[str, Fuzzer] = _collected()
