"""What an attempt's end means and what follows: every rule, without Slurm."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest

from launch.policy import Attempt, Decision, Ending, classify, decide, with_enough_nodes
from pretrain.attempts import RankExit


def said(*codes: int) -> list[RankExit]:
    return [
        RankExit(rank, f"node{rank // 2 + 1}", code, f"reason {code}", None)
        for rank, code in enumerate(codes)
    ]


CASES = {
    "all finished": (0, said(0, 0, 0, 0), False, Ending.done),
    "a rank that said nothing has not finished": (0, said(0, 0, 0), False, Ending.crash),
    "all were asked to stop while they started": (0, said(143, 143, 143, 143), False, Ending.resume),
    "some finished, the rest were asked to stop on their way out": (
        0,
        said(0, 0, 143, 143),
        False,
        Ending.resume,
    ),
    "all saved": (0, said(75, 75, 75, 75), False, Ending.resume),
    "some saved, the rest were killed on their way out": (143, said(75), False, Ending.resume),
    "one found a mistake, Slurm killed the others": (143, said(2, 1), False, Ending.configuration),
    "a rank was killed": (137, [], False, Ending.crash),
    "a rank was killed while it started, and Slurm asked the others to stop": (
        137,
        said(143, 143, 143),
        False,
        Ending.crash,
    ),
    "so, but one of the others could not answer yet, and its code hides that of the killed one": (
        143,
        said(143, 143),
        False,
        Ending.crash,
    ),
    "a rank failed while it started, and Slurm asked the others to stop": (
        143,
        said(143, 1, 143, 143),
        False,
        Ending.crash,
    ),
    "a rank was killed and others saw its connection close": (137, said(1, 1, 1), False, Ending.crash),
    "the watchdog ended it": (71, said(71, 71), True, Ending.node_fault),
    "the watchdog named a rank before its own end": (143, [], True, Ending.node_fault),
}


@pytest.mark.parametrize("case", CASES)
def test_endings(case: str) -> None:
    code, exits, fault, ending = CASES[case]
    assert classify(code, exits, fault=fault, ranks=4)[0] is ending


def test_reasons_name_the_rank_or_the_signal() -> None:
    def reason(code: int, *codes: int, ranks: int = 4) -> str:
        return classify(code, said(*codes), fault=False, ranks=ranks)[1]

    assert reason(137, 143, 143, 143) == "rank 3 ended without saying why (signal 9)"
    assert reason(143, 143, 143).startswith("ranks 2, 3 ended without saying why (signal 15, sent to all")
    assert reason(1, ranks=512).startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 504 more ended without")
    assert reason(0, 143, 143, 143, 143) == "reason 143"
    assert reason(1, 0, 1) == "rank 1 on node1: reason 1"
    assert reason(137, 1, 1, 1) == "rank 0 on node1: reason 1; rank 3 ended without saying why (signal 9)"


def attempts(*steps: int, ending: Ending = Ending.crash) -> list[Attempt]:
    return [
        Attempt(number, ending, before, after, "why")
        for number, (before, after) in enumerate(pairwise(steps), start=1)
    ]


def test_it_starts_again_while_there_is_progress() -> None:
    for ending in (Ending.crash, Ending.resume, Ending.node_fault):
        decision = decide(attempts(0, 5, 5, 5, 10, ending=ending), most_without_progress=3, excluded=[])
        assert decision.action == "again" and "from step 10" in decision.message


def test_a_crash_loop_ends_with_its_reason() -> None:
    decision = decide(attempts(0, 5, 5, 5, 5), most_without_progress=3, excluded=[])
    assert decision.action == "stop"
    assert "3 attempts in a row saved nothing beyond step 5" in decision.message and "why" in decision.message


def test_an_attempt_that_slurm_ended_is_no_crash() -> None:
    history = [*attempts(0, 5, 5, 5), Attempt(4, Ending.cancelled, 5, 5, "preempted"), *attempts(5, 5)]
    assert decide(history, most_without_progress=3, excluded=[]).action == "again"


def test_bad_nodes_add_up() -> None:
    last = Attempt(2, Ending.node_fault, 0, 5, "silent", ("node7",))
    decision = decide([last], most_without_progress=3, excluded=["node3"])
    assert decision.exclude == ("node3", "node7") and "without node3, node7" in decision.message


@pytest.mark.parametrize(
    ("partition", "wanted", "left"),
    [
        (["a", "b", "c", "d"], 2, ("a", "b")),
        (["a", "b", "c"], 2, ("b",)),
        (["a", "b"], 2, ()),
        (None, 2, ("a", "b")),
    ],
)
def test_no_more_nodes_are_excluded_than_the_partition_can_spare(
    partition: list[str] | None, wanted: int, left: tuple[str, ...]
) -> None:
    decision = with_enough_nodes(Decision("again", "crash", ("a", "b")), partition, wanted)
    assert decision.exclude == left and decision.action == "again"
    assert ("may be had again" in decision.message) == (left != ("a", "b"))


@pytest.mark.parametrize(
    ("ending", "action"),
    [(Ending.done, "finish"), (Ending.configuration, "stop"), (Ending.cancelled, "stop")],
)
def test_endings_that_end_the_run(ending: Ending, action: str) -> None:
    assert decide([Attempt(1, ending, 0, 60, "why")], most_without_progress=3, excluded=[]).action == action


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        ("launch.batch", ["torch"]),
        ("launch.commands", ["torch"]),
        ("launch.preflight", ["torch"]),
        ("launch.watch_commands", ["torch", "numpy", "pydantic"]),
    ],
)
def test_what_people_and_slurm_wait_for_imports_little(module: str, slow: list[str]) -> None:
    code = f"import sys, {module}; sys.exit([name for name in {slow} if name in sys.modules] or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
