"""A few cases of every fuzzer, and that a fuzzer finds what is wrong."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from pretrain.errors import ConfigError
from tests.fuzz import FUZZERS
from tests.fuzz.base import TIME_LIMIT_S, Fuzzer, Tally, refusals_name, require, run_case

CASES = 20


@pytest.mark.parametrize("name", FUZZERS)
def test_a_sample_of_each_fuzzer(name: str) -> None:
    tally = Tally(name)
    for seed in range(CASES):
        tally.add(run_case(FUZZERS[name], seed))
    assert not tally.findings, "\n".join(f"case {one.seed}: {one.finding}" for one in tally.findings[:3])


def _refuse(error: Exception) -> None:
    raise error


def _refuse_unnamed() -> None:
    with refusals_name("a.tar"):
        raise DataError("something is wrong")


@pytest.mark.parametrize(
    ("action", "finding"),
    [
        (lambda: None, ""),
        (lambda: _refuse(DataError("a.tar: damaged")), ""),
        (lambda: _refuse(ConfigError("x.yaml: no")), ""),
        (lambda: _refuse(KeyError("x")), "KeyError"),
        (lambda: _refuse(ValueError("x")), "ValueError"),
        (
            lambda: _refuse(DataError("a.png: cannot identify <_io.BytesIO object at 0x7f00>")),
            "shows an object",
        ),
        (_refuse_unnamed, "without naming any of a.tar"),
        (lambda: require(False, "a picture vanished"), "a picture vanished"),
    ],
)
def test_what_is_a_finding(action: Callable[[], None], finding: str) -> None:
    result = run_case(Fuzzer("x", lambda seed, folder: action()), 0)
    assert finding in result.finding and bool(result.finding) == bool(finding)


def test_a_hang_is_a_finding() -> None:
    def hang(seed: int, folder: Path) -> None:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(60)

    result = run_case(Fuzzer("x", hang), 0)
    assert "longer than 5 s" in result.finding and result.seconds < TIME_LIMIT_S + 3
