"""Layouts that fit, fastest first.

The passes of a model are linear in its blocks and in the rows of a micro-batch. So each way to divide a layer is
simulated once, with one block and with two, on one row; the rest is arithmetic.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models import families
from pretrain.config.nearest import overrides, problems_of
from pretrain.config.world import data_parallel_size, micro_batch_rows
from pretrain.parallel.stages import blocks_of_stages
from pretrain.plan.estimate import Layout, layout_of, of_stages
from pretrain.plan.memory import lone_replicas
from pretrain.plan.parameters import resolved
from pretrain.plan.simulate import Passes, pretended_mesh, simulate
from pretrain.plan.tracker import Traffic

if TYPE_CHECKING:
    from pretrain.config import Config, ParallelSection
    from pretrain.hardware import Accelerator

GIB = 1 << 30
ROOM = 0.9
"""Of a GPU's memory that a layout may fill: the rest is the allocator's, the libraries' and what a plan overlooks."""
CHECKPOINTING = ("none", "selective", "full")
SIZES = (1, 2, 4, 8)
"""Ranks along an axis, and rows of a micro-batch, that are tried: what crosses nodes is left to the replicas."""
LONG_ROW = 16_384
"""Positions from which sharing a row is worth a look."""


@dataclass(frozen=True)
class Suggestion:
    settings: str
    """What to add to the command line; empty for the layout that was asked for."""
    division: tuple[int, int, int]
    """Tensor, context and pipeline sizes. Of one division the fastest is suggested."""
    layout: Layout
    tokens_per_step: int
    mfu: float


@dataclass(frozen=True)
class _Linear:
    """Passes of a model as a constant and a share per block, of one row."""

    one: Passes
    two: Passes

    def passes(self, blocks: int, rows: int, *, head: bool) -> Passes:
        """Of a part of the model with so many blocks."""

        def of(kind: str, scale: int = 1) -> int:
            first, second = getattr(self.one, kind), getattr(self.two, kind)
            return int(scale * (first + (blocks - 1) * (second - first)))

        def counted(kind: str, scale: int) -> Traffic:
            one, two = getattr(self.one, kind), getattr(self.two, kind)
            return Counter(
                {key: scale * (size + (blocks - 1) * (two[key] - size)) for key, size in one.items()}
            )

        body = of("body", rows)
        # The head makes its logits chunk by chunk: they grow with the rows only up to a chunk.
        logits = max(self.one.logits, self.two.logits) if head else 0
        sizes = {kind: of(kind) for kind in ("parameters", "aligned", "small")}
        traffic, calls = counted("traffic", rows), counted("calls", 1)
        return Passes(
            kept=of("kept", rows), body=body, peak=body + logits, traffic=traffic, calls=calls, **sizes
        )


def describe(parallel: ParallelSection) -> str:
    """The layout in words, without what it does not have."""
    words = {
        f"tensor {parallel.tensor}": parallel.tensor > 1,
        "sequence": parallel.sequence,
        f"context {parallel.context}": parallel.context > 1,
        "by summaries": parallel.context > 1 and parallel.recurrence == "summaries",
        f"pipeline {parallel.pipeline}": parallel.pipeline > 1,
        f"{parallel.pipeline_chunks} chunks each": parallel.pipeline_chunks > 1,
        "Megatron's engine": parallel.engine == "megatron" and parallel.pipeline == 1,
        f"ZeRO {parallel.zero}": True,
        "a copy per node": parallel.zero_group == "node",
        "optimizer in host memory": parallel.offload != "none",
        f"{parallel.activation_checkpointing} checkpointing": parallel.activation_checkpointing != "none",
    }
    return ", ".join(word for word, shown in words.items() if shown)


