"""What a fuzzer is, and how its cases are run: mutated inputs to the real code, in this process.

A case passes if the code takes the input with all facts unchanged or told, or refuses it with an error that the command
line prints in one message (exit code 2) and that names the file or key. Anything else is a finding: another exception,
a message that names nothing or shows an object's address, a changed fact, more than TIME_LIMIT_S.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from pretrain.errors import UserError

TIME_LIMIT_S = 5.0
REFUSALS = (UserError, DataError)
"""What `pretrain.cli.main` turns into a message and exit code 2."""
ADDRESS = re.compile(r"<[\w.]+ object at 0x|<_io\.| at 0x[0-9a-f]{8,}")


class Finding(AssertionError):
    """What a fuzzer found wrong."""


@dataclass(frozen=True)
class Fuzzer:
    """One kind of input.

    run: makes an input from the seed in the empty folder and gives it to the code. It returns if the input was taken
        with its facts unchanged or told, lets a refusal pass (see `refusals_name`), raises Finding for a changed fact.
    """

    name: str
    run: Callable[[int, Path], None]


@dataclass(frozen=True)
class CaseResult:
    """finding: what is wrong, "" for nothing; refusal: the message of a refused input."""

    seed: int
    seconds: float
    refusal: str = ""
    finding: str = ""


@dataclass
class Tally:
    """The cases of one fuzzer."""

    name: str
    cases: int = 0
    refused: int = 0
    slowest: float = 0.0
    findings: list[CaseResult] = field(default_factory=list)

    def add(self, result: CaseResult) -> None:
        self.cases += 1
        self.refused += bool(result.refusal)
        self.slowest = max(self.slowest, result.seconds)
        if result.finding:
            self.findings.append(result)


def run_case(fuzzer: Fuzzer, seed: int) -> CaseResult:
    """One case in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{fuzzer.name}-"))
    refusal = finding = ""
    start = time.perf_counter()
    try:
        with _time_limit():
            fuzzer.run(seed, folder)
    except REFUSALS as error:
        refusal = str(error)
        if ADDRESS.search(refusal):
            finding = f"a message that shows an object: {refusal}"
    except Finding as error:
        finding = str(error)
    except BaseException as error:  # the panics of libraries written in Rust are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        finding = traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - start
    if seconds > TIME_LIMIT_S and not finding:
        finding = f"it took {seconds:.1f} s"
    return CaseResult(seed, seconds, refusal, finding)


class _TooSlowError(BaseException):
    """Not an Exception, so that no handler of the code under test takes it."""


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raises Finding after TIME_LIMIT_S, unless the time is spent inside of one C function."""

    def stop(*_: object) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    others, _ = signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)  # pytest's own limit, if there is one
    try:
        yield
    except _TooSlowError:
        raise Finding(f"longer than {TIME_LIMIT_S:g} s:\n{traceback.format_exc()}") from None
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, others)


@contextlib.contextmanager
def refusals_name(*names: str | Path) -> Iterator[None]:
    """What is refused inside names one of these, or it is a finding."""
    try:
        yield
    except REFUSALS as error:
        if not any(str(name) in str(error) for name in names):
            raise Finding(f"refused without naming any of {', '.join(map(str, names))}: {error}") from error
        raise


def require(good: bool, what: str) -> None:
    """Raises Finding."""
    if not good:
        raise Finding(what)


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """The same with a few bytes flipped, a part cut out, doubled, zeroed or exchanged, or its end missing."""
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 4))):
        if not changed:
            break
        place = int(random.integers(len(changed)))
        length = int(random.integers(1, max(2, len(changed) // 4)))
        part = bytes(changed[place : place + length])
        match int(random.integers(7)):
            case 0 | 1:
                for one in random.integers(0, len(changed), int(random.integers(1, 9))).tolist():
                    changed[one] ^= 1 << int(random.integers(8))
            case 2:
                del changed[place:]
            case 3:
                del changed[place : place + length]
            case 4:
                changed[place:place] = part
            case 5:
                changed[place : place + length] = bytes(len(part))
            case 6:
                other = int(random.integers(len(changed)))
                changed[other : other + length] = part
    return bytes(changed)


def chosen(random: np.random.Generator, options: list[Any] | tuple[Any, ...]) -> Any:
    """One of some options, whatever their types."""
    return options[int(random.integers(len(options)))]
