"""How messages hide, and what a pipeline and many nodes cost, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain.hardware import ACCELERATORS
from pretrain.plan.constants import constants
from pretrain.plan.kernels import Load
from pretrain.plan.network import Group
from pretrain.plan.timing import Beside, Job, Message, step_time
from tests.pretrain.plan.test_kernels import LAYER

H100, KNOWN = ACCELERATORS["h100"], constants()
JOB = Job(Load({LAYER: 8}, 8192, 4096, 4096, 32768), (), (), micro_batches=4, update=0.0, world=8)


def sent(gigabytes: float, beside: Beside, per: str = "micro_batch") -> Message:
    return Message("replicas", "allgather", gigabytes * 1e9, Group(8), 1, beside, per)  # type: ignore[arg-type]


def total(job: Job) -> float:
    return step_time(job, H100, KNOWN).total


def test_a_short_message_beside_a_pass_costs_its_contention() -> None:
    message = sent(1, "forward")
    more = total(replace(JOB, between=(message,))) - total(JOB)
    assert more == pytest.approx(4 * KNOWN.contention * message.seconds(H100, KNOWN))


def test_what_is_longer_than_the_pass_shows() -> None:
    message = sent(1000, "backward")
    quiet = replace(KNOWN, contention=0.0)
    shown = step_time(replace(JOB, between=(message,)), H100, quiet).total - step_time(JOB, H100, quiet).total
    ten_more = replace(message, size=message.size + 10e9)
    both = step_time(replace(JOB, between=(ten_more,)), H100, quiet).total - step_time(JOB, H100, quiet).total
    added = ten_more.seconds(H100, quiet) - message.seconds(H100, quiet)
    assert 0 < shown < 4 * message.seconds(H100, quiet)
    assert both - shown == pytest.approx(4 * added)


def test_what_is_sent_after_the_passes_shows_whole() -> None:
    message = sent(1, None, "step")
    more = total(replace(JOB, between=(message,))) - total(JOB)
    assert more == pytest.approx(message.seconds(H100, KNOWN))


def test_a_pipeline_waits_for_its_other_stages() -> None:
    found = step_time(replace(JOB, pipeline=4, chunks=2), H100, KNOWN)
    assert found.bubble == pytest.approx(3 / (2 * 4) * found.compute)


def test_more_nodes_wait_for_the_slowest() -> None:
    found = step_time(replace(JOB, world=64), H100, KNOWN)
    assert found.straggling == pytest.approx(3 * KNOWN.straggling * found.compute)
    assert step_time(JOB, H100, KNOWN).straggling == 0