def suggest_layouts(config: Config, gpus: int, accelerator: Accelerator, count: int = 6) -> list[Suggestion]:
    """At most `count` layouts of `gpus` devices that fit, fastest first, each with another division of the model."""
    config = resolved(config)
    known: dict[Any, _Linear] = {}
    found = []
    for parallel, rows in _candidates(config, gpus):
        candidate = replace(
            config, parallel=parallel, data=config.data.model_copy(update={"micro_batch_rows": rows})
        )
        key = (parallel.tensor, parallel.context, parallel.activation_checkpointing)
        if key not in known:
            known[key] = _simulated(candidate)
        layout = _layout(candidate, gpus, accelerator, known[key])
        if layout.memory.total <= ROOM * accelerator.memory_gib * GIB:
            found.append(_suggestion(config, candidate, gpus, accelerator, layout))
    found.sort(key=lambda one: one.layout.time.total)
    best: dict[tuple[int, int, int], Suggestion] = {}
    for one in found:
        best.setdefault(one.division, one)
    return list(best.values())[:count]


def _candidates(config: Config, gpus: int) -> Iterator[tuple[ParallelSection, int]]:
    """Layouts that the model, the rows and the number of GPUs allow, with rows of a micro-batch."""
    contexts = SIZES if config.data.sequence_length >= LONG_ROW else (1,)
    for tensor, context, pipeline in itertools.product(SIZES, contexts, SIZES):
        for zero, checkpointing in itertools.product((1, 2, 3), CHECKPOINTING):
            changes = {
                "data": "auto",
                "tensor": tensor,
                "sequence": tensor > 1,
                "context": context,
                "pipeline": pipeline,
                "pipeline_chunks": 1,
                "zero": zero,
                "engine": "auto",
                "activation_checkpointing": checkpointing,
            }
            parallel = config.parallel.model_copy(update=changes)
            if any(problems_of(parallel, config.model, config.data, gpus)):
                continue
            data_ranks = data_parallel_size(parallel, gpus, config.data.global_batch_rows)
            if lone_replicas(replace(config, parallel=parallel), data_ranks * context):
                continue
            share = config.data.global_batch_rows // data_ranks
            yield from ((parallel, rows) for rows in SIZES if share % rows == 0)


def _simulated(config: Config) -> _Linear:
    """One row through one block and through two, on one stage."""
    passes = []
    for blocks in (1, 2):
        parallel = config.parallel.model_copy(update={"pipeline": 1, "zero": 1})
        short = replace(config, parallel=parallel, model=replace(config.model, layers=blocks))
        with pretended_mesh(parallel, parallel.tensor * parallel.context) as mesh:
            passes += simulate(short, mesh, 1)
    return _Linear(*passes)


def _layout(config: Config, gpus: int, accelerator: Accelerator, linear: _Linear) -> Layout:
    parallel = config.parallel
    data_ranks = data_parallel_size(parallel, gpus, config.data.global_batch_rows)
    rows = micro_batch_rows(config.data, data_ranks, parallel)
    stages = blocks_of_stages(config.model.layers, parallel.pipeline)
    layouts = []
    for stage in sorted({0, parallel.pipeline - 1}):
        head = stage == parallel.pipeline - 1
        passes = linear.passes(len(stages[stage]), rows, head=head)
        layouts.append(layout_of(config, accelerator, data_ranks, stage, [passes]))
    return of_stages(layouts)


def _suggestion(
    asked: Config, candidate: Config, gpus: int, accelerator: Accelerator, layout: Layout
) -> Suggestion:
    words = overrides(asked.parallel, candidate.parallel)
    if asked.data.micro_batch_rows != layout.micro_batch_rows:
        words.append(f"data.micro_batch_rows={layout.micro_batch_rows}")
    parallel, length = candidate.parallel, candidate.data.sequence_length
    tokens = candidate.data.global_batch_rows * length
    flops = families[candidate.model.family].flops_per_token(candidate.model, length) * tokens
    peak = accelerator.peak_teraflops[candidate.precision.dtype] * 1e12 * gpus
    division = (parallel.tensor, parallel.context, parallel.pipeline)
    return Suggestion(" ".join(words), division, layout, tokens, flops / peak / layout.time.total)
