"""Which layouts a model and its rows allow: one check per axis, all told at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from pretrain.config.data import DataSection
from pretrain.config.section import Problem, one_of
from pretrain.config.sections import ParallelSection

MOST_NAMED = 257
"""Sizes of the tensor axis above which none is named: no node has as many GPUs."""
CHEAP = ("activation", "gated norms", "state space")
"""Work that layers can recompute by themselves, as they name it."""


def layout_problems(parallel: ParallelSection, model: Any, data: DataSection) -> Iterator[Problem]:
    """All that is wrong with a layout of this model and these rows, whatever the number of processes."""
    yield from check_tensor(parallel, model, data)
    yield from check_context(parallel, model, data)
    yield from check_pipeline(parallel, model, data)
    yield from check_engine(parallel)
    yield from check_zero(parallel)
    yield from check_offload(parallel)
    yield from check_checkpointing(parallel, model)
    yield from check_own_mixers(parallel, model, data)


def check_checkpointing(parallel: ParallelSection, model: Any) -> Iterator[Problem]:
    """Something cheap for `selective` to make again: feed-forward layers, gates or state spaces. What a mixer of one's
    own has is known only when it is built."""
    if parallel.activation_checkpointing != "selective" or getattr(model, "own", None):
        return
    if not any(stream.name in CHEAP for layer in model.layer_work() for stream in layer.streams):
        message = "no layer of this model has a cheap part; use full or none"
        yield Problem("parallel.activation_checkpointing", message, "selective", True)


def check_own_mixers(parallel: ParallelSection, model: Any, data: DataSection) -> Iterator[Problem]:
    """That mixers from outside say what this layout must know of them."""
    if not any(":" in name for name in getattr(model, "mixers", ())) or model.problems(data.sequence_length):
        return
    from models.hybrid.undeclared import undeclared  # imports torch, as those mixers do

    divided, shared = parallel.tensor > 1, parallel.context > 1
    for key, message in undeclared(model, data.sequence_length, divided=divided, shared=shared):
        yield Problem(f"model.{key}", message)


def check_tensor(parallel: ParallelSection, model: Any, data: DataSection) -> Iterator[Problem]:
    """Heads, channels and, with sequence parallelism, positions in equal parts. The vocabulary is filled up."""
    size = parallel.tensor
    for message in model.division_problems(size):
        most = min(MOST_NAMED, max(2, getattr(model, "heads", model.width) + 1))
        right = [n for n in range(1, most) if not model.division_problems(n)]
        yield Problem("parallel.tensor", f"{message}; use {one_of(right)}", size, True)
    if parallel.sequence and size == 1:
        message = "the ranks of the tensor axis share the positions: set parallel.tensor above 1, or false"
        yield Problem("parallel.sequence", message, True, True)
    ranks = size * parallel.context
    if parallel.sequence and data.sequence_length % ranks:
        near = _near_length(parallel, model, data)
        message = (
            f"with parallel.sequence {ranks} ranks share a row's positions, and {data.sequence_length} do not divide "
            f"by {ranks}; use {near}, or parallel.sequence=false"
        )
        yield Problem("data.sequence_length", message, data.sequence_length, True)


def check_context(parallel: ParallelSection, model: Any, data: DataSection) -> Iterator[Problem]:
    """Rows in equal pieces, none shorter than a convolution's reach, and mixers that can work across ranks."""
    ranks = parallel.context
    if ranks == 1:
        if parallel.recurrence != "channels" and "context" not in parallel.auto:
            message = "has no effect, as no ranks share a row: set parallel.context above 1, or channels"
            yield Problem("parallel.recurrence", message, parallel.recurrence, True)
        return
    length, pieces = data.sequence_length, _pieces(parallel, model)
    if length % pieces:
        each = ", two to a rank," if pieces > ranks else ""
        near = _near_length(parallel, model, data)
        message = f"{ranks} ranks share a row in {pieces} pieces{each} of equal length; use {near}"
        yield Problem("data.sequence_length", message, length, True)
    reach = getattr(model, "conv_width", 1) - 1
    if length // ranks < reach:
        needed = f"a rank's part of a row must hold the {reach} inputs that the convolution looks back"
        message = f"{needed}; use {_near_length(parallel, model, data)}"
        yield Problem("data.sequence_length", message, length, True)
    yield from _check_recurrence(parallel, model)


def _pieces(parallel: ParallelSection, model: Any) -> int:
    """Into how many equal pieces the ranks of the context axis cut a row."""
    return parallel.context * (2 if parallel.context > 1 and model.row_order == "balanced" else 1)


