"""How blocks and micro-batches are dealt out, and what the config says of what does not fit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import DataSection, ParallelSection, load_config
from pretrain.config.world import data_parallel_size, micro_batch_rows
from pretrain.errors import ConfigError
from pretrain.parallel.stages import blocks_of_stages
from tests.e2e.training import write_config


@given(st.integers(1, 200), st.integers(1, 32))
def test_every_block_is_on_one_stage(layers: int, stages: int) -> None:
    if layers < stages:
        with pytest.raises(ValueError, match=f"{layers} blocks cannot be shared by {stages} stages"):
            blocks_of_stages(layers, stages)
        return
    dealt = blocks_of_stages(layers, stages)
    assert [block for stage in dealt for block in stage] == list(range(layers))
    sizes = [len(stage) for stage in dealt]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert all(first >= second for first, second in pairwise(sizes))


@given(
    st.integers(1, 64),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 4),
    st.booleans(),
    st.one_of(st.just("auto"), st.integers(1, 64)),
)
def test_micro_batches_fit_the_schedule(
    rows: int, ranks: int, stages: int, interleaved: bool, micro: int | str
) -> None:
    data = DataSection(sequence_length=8, global_batch_rows=rows * ranks, micro_batch_rows=micro)  # type: ignore[arg-type]
    parallel = ParallelSection(pipeline=stages, pipeline_chunks=2 if interleaved else 1)
    if interleaved and rows % stages:
        with pytest.raises(ConfigError, match=f"multiple of {stages * ranks} rows"):
            data_parallel_size(parallel, ranks * stages, rows * ranks)
        return
    found = micro_batch_rows(data, ranks, parallel)
    assert rows % found == 0
    assert not interleaved or rows // found % stages == 0
    if stages == 1:
        assert found == (
            rows if isinstance(micro, str) else max(n for n in range(1, micro + 1) if rows % n == 0)
        )
    elif micro == "auto" and rows >= 4 * stages and rows % (4 * stages) == 0:
        assert rows // found == 4 * stages


REFUSALS = [
    (["parallel.pipeline=5"], ["parallel.pipeline = 5: the model has 2 blocks", "use at most 2"]),
    (
        ["parallel.pipeline=2", "parallel.pipeline_chunks=2", "data.global_batch_rows=7"],
        [
            "parallel.pipeline_chunks = 2: 2 blocks do not divide by 2 ranks of 2 chunks; use 1",
            "data.global_batch_rows = 7: interleaved",
            "2 problems",
        ],
    ),
    (
        ["parallel.pipeline=2", "parallel.pipeline_chunks=4", "model.layers=12"],
        ["12 blocks do not divide by 2 ranks of 4 chunks; use 1, 2, 3 or 6"],
    ),
    (["parallel.pipeline_chunks=2"], ["only a pipeline has chunks"]),
    (
        ["parallel.pipeline=2", "parallel.zero=3"],
        ["parallel.zero = 3: megatron's engine, with parallel.pipeline above 1", "use 1"],
    ),
    (["parallel.engine=megatron", "parallel.zero=2"], ["with parallel.engine=megatron"]),
    (["parallel.engine=deepspeed", "parallel.pipeline=2"], ["parallel.engine = deepspeed: pipelines are"]),
]


@pytest.mark.parametrize(("settings", "expected"), REFUSALS)
def test_what_does_not_fit_is_told(tmp_path: Path, settings: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(tmp_path, tmp_path), settings)
    for words in expected:
        assert words in str(caught.value)
