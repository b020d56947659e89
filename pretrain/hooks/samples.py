"""Text that the model writes while it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.generation import Sampling, generate
from pretrain.hooks.base import Hook, due

if TYPE_CHECKING:
    from pretrain.engine.base import StepReport
    from pretrain.run import Run


class SampleHook(Hook):
    name = "samples"

    def __init__(self, every: int | None, prompts: tuple[str, ...], tokens: int) -> None:
        self._every = every
        self._prompts = prompts
        self._sampling = Sampling(tokens=tokens)

    def after_step(self, run: Run, report: StepReport) -> None:
        if due(run.clock.step, self._every) and not run.clock.done:
            self._write(run)

    def after_training(self, run: Run) -> None:
        if run.clock.done:
            self._write(run)

    def _write(self, run: Run) -> None:
        # All ranks generate the same text: under ZeRO 3 every forward pass is collective.
        with run.engine.inference() as model:
            texts = generate(model, run.tokenizer, self._prompts, self._sampling, run.device)
        for number, text in enumerate(texts):
            run.reporter.text(run.clock.step, f"samples/{number}", text)
