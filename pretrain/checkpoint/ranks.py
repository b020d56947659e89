"""Doing a thing on all ranks so that either all succeed or all raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from pretrain.errors import CheckpointError, NoRoomError, may_pass

T = TypeVar("T")


class Ranks:
    """The ranks that share a checkpoint. Without a group, this process alone.

    Args:
        group: a gloo group that nothing else uses at the same time, or None when torch.distributed is not
            initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, function: Callable[[], T]) -> list[T]:
        """Run `function` on every rank.

        Returns:
            Every rank's result, by rank.

        Raises:
            CheckpointError: on all ranks, if it failed on any, with each failing rank's message; NoRoomError where
                all of them failed for what may pass.
        """
        failure: tuple[str, bool] | None = None
        result: T | None = None
        try:
            result = function()
        except Exception as error:
            failure = (describe(error), may_pass(error))
        outcomes = self.gather((result, failure))
        failures = {rank: text for rank, (_, text) in enumerate(outcomes) if text is not None}
        if failures:
            raise joined(failures, self.size)
        return [value for value, _ in outcomes]  # type: ignore[misc]  # a result is there where no failure is

    def on_first(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 and give its result, or its failure, to all."""
        return self.agree(lambda: function() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def describe(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, CheckpointError):
        return str(error)
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def joined(failures: dict[int, tuple[str, bool]], world_size: int) -> CheckpointError:
    """Failures of ranks as one; the rank is named unless there is only one, or all say the same.

    failures: by rank, what happened and whether it may pass.
    """
    kind = NoRoomError if all(passing for _, passing in failures.values()) else CheckpointError
    texts = {rank: text for rank, (text, _) in sorted(failures.items())}
    if world_size == 1 or (len(texts) == world_size and len(set(texts.values())) == 1):
        return kind(next(iter(texts.values())))
    return kind("; ".join(f"rank {rank}: {text}" for rank, text in texts.items()))
