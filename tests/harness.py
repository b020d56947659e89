"""Run a function on N ranks over gloo, forked from the test process, which imports DeepSpeed once.

    from tests.harness import run_ranks

    def average(value: float) -> float:            # a plain function: it runs in each rank
        tensor = torch.tensor(value + dist.get_rank())
        dist.all_reduce(tensor)
        return tensor.item() / dist.get_world_size()

    def test_average() -> None:
        assert run_ranks(2, average, 1.0) == [1.5, 1.5]

A fork costs a few milliseconds where an import costs seconds. Ranks meet through a file in a temporary
folder, so no port is chosen and tests may run side by side. Every rank is the leader of a process group of
its own, and those groups, and nothing else, are killed at the time limit or after a rank has failed.

The ranks compute with one thread each, on the CPU. The test process may use torch too, with any number of
threads; it must not start CUDA, which does not survive a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TypeVar

from torch._C._distributed_c10d import FileStore

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

from pretrain.imports import quick_and_quiet

T = TypeVar("T")

IMPORTED_LATE = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "pretrain.engine.deepspeed",
    "pretrain.engine.megatron",
    "pretrain.parallel.stages",
    "megatron.core.parallel_state",
    "megatron.core.distributed",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.transformer.multi_token_prediction",
    "models.layers.limits",
    "numpy.ma",
    "pydantic.dataclasses",
    "torch._dynamo",  # torch's optimizers import it when they are made
    "torch.distributed.tensor.experimental",
    "torch.utils.cpp_extension",
    "torch.utils.serialization.config",
    "torch.utils.tensorboard",
)

GRACE_S = 3.0  # how long the other ranks may take to end after one has failed


class RanksFailed(AssertionError):
    """A rank raised, died or did not end in time.

    Attributes:
        rank: the first that failed.
        exit_codes: of all ranks; negative is the signal that ended it.
    """

    def __init__(self, rank: int, reason: str, exit_codes: list[int | None]) -> None:
        super().__init__(f"rank {rank} {reason}\nexit codes: {exit_codes}")
        self.rank = rank
        self.exit_codes = exit_codes


@dataclass
class _Rank:
    process: ForkProcess
    inbox: Connection


def run_ranks(n: int, function: Callable[..., T], *args: Any, timeout_s: float = 60) -> list[T]:
    """Run `function(*args)` on n ranks with torch.distributed initialised over gloo.

    RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them;
    the port is not listened on.

    Args:
        n: number of ranks.
        function: may be any callable, a closure too; its result must be picklable.
        timeout_s: wall-clock limit for all ranks together.

    Returns:
        The ranks' results, by rank.

    Raises:
        RanksFailed: with the traceback of the first rank that failed.
    """
    import_deepspeed()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [_start(rank, n, Path(folder) / "store", function, args) for rank in range(n)]
        try:
            return _collect(ranks, time.monotonic() + timeout_s)
        finally:
            for rank in ranks:
                _kill_group(rank.process)


def import_deepspeed() -> None:
    """Import DeepSpeed, and keep it from compiling its shared-memory op, which only its inference uses.

    All that engines and runs import late comes too, once here instead of in each rank: a second of the CPU's each.
    """
    with quick_and_quiet():
        for name in IMPORTED_LATE:
            importlib.import_module(name)

    # `deepspeed.comm.torch` as an attribute is the real torch; the module is only to be had here
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def _start(rank: int, n: int, store: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> _Rank:
    context = get_context("fork")
    inbox, outbox = context.Pipe(duplex=False)
    process = context.Process(
        target=_run_rank, args=(rank, n, store, function, args, outbox), name=f"rank-{rank}"
    )
    process.start()
    outbox.close()
    return _Rank(process, inbox)


def _run_rank(
    rank: int, n: int, store: Path, function: Callable[..., Any], args: tuple[Any, ...], outbox: Connection
) -> None:
    """The life of one rank."""
    os.setsid()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(n),
        LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        dist.init_process_group("gloo", store=FileStore(str(store), n), rank=rank, world_size=n)
        outbox.send((True, function(*args)))
        dist.barrier()  # no rank closes its sockets while another still talks to it
    except BaseException:
        outbox.send((False, traceback.format_exc()))
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _collect(ranks: list[_Rank], deadline: float) -> list[Any]:
    """Receive all results, in whatever order they come."""
    results: dict[int, Any] = {}
    waiting = {rank.inbox: number for number, rank in enumerate(ranks)}
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise _failure(ranks, min(waiting.values()), "did not end in time")
        for inbox in ready:
            assert isinstance(inbox, Connection)
            number = waiting.pop(inbox)
            try:
                succeeded, value = inbox.recv()
            except EOFError:
                raise _failure(ranks, number, "died without a word") from None
            if not succeeded:
                raise _failure(ranks, number, f"raised:\n{value}")
            results[number] = value
    for rank in ranks:
        rank.process.join(max(GRACE_S, deadline - time.monotonic()))
    return [results[number] for number in range(len(ranks))]


def _failure(ranks: list[_Rank], number: int, reason: str) -> RanksFailed:
    """End the other ranks, which may be waiting for the failed one, and say what happened."""
    deadline = time.monotonic() + (0.0 if "in time" in reason else GRACE_S)
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
    exit_codes = [rank.process.exitcode for rank in ranks]
    return RanksFailed(number, reason, exit_codes)


def _kill_group(process: ForkProcess) -> None:
    """End a rank and whatever it started."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:  # it has not got as far as setsid
            os.kill(process.pid, signal.SIGKILL)
    process.join()
