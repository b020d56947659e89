"""The preflight's verdict from its reports."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.preflight_reports import (
    ALONE_STAGE,
    COMPARED_STAGE,
    FIRST_STAGE,
    LAST_STAGE,
    MET_STAGE,
    Report,
    judge,
)

NODES = ["node1", "node2", "node3"]


def write(folder: Path, *reports: Report, stage: str = LAST_STAGE) -> None:
    for report in reports:
        report.write(folder, stage)


def silence(folder: Path, *reports: Report) -> None:
    """As if the ranks' processes had ended or stopped half a minute before."""
    for report in reports:
        long_ago = report.path(folder).stat().st_mtime - 30
        os.utime(report.path(folder), (long_ago, long_ago))


def test_all_well(tmp_path: Path) -> None:
    figures = [
        {"gemm_teraflops": 700.0, "clock_skew_seconds": 0.1},
        {"gemm_teraflops": 650.0, "clock_skew_seconds": 0.3},
    ]
    write(tmp_path, *(Report(i, NODES[i], figures=figures[i]) for i in range(2)))
    verdict = judge(tmp_path, NODES[:2], code=0, seconds=60)
    assert verdict.well and verdict.figures == {"gemm_teraflops": 650.0, "clock_skew_seconds": 0.3}


def test_a_node_that_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        Report(0, "node1"),
        Report(1, "node2", problems=["cuda:3: 12 TFLOP/s"]),
        stage="checked itself",
    )
    verdict = judge(tmp_path, NODES[:2], code=1, seconds=60)
    assert verdict.bad_nodes == {"node2": "cuda:3: 12 TFLOP/s"}


def test_a_node_that_never_answers(tmp_path: Path) -> None:
    write(tmp_path, Report(0, "node1"), Report(1, "node2"), stage="checked itself")
    verdict = judge(tmp_path, NODES, code=None, seconds=60)
    assert list(verdict.bad_nodes) == ["node3"] and "60 s" in verdict.bad_nodes["node3"]


def test_nobody_answers(tmp_path: Path) -> None:
    verdict = judge(tmp_path, NODES, code=None, seconds=60)
    assert not verdict.bad_nodes and verdict.everywhere and verdict.may_pass


def test_another_version_than_most(tmp_path: Path) -> None:
    versions = [{"torch": "2.13.0"}, {"torch": "2.12.0"}, {"torch": "2.13.0"}]
    write(tmp_path, *(Report(i, NODES[i], versions=versions[i]) for i in range(3)))
    verdict = judge(tmp_path, NODES, code=0, seconds=60)
    assert list(verdict.bad_nodes) == ["node2"] and "torch 2.12.0" in verdict.bad_nodes["node2"]


def test_what_is_wrong_everywhere_is_said_once(tmp_path: Path) -> None:
    write(tmp_path, *(Report(i, NODES[i], everywhere=["no room"]) for i in range(3)), stage="checked itself")
    verdict = judge(tmp_path, NODES, code=1, seconds=60)
    assert verdict.everywhere == "no room" and not verdict.may_pass and not verdict.bad_nodes


def test_a_rank_that_hangs_in_its_own_checks_gives_its_node_away(tmp_path: Path) -> None:
    write(tmp_path, Report(0, "node1"), Report(2, "node3"), stage=ALONE_STAGE)
    write(tmp_path, Report(1, "node2"), stage=FIRST_STAGE)
    assert list(judge(tmp_path, NODES, code=None, seconds=60).bad_nodes) == ["node2"]


def test_a_rank_that_does_not_come_to_a_collective_gives_its_node_away(tmp_path: Path) -> None:
    write(tmp_path, Report(0, "node1"), Report(2, "node3"), stage=COMPARED_STAGE)
    write(tmp_path, Report(1, "node2"), stage=MET_STAGE)
    verdict = judge(tmp_path, NODES, code=None, seconds=60)
    assert list(verdict.bad_nodes) == ["node2"] and MET_STAGE in verdict.bad_nodes["node2"]


def test_a_rank_that_stops_inside_a_collective_gives_its_node_away(tmp_path: Path) -> None:
    write(tmp_path, *(Report(i, NODES[i]) for i in range(3)), stage=COMPARED_STAGE)
    assert not judge(tmp_path, NODES, code=None, seconds=60).bad_nodes  # all run: it may be the network
    silence(tmp_path, Report(1, "node2"))
    verdict = judge(tmp_path, NODES, code=None, seconds=60)
    assert list(verdict.bad_nodes) == ["node2"] and "stood still for 30 s" in verdict.bad_nodes["node2"]


def test_ranks_that_have_ended_do_not_hang(tmp_path: Path) -> None:
    write(tmp_path, *(Report(i, NODES[i]) for i in range(3)))
    silence(tmp_path, Report(0, "node1"), Report(1, "node2"))
    assert not judge(tmp_path, NODES, code=None, seconds=60).bad_nodes


def test_ranks_that_ended_with_what_they_found_do_not_hang(tmp_path: Path) -> None:
    ended = [Report(i, NODES[i], alone=["no data"]) for i in range(2)]
    write(tmp_path, *ended, Report(2, "node3"), stage=ALONE_STAGE)
    silence(tmp_path, *ended)
    verdict = judge(tmp_path, NODES, code=None, seconds=60)
    assert not verdict.bad_nodes and verdict.everywhere == "no data"


def test_most_nodes_behind_are_not_each_to_blame(tmp_path: Path) -> None:
    write(tmp_path, Report(0, "node1"), stage=COMPARED_STAGE)
    write(tmp_path, Report(1, "node2"), Report(2, "node3"), stage=MET_STAGE)
    verdict = judge(tmp_path, NODES, code=None, seconds=60)
    assert not verdict.bad_nodes and verdict.everywhere and verdict.may_pass


@pytest.mark.parametrize(("failing", "bad"), [(1, ["node1"]), (2, []), (3, [])])
def test_data_that_one_node_misses_is_its_fault_and_that_all_miss_is_not(
    tmp_path: Path, failing: int, bad: list[str]
) -> None:
    reports = [Report(i, NODES[i], alone=["no data"] if i < failing else []) for i in range(3)]
    write(tmp_path, *reports, stage=ALONE_STAGE)
    verdict = judge(tmp_path, NODES, code=1, seconds=60)
    assert list(verdict.bad_nodes) == bad
    assert verdict.everywhere == (None if bad else "no data") and not verdict.may_pass


@pytest.mark.parametrize(("also", "may_pass"), [([], True), (["no data"], False)])
def test_a_full_storage_may_have_room_at_the_next_attempt(
    tmp_path: Path, also: list[str], may_pass: bool
) -> None:
    full = [Report(i, NODES[i], alone=["no room", *also], passing=["no room"]) for i in range(3)]
    write(tmp_path, *full, stage=ALONE_STAGE)
    verdict = judge(tmp_path, NODES, code=0, seconds=60)
    assert not verdict.well and not verdict.bad_nodes and verdict.may_pass == may_pass
