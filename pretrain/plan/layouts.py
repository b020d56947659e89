"""Layouts that fit, fastest first.

The passes of a model are linear in its blocks and in the rows of a micro-batch. So each way to divide a layer is
simulated once, with one block and with two, on one row; the rest is arithmetic.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models import families
from pretrain.config.nearest import overrides, problems_of
from pretrain.config.sections import CHOSEN
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
    parallel: ParallelSection
    tokens_per_step: int
    mfu: float

    def fits(self, accelerator: Accelerator) -> bool:
        """With room to spare."""
        return self.layout.memory.total <= ROOM * accelerator.memory_gib * GIB


@dataclass(frozen=True)
class _Linear:
    """Passes of a model as a constant and a share per run of `period` blocks, of one row."""

    one: Passes
    two: Passes
    period: int

    def passes(self, blocks: int, rows: int, *, head: bool) -> Passes:
        """Of a part of the model with so many blocks."""
        more = blocks / self.period - 1

        def of(kind: str, scale: int = 1) -> int:
            first, second = getattr(self.one, kind), getattr(self.two, kind)
            return int(scale * (first + more * (second - first)))

        def counted(kind: str, scale: int) -> Traffic:
            one, two = getattr(self.one, kind), getattr(self.two, kind)
            return Counter({key: int(scale * (size + more * (two[key] - size))) for key, size in one.items()})

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
    found = sorted(
        (one for one in tried_layouts(config, gpus, accelerator, CHOSEN) if one.fits(accelerator)),
        key=lambda one: one.layout.time.total,
    )
    best: dict[tuple[int, int, int], Suggestion] = {}
    for one in found:
        best.setdefault(one.division, one)
    return list(best.values())[:count]


def tried_layouts(
    config: Config,
    gpus: int,
    accelerator: Accelerator,
    free: Sequence[str],
    known: dict[Any, _Linear] | None = None,
) -> list[Suggestion]:
    """All layouts that differ from the config's in the `free` keys of `parallel`, and in the rows of a micro-batch
    where the config leaves them open or nothing is to be chosen; whether they fit or not.

    known: simulated passes of this model, which do not depend on the number of GPUs; new ones are added.
    """
    config = resolved(config)
    known = {} if known is None else known
    found = []
    for parallel, rows in _candidates(config, gpus, free):
        candidate = replace(
            config, parallel=parallel, data=config.data.model_copy(update={"micro_batch_rows": rows})
        )
        key = (parallel.tensor, parallel.context, parallel.activation_checkpointing)
        if key not in known:
            known[key] = _simulated(candidate)
        layout = _layout(candidate, gpus, accelerator, known[key])
        found.append(_suggestion(config, candidate, gpus, accelerator, layout))
    return found


def _candidates(config: Config, gpus: int, free: Sequence[str]) -> Iterator[tuple[ParallelSection, int]]:
    """Layouts that the model, the rows and the number of GPUs allow, with rows of a micro-batch."""
    choices: dict[str, Sequence[Any]] = {
        "tensor": SIZES,
        "context": SIZES if config.data.sequence_length >= LONG_ROW else (1,),
        "pipeline": SIZES,
        "zero": (1, 2, 3),
        "activation_checkpointing": CHECKPOINTING,
    }
    # Where all is free, what follows from a layout is too.
    follows = {"data": "auto", "pipeline_chunks": 1, "engine": "auto"} if set(free) == set(CHOSEN) else {}
    tried = {
        key: values if key in free else (getattr(config.parallel, key),) for key, values in choices.items()
    }
    for values in itertools.product(*tried.values()):
        changes: dict[str, Any] = {**follows, **dict(zip(tried, values, strict=True))}
        if "sequence" in free:
            changes["sequence"] = changes["tensor"] > 1
        if changes["context"] == 1:
            changes["recurrence"] = "channels"
        parallel = config.parallel.model_copy(update=changes)
        if any(problems_of(parallel, config.model, config.data, gpus)):
            continue
        data_ranks = data_parallel_size(parallel, gpus, config.data.global_batch_rows)
        if lone_replicas(replace(config, parallel=parallel), data_ranks * parallel.context):
            continue
        share = config.data.global_batch_rows // data_ranks
        if config.parallel.auto and config.data.micro_batch_rows != "auto":
            yield parallel, micro_batch_rows(config.data, data_ranks, parallel)
        else:
            yield from ((parallel, rows) for rows in SIZES if share % rows == 0)


def _simulated(config: Config) -> _Linear:
    """One row through one run of blocks and through two, on one stage."""
    passes = []
    for blocks in (period(config), 2 * period(config)):
        parallel = config.parallel.model_copy(update={"pipeline": 1, "zero": 1})
        short = replace(config, parallel=parallel, model=replace(config.model, layers=blocks))
        with pretended_mesh(parallel, parallel.tensor * parallel.context) as mesh:
            passes += simulate(short, mesh, 1)
    one, two = passes
    return _Linear(one, two, period(config))


def period(config: Config) -> int:
    """Blocks after which those of a model come again: a hybrid's pattern, or one."""
    mixers = getattr(config.model, "mixers", ("",))
    return len(mixers) if config.model.layers % len(mixers) == 0 else int(config.model.layers)


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
    mfu = flops / peak / layout.time.total
    return Suggestion(" ".join(words), division, layout, parallel, tokens, mfu)
