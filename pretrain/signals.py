"""Stopping on request: a flag in each process, agreed by all ranks at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from pretrain.attempts import own_attempt

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """SIGTERM (preemption), SIGUSR2 (time limit ahead) or SIGINT (Ctrl-C), seen by any rank, stop all of them."""

    def __init__(self, control: dist.ProcessGroup) -> None:
        self._control = control
        self._many = dist.get_world_size(control) > 1
        self._pending: dist.Work | None = None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self.signal: int | None = None
        self.stopped = False
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.signal = number

    def agreed(self) -> bool:
        """Ask at every step boundary. True on all ranks at the same step.

        The exchange started at one boundary is read at the next: no step waits for the network.
        """
        if not self._many:
            self.stopped = self.signal is not None
            return self.stopped
        if self._pending is not None:
            self._pending.wait()
            self.stopped = bool(self._flag.item())
        if not self.stopped:
            self._flag.fill_(int(self.signal is not None))
            self._pending = dist.all_reduce(
                self._flag, op=dist.ReduceOp.MAX, group=self._control, async_op=True
            )
        return self.stopped

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
