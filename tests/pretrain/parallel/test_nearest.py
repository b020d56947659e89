"""What cannot be is told at once, with the nearest layout that can."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import ParallelSection, load_config
from pretrain.config.nearest import advice, check_layout, nearest_layout, problems_of
from pretrain.errors import ConfigError

SIZES = st.sampled_from([1, 2, 3, 4, 5, 8])
LAYOUTS = st.builds(
    ParallelSection,
    tensor=SIZES,
    sequence=st.booleans(),
    context=SIZES,
    recurrence=st.sampled_from(["channels", "summaries"]),
    pipeline=SIZES,
    pipeline_chunks=st.integers(1, 3),
    zero=st.sampled_from([0, 1, 2, 3]),
    zero_group=st.sampled_from(["all", "node"]),
    offload=st.sampled_from(["none", "optimizer"]),
    engine=st.sampled_from(["auto", "deepspeed", "megatron"]),
    data=st.sampled_from(["auto", 1, 2, 3]),
)
CONFIGS = [load_config(f"configs/{name}/demo.yaml") for name in ("sigmoid", "softmax", "mamba2", "trimodal")]
CONFIGS += [load_config("configs/pararnn/gru/demo.yaml")]


@given(st.sampled_from(CONFIGS), LAYOUTS, st.sampled_from([None, 1, 2, 3, 4, 6, 12]))
@settings(deadline=None, max_examples=40)
def test_the_nearest_layout_fits_and_one_that_fits_is_its_own(config, parallel, world) -> None:  # type: ignore[no-untyped-def]
    nearest = nearest_layout(parallel, config.model, config.data, world)
    assert nearest is not None
    assert not list(problems_of(nearest, config.model, config.data, world))
    fits = not list(problems_of(parallel, config.model, config.data, world))
    assert (nearest == parallel) == fits


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (["parallel.tensor=4"], None, "fits: parallel.tensor=2"),
        (["parallel.pipeline=2", "parallel.zero=3"], None, "fits: parallel.zero=1"),
        (
            ["parallel.tensor=3", "parallel.sequence=true", "parallel.pipeline=5"],
            8,
            "fits: parallel.tensor=2 parallel.pipeline=4",
        ),
        (["parallel.tensor=2"], 3, "fits: parallel.tensor=1"),
        (["parallel.data=4", "parallel.tensor=2"], 4, "fits: parallel.data=auto"),
        (
            ["parallel.pipeline=2", "parallel.zero=1", "parallel.offload=optimizer"],
            None,
            "fits: parallel.offload=none",
        ),
        (
            ["parallel.tensor=63", "parallel.context=64", "parallel.pipeline=64"],
            None,
            "fits: parallel.tensor=2",
        ),
        (["data.global_batch_rows=5"], 7, "no layout"),
    ],
)
def test_what_is_advised(overrides: list[str], world: int | None, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("configs/sigmoid/demo.yaml", overrides, world)
    assert words in str(caught.value)


def test_everything_is_told_at_once() -> None:
    overrides = ["parallel.tensor=4", "parallel.pipeline=5", "parallel.pipeline_chunks=3", "parallel.zero=3"]
    overrides += ["parallel.zero_group=node", "parallel.engine=deepspeed", "optim.wieght_decay=1"]
    with pytest.raises(ConfigError) as caught:
        load_config("configs/sigmoid/demo.yaml", overrides, 7)
    text = str(caught.value)
    for key in ("tensor", "pipeline", "pipeline_chunks", "zero", "engine"):
        assert f"parallel.{key} = " in text
    assert "does not divide the number of processes, 7" in text
    assert "optim.wieght_decay" in text
    assert text.count("data.global_batch_rows = ") == 1


def test_lengths_that_are_advised_can_be_used_together() -> None:
    layout = ["model.heads=4", "parallel.tensor=4", "parallel.sequence=true", "parallel.context=3"]
    layout += ["data.sequence_length=100"]
    with pytest.raises(ConfigError, match="pieces.*use 96") as caught:
        load_config("configs/sigmoid/demo.yaml", layout)
    assert "use 96, or parallel.sequence=false" in str(caught.value)
    load_config("configs/sigmoid/demo.yaml", [*layout, "data.sequence_length=96"])


def test_a_config_that_was_read_before_is_checked_against_the_world() -> None:
    config = load_config("configs/sigmoid/demo.yaml", ["parallel.tensor=2"])
    check_layout(config, 4)
    with pytest.raises(ConfigError, match="start a multiple of 2"):
        check_layout(config, 5)
    assert "parallel.tensor=1" in advice(config.parallel, config.model, config.data, 3)
