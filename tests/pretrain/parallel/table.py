"""The layouts that are compared with one process: by tests a few, by `benchmarks.equality` all, for every family."""

from __future__ import annotations

from dataclasses import dataclass, replace

TENSOR, SEQUENCE, CONTEXT = "parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"
PIPELINE, CHUNKS = "parallel.pipeline=2", "parallel.pipeline_chunks=2"
MEGATRON = "parallel.engine=megatron"
MICRO = "data.micro_batch_rows=2"
LAYERS = "model.layers=4"
"""Enough for two stages of two chunks."""


@dataclass(frozen=True)
class Layout:
    """
    Attributes:
        alone: what the one process is told too, for the two to compute the same.
        models: those that have it, where it is not all.
    """

    ranks: int
    settings: tuple[str, ...]
    alone: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None

    def suits(self, model: str) -> bool:
        return self.models is None or model in self.models

    def also(self, *settings: str) -> Layout:
        """The same with more settings."""
        return replace(self, settings=(*self.settings, *settings))


def _layout(ranks: int, *settings: str, zero: int = 0) -> Layout:
    return Layout(ranks, (*settings, f"parallel.zero={zero}"))


def _piped(ranks: int, *settings: str, zero: int = 0) -> Layout:
    return _layout(ranks, MICRO, PIPELINE, *settings, zero=zero)


def _summaries(
    ranks: int, *settings: str, models: tuple[str, ...] = ("gru", "lstm"), solver: str = "model.newton"
) -> Layout:
    """Newton's method on both sides: the sequential kernel's rounding is another."""
    newton = (f"{solver}.method=newton", f"{solver}.iterations=6")
    sharing = ("parallel.recurrence=summaries", "parallel.zero=1", *settings, *newton)
    return Layout(ranks, sharing, newton, models)


LAYOUTS = {
    "1 process, micro-batches": _layout(1, MICRO),
    **{f"dp2 ZeRO {zero}": _layout(2, zero=zero) for zero in range(4)},
    "dp4 ZeRO 2, micro-batches": _layout(4, "data.micro_batch_rows=1", zero=2),
    "megatron dp2 ZeRO 1": _layout(2, MEGATRON, zero=1),
    "tp2": _layout(2, TENSOR),
    "tp2 sp": _layout(2, TENSOR, SEQUENCE),
    "tp4 sp": Layout(
        4, ("parallel.tensor=4", SEQUENCE), models=("softmax", "gru", "lstm", "mamba2", "trimodal")
    ),
    **{f"tp2 dp2 ZeRO {zero}": _layout(4, TENSOR, zero=zero) for zero in range(4)},
    **{f"tp2 sp dp2 ZeRO {zero}": _layout(4, TENSOR, SEQUENCE, zero=zero) for zero in range(4)},
    "megatron tp2 sp dp2 ZeRO 1": _layout(4, TENSOR, SEQUENCE, MEGATRON, zero=1),
    "cp2": _layout(2, CONTEXT),
    "cp4 ZeRO 1": _layout(4, "parallel.context=4", zero=1),
    **{f"cp2 ZeRO {zero}": _layout(2, CONTEXT, zero=zero) for zero in (2, 3)},
    "cp2 dp2 ZeRO 3": _layout(4, CONTEXT, zero=3),
    "cp2 summaries": _summaries(2, CONTEXT),
    "cp4 summaries": _summaries(4, "parallel.context=4"),
    "tp2 cp2 summaries": _summaries(4, CONTEXT, TENSOR),
    "cp2 summaries beside attention": _summaries(
        2, CONTEXT, models=("gru and sigmoid",), solver="model.pararnn_gru.newton"
    ),
    "tp2 cp2": _layout(4, TENSOR, CONTEXT),
    "tp2 sp cp2": _layout(4, TENSOR, SEQUENCE, CONTEXT),
    "pp2 1F1B": _piped(2),
    "pp2 interleaved": _piped(2, CHUNKS),
    "pp4 ZeRO 1": _layout(4, MICRO, "parallel.pipeline=4", zero=1),
    "pp2 dp2": _piped(4),
    "pp2 dp2 ZeRO 1": _piped(4, zero=1),
    "pp2 interleaved dp2 ZeRO 1": _piped(4, CHUNKS, zero=1),
    "tp2 pp2": _piped(4, TENSOR),
    "tp2 sp pp2 ZeRO 1": _piped(4, TENSOR, SEQUENCE, zero=1),
    "tp2 sp pp2 interleaved ZeRO 1": _piped(4, TENSOR, SEQUENCE, CHUNKS, zero=1),
    "cp2 pp2": _piped(4, CONTEXT),
    "cp2 pp2 interleaved ZeRO 1": _piped(4, CONTEXT, CHUNKS, zero=1),
    "tp2 sp cp2 pp2 ZeRO 1": _piped(8, TENSOR, SEQUENCE, CONTEXT, zero=1),
}