def _near_length(parallel: ParallelSection, model: Any, data: DataSection) -> int:
    """The length of a row next to the config's that all that divides rows allows, whichever of them asks."""
    shared = parallel.tensor * parallel.context if parallel.sequence else 1
    multiple = math.lcm(_pieces(parallel, model), shared)
    reach = (getattr(model, "conv_width", 1) - 1) * parallel.context if parallel.context > 1 else 1
    return max(round(data.sequence_length / multiple), -(-reach // multiple), 1) * multiple


def _check_recurrence(parallel: ParallelSection, model: Any) -> Iterator[Problem]:
    """How the mixers of ranks that share rows work together."""
    if parallel.recurrence == "summaries":
        if hasattr(model, "summary_problems"):
            for key, message in model.summary_problems():
                yield Problem(f"model.{key}", f"{message}; or use parallel.recurrence=channels")
            swap_problems: Callable[[int], list[str]] = getattr(model, "other_swap_problems", lambda _: [])
            yield from _check_swap(parallel, model, swap_problems)
        else:
            message = f"{model.family} has no recurrence that Newton's method solves; use channels"
            yield Problem("parallel.recurrence", message, "summaries", True)
        return
    yield from _check_swap(parallel, model, model.swap_problems)


def _check_swap(
    parallel: ParallelSection, model: Any, swap_problems: Callable[[int], list[str]]
) -> Iterator[Problem]:
    """That the ranks of a row can exchange positions for heads or channels, in the mixers that do."""
    for message in swap_problems(parallel.tensor * parallel.context):
        right = [n for n in range(1, model.width + 1) if not swap_problems(parallel.tensor * n)]
        if not right and swap_problems(
            parallel.context
        ):  # the context axis is wrong whatever the tensor axis is
            right = [n for n in range(1, model.width + 1) if not swap_problems(n)]
        near = sorted(sorted(right, key=lambda n: abs(n - parallel.context))[:4])
        if near:  # else it is the tensor axis that does not divide
            both = (
                "" if parallel.tensor == 1 else f" (tensor x context = {parallel.tensor * parallel.context})"
            )
            message = f"ranks of one row exchange positions for heads or channels{both}: {message}; use {one_of(near)}"
            yield Problem("parallel.context", message, parallel.context, True)


def check_pipeline(parallel: ParallelSection, model: Any, data: DataSection) -> Iterator[Problem]:
    """Blocks for every stage and, interleaved, equally many; micro-batches for the interleaved schedule."""
    ranks, chunks = parallel.pipeline, parallel.pipeline_chunks
    if model.layers < ranks:
        message = f"the model has {model.layers} blocks, and each rank needs one; use at most {model.layers}"
        yield Problem("parallel.pipeline", message, ranks, True)
    if chunks > 1 and ranks == 1:
        message = "only a pipeline has chunks: set parallel.pipeline above 1, or 1 here"
        yield Problem("parallel.pipeline_chunks", message, chunks, True)
    elif chunks > 1 and model.layers % (ranks * chunks):
        right = [n for n in range(1, model.layers // ranks + 1) if model.layers % (ranks * n) == 0]
        message = f"{model.layers} blocks do not divide by {ranks} ranks of {chunks} chunks"
        instead = f"use {one_of(right)}" if right else "use 1, with which ranks need not have equally many"
        yield Problem("parallel.pipeline_chunks", f"{message}; {instead}", chunks, True)
    if chunks > 1 and data.global_batch_rows % ranks:
        message = f"interleaved, each rank's rows make a multiple of {ranks} micro-batches; use a multiple of {ranks}"
        yield Problem("data.global_batch_rows", message, data.global_batch_rows, True)


def check_engine(parallel: ParallelSection) -> Iterator[Problem]:
    """DeepSpeed has ZeRO 2 and 3, Megatron has pipelines."""
    if parallel.engine == "deepspeed" and parallel.pipeline > 1:
        message = "pipelines are megatron's; use auto, or parallel.pipeline=1"
        yield Problem("parallel.engine", message, parallel.engine, True)
    if parallel.zero > 1 and (parallel.pipeline > 1 or parallel.engine == "megatron"):
        because = (
            "with parallel.pipeline above 1" if parallel.pipeline > 1 else "with parallel.engine=megatron"
        )
        message = f"megatron's engine, {because}, shards optimizer states at most; use 1"
        yield Problem("parallel.zero", message, parallel.zero, True)


def check_zero(parallel: ParallelSection) -> Iterator[Problem]:
    """Copies per node, of parameters that are shared."""
    if parallel.zero_group == "node" and parallel.chosen_engine == "megatron":
        message = "only ZeRO 3 shares parameters, which megatron's engine has not; use all"
        yield Problem("parallel.zero_group", message, parallel.zero_group, True)
    elif parallel.zero_group == "node" and parallel.zero != 3:
        message = "only ZeRO 3 shares parameters: set parallel.zero=3, or all"
        yield Problem("parallel.zero_group", message, parallel.zero_group, True)


def check_offload(parallel: ParallelSection) -> Iterator[Problem]:
    if parallel.offload == "none":
        return
    if parallel.chosen_engine == "megatron":
        because = "a pipeline's engine" if parallel.pipeline > 1 else "parallel.engine=megatron"
        message = f"megatron, {because}, keeps its optimizer on the device; use none"
        yield Problem("parallel.offload", message, parallel.offload, True)
    elif parallel.zero == 0:
        message = "only ZeRO's optimizer can lie in host memory: set parallel.zero=1, 2 or 3, or none"
        yield Problem("parallel.offload", message, parallel.offload, True)
