"""The loss on the validation split, now and then."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Self

from pretrain.hooks.base import Hook, Setup, due
from pretrain.json_text import number_of

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run


class PeriodicEvaluation(Hook):
    """Every `every` steps and at the end. `last` is the newest result, with its step."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self.last: dict[str, float] | None = None

    def after_step(self, run: Run, report: StepReport) -> None:
        if due(run.clock.step, self._every):
            self._evaluate(run)

    def after_training(self, run: Run) -> None:
        if run.clock.done and (self.last is None or self.last["step"] != run.clock.step):
            self._evaluate(run)

    @abstractmethod
    def _evaluate(self, run: Run) -> None:
        """Evaluate, set `last`, and report."""


class EvaluationHook(PeriodicEvaluation):
    """The loss; also before the first step.

    bytes_per_token: of the validation split; None where the tokens are not text.

    Its state remembers the first and the last result, so that a resumed run can still tell what it began from.
    """

    name = "evaluation"

    @classmethod
    def of(cls, setup: Setup) -> Self:
        scores_text = setup.config.objective.scores_text
        every = setup.config.monitor.evaluate_every_steps
        return cls(every, setup.data.bytes_per_token if scores_text else None)

    def __init__(self, every: int | None, bytes_per_token: float | None) -> None:
        super().__init__(every)
        self._bytes_per_token = bytes_per_token
        self.first: dict[str, float] | None = None

    def before_training(self, run: Run) -> None:
        if run.clock.step == 0:
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        began = time.perf_counter()
        evaluation = run.engine.evaluate(run.validation_batches(), run.objective)
        nats = evaluation.loss
        self.last = {"step": run.clock.step, "nats_per_token": nats}
        record = {"loss/validation": nats, "speed/evaluation_seconds": time.perf_counter() - began}
        record |= {f"validation_{name}": value for name, value in evaluation.parts.items()}
        if self._bytes_per_token is not None:
            bits_per_byte = nats / math.log(2) / self._bytes_per_token
            self.last["bits_per_byte"] = bits_per_byte
            record["loss/validation_bits_per_byte"] = bits_per_byte
        if self.first is None:
            self.first = self.last
        run.reporter.write(run.clock.step, record)

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "last": self.last}

    def load_state(self, state: dict[str, Any]) -> None:
        self.first, self.last = (_result_of(state[name]) for name in ("first", "last"))


def _result_of(saved: dict[str, float | None] | None) -> dict[str, float] | None:
    return None if saved is None else {name: number_of(value) for name, value in saved.items()}
