"""Collectives over links, against measured ones and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.published.collectives import predicted_bandwidth, read_collectives
from pretrain.hardware import ACCELERATORS, Interconnect
from pretrain.plan.constants import constants
from pretrain.plan.network import Group, bandwidth, seconds

H100 = ACCELERATORS["h100"]
KNOWN = constants()
NODE, PORT = 450e9 * KNOWN.node_link, 50e9 * KNOWN.network_link


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (Group(8), NODE),
        (Group(2, 4), NODE),
        (Group(16), 8 * PORT),  # a ring per port
        (Group(4, 8), PORT),  # one rank of each node
        (Group(8, 2), 4 * PORT),  # tensor pairs: four ranks of each node
        (Group(3), 3 * PORT),  # 8 does not divide by 3: one of the groups has a rank on the next node
        (Group(3, 1, 6), NODE),  # but six ranks are all on one node
    ],
)
def test_a_group_has_the_ports_of_its_ranks(group: Group, expected: float) -> None:
    assert bandwidth(group, H100, KNOWN) == pytest.approx(min(expected, NODE))


def test_without_a_switch_a_pair_has_a_third_of_the_links() -> None:
    four = H100.joined(Interconnect(gpus_per_node=4))
    assert not four.has_switch
    assert four.ports == 4
    assert bandwidth(Group(2), four, KNOWN) == pytest.approx(NODE / 3)
    assert bandwidth(Group(4), four, KNOWN) == pytest.approx(NODE)


def test_stated_ports_count() -> None:
    one_port = H100.joined(Interconnect(ports=1, port_gb_s=25))
    assert bandwidth(Group(16), one_port, KNOWN) == pytest.approx(25e9 * KNOWN.network_link)


def test_an_all_reduce_sends_twice_and_a_lone_rank_nothing() -> None:
    quick = replace(KNOWN, call_us=0.0, node_hop_us=0.0, network_hop_us=0.0)
    gathered = seconds("allgather_base", 8e9, Group(8), H100, quick)
    assert gathered == pytest.approx(7 / 8 * 8e9 / NODE)
    assert seconds("allreduce", 8e9, Group(8), H100, quick) == pytest.approx(2 * gathered)
    assert seconds("send", 8e9, Group(8), H100, quick) == pytest.approx(8e9 / NODE)
    assert seconds("allreduce", 8e9, Group(1), H100, KNOWN) == 0


def test_many_small_collectives_cost_their_latency() -> None:
    together = seconds("allgather_base", 1e6, Group(64), H100, KNOWN)
    apart = seconds("allgather_base", 1e6, Group(64), H100, KNOWN, calls=100)
    latency = (KNOWN.call_us + 7 * KNOWN.node_hop_us + 7 * KNOWN.network_hop_us) * 1e-6
    assert apart - together == pytest.approx(99 * latency)


def test_measured_collectives_of_sound_fabrics_are_met() -> None:
    large = [one for one in read_collectives() if one.size_bytes > 1e9 and one.nodes not in (2, 32)]
    assert len(large) == 7
    for one in large:
        assert predicted_bandwidth(one, KNOWN) == pytest.approx(one.busbw_gb_s, rel=0.06), one
