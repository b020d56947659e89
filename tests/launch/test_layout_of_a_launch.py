"""What a launch settles before it submits: the cluster's network, and the layout where it is auto."""

from __future__ import annotations

import pytest

from launch.request import joined, laid_out, overrides_of
from launch.settings import ClusterSettings
from pretrain.config import load_config
from pretrain.errors import ConfigError

CONFIG = "configs/sigmoid/85m.yaml"
OPEN = [
    "model.vocabulary=512",
    "model.layers=2",
    "parallel.zero=auto",
    "parallel.activation_checkpointing=auto",
    "data.micro_batch_rows=auto",
]


def test_the_clusters_word_counts_where_the_runs_is_silent() -> None:
    settings = ClusterSettings.model_validate(
        {"interconnect": {"gpu": "h200", "ports": 4, "port_gb_s": 25.0, "node_gb_s": 300.0}}
    )
    silent = joined(load_config(CONFIG), settings).launch
    assert (silent.gpu, silent.ports, silent.port_gb_s, silent.node_gb_s) == ("h200", 4, 25.0, 300.0)
    stated = joined(load_config(CONFIG, ["launch.ports=2"]), settings).launch
    assert (stated.ports, stated.port_gb_s) == (2, 25.0)


def test_what_is_auto_is_chosen_for_the_nodes_that_are_asked_for() -> None:
    config = load_config(CONFIG, OPEN)
    found, reason = laid_out(config, ClusterSettings(), 16)
    assert found.parallel.auto == ()
    assert reason is not None and "layout chosen for 16 x NVIDIA H100 SXM" in reason
    on_cpus, reason = laid_out(config, ClusterSettings(gpus_per_node=0, tasks_per_node=2), 4)
    assert on_cpus.parallel.auto == ()
    assert reason is not None and "layout chosen for 4 x CPU core" in reason


def test_what_is_stated_stays_and_nothing_is_said() -> None:
    config = load_config(CONFIG)
    assert laid_out(config, ClusterSettings(), 16) == (config, None)


def test_what_was_settled_can_be_typed_again() -> None:
    settings = ClusterSettings.model_validate({"interconnect": {"ports": 4}})
    found, _ = laid_out(joined(load_config(CONFIG, OPEN), settings), settings, 8)
    again = load_config(CONFIG, [*OPEN, *overrides_of(found)])
    assert (again.parallel, again.launch, again.data) == (found.parallel, found.launch, found.data)


def test_a_network_that_cannot_be_is_refused() -> None:
    from launch.settings import load_settings

    with pytest.raises(ConfigError, match=r"interconnect\.ports"):
        load_settings(None, {"interconnect": {"ports": 0}})
