"""What a rank alone knows, and all must act on at the same step boundary: a request to stop, a failed save."""

from __future__ import annotations

import signal
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist

from pretrain.attempts import own_attempt

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class Matter(IntEnum):
    """What is agreed on at step boundaries."""

    stop = 0
    save_failed = 1
    """A rank's part of the save in flight has failed."""
    save_again = 2
    """Rank 0: it is time to try that again."""


class StopRequest:
    """SIGTERM (preemption), SIGUSR2 (time limit ahead), SIGINT (Ctrl-C) or SIGHUP (a terminal that was closed), seen
    by any rank, stop all of them.

    Other matters go with it: a rank that calls `raise_matter` has all ranks find it `is_agreed` at one boundary.
    """

    def __init__(self, control: dist.ProcessGroup) -> None:
        self._control = control
        self._many = dist.get_world_size(control) > 1
        self._pending: dist.Work | None = None
        self._flags = torch.zeros(len(Matter), dtype=torch.int32)
        self._raised: set[Matter] = set()
        self._agreed: set[Matter] = set()
        self.signal: int | None = None
        self.stopped = False
        # Under nohup a hang-up is ignored, and shall be.
        wanted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in wanted}

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.signal = number

    def agreed(self) -> bool:
        """Ask at every step boundary, once. True on all ranks at the same step.

        The exchange started at one boundary is read at the next: no step waits for the network.
        """
        if self.signal is not None:
            self._raised.add(Matter.stop)
        if not self._many:
            self._agreed, self._raised = self._raised, set()
        else:
            self._agreed = self._read()
            if Matter.stop not in self._agreed:
                self._flags = torch.tensor(
                    [int(matter in self._raised) for matter in Matter], dtype=torch.int32
                )
                self._raised = set()
                self._pending = dist.all_reduce(
                    self._flags, op=dist.ReduceOp.MAX, group=self._control, async_op=True
                )
        self.stopped = Matter.stop in self._agreed
        return self.stopped

    def _read(self) -> set[Matter]:
        if self._pending is None:
            return set()
        self._pending.wait()
        self._pending = None
        return {matter for matter in Matter if self._flags[matter]}

    def raise_matter(self, matter: Matter) -> None:
        """Have all ranks know, after the boundary to come or the one after it."""
        self._raised.add(matter)

    def is_agreed(self, matter: Matter) -> bool:
        """As the last boundary found it: the same on all ranks, until the next."""
        return matter in self._agreed

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # The last exchange is one that all ranks started; after an error a peer may be gone, and nobody waits.
        if self._pending is not None and not self.stopped and error is None:
            self._pending.wait()
        # After an error, and in a launched run always, the process is on its way out: a signal that reaches it there,
        # from Slurm that ends the other ranks too, must not find a handler that tells another story of why it ended.
        leaving = error is not None or own_attempt() is not None
        for number, handler in self._previous.items():
            if not leaving or number == signal.SIGINT:
                signal.signal(number, handler)

    @property
    def reason(self) -> str:
        return signal.Signals(self.signal).name if self.signal else "another rank's signal"
