"""The config's data section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pretrain.config.section import Auto, Section


class SourceSection(Section):
    path: str
    weight: float = Field(default=1.0, gt=0, le=1e9)
    """Share of the rows, relative to the other sources."""


class DataSection(Section):
    path: str | tuple[SourceSection, ...] | None = None
    """A dataset folder, or a list of them: [a, b], or [{path: a, weight: 3}, {path: b, weight: 1}]."""
    task: dict[str, Any] | None = None
    """A synthetic task instead: {name: k_hop, hops: 2, vocabulary: 5}. `data_pipelines/tasks` has them all."""
    own: dict[str, Any] | None = None
    """Data of your own instead: {name: "my_module:MyData", ...}, an `OwnDataSection` on PYTHONPATH and its settings."""
    sequence_length: int = Field(ge=1, le=16_777_216)
    """Tokens per row."""
    global_batch_rows: int = Field(ge=1, le=16_777_216)
    """Rows per optimizer step, over all ranks and micro-batches."""
    micro_batch_rows: Annotated[int, Field(ge=1, le=16_777_216)] | Auto = "auto"
    """Rows per forward pass of one rank. auto: all of the rank's rows at once."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Reader processes per rank. 0: one background thread, enough for tokenised text."""
    prefetch_batches: int = Field(default=4, ge=1, le=4096)
    shuffle_window_shards: int = Field(default=16, ge=1, le=1_000_000)
    """Documents are shuffled within windows of this many shuffled shards."""
    shuffle_rows: bool = True
    """Next-token prediction: shuffle the rows of a window too, so that a long document (or a single file) is not read
    from its beginning to its end. false: only documents are shuffled, and a long one's rows follow each other."""

    @field_validator("path", mode="before")
    @classmethod
    def _names_are_sources(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("task")
    @classmethod
    def _task_is_known(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            from data_pipelines.tasks import (
                build_task,
            )  # with torch, which Slurm's batch script should not wait for

            build_task(value)
        return value

    @property
    def named_by(self) -> Literal["path", "task", "own"]:
        """The key that says what the data are."""
        return "path" if self.path is not None else "task" if self.task is not None else "own"

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        """None for a synthetic task, and for data of one's own."""
        return (SourceSection(path=self.path),) if isinstance(self.path, str) else self.path or ()
