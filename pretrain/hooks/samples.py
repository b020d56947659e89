"""Text that the model writes while it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from pretrain.generate.causal import Sampling, generate
from pretrain.hooks.base import Hook, due

if TYPE_CHECKING:
    from data_pipelines.tokenizers import Tokenizer
    from pretrain.engine.base import StepReport
    from pretrain.run import Run


class SampleHook(Hook):
    name = "samples"

    def __init__(
        self, tokenizer: Tokenizer, every: int | None, prompts: tuple[str, ...], tokens: int
    ) -> None:
        self._tokenizer = tokenizer
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
        # All ranks generate the same text, for under ZeRO 3 every forward pass is collective. Rounding may differ
        # between ranks, so rank 0's token counts: else one could end its text while the others wait for it.
        def agree(token: int) -> int:
            chosen = torch.tensor([token])
            dist.broadcast(chosen, src=0, group=run.mesh.control)
            return int(chosen)

        with run.engine.inference() as model:
            texts = generate(model, self._tokenizer, self._prompts, self._sampling, run.device, agree)
        for number, text in enumerate(texts):
            run.reporter.text(run.clock.step, f"samples/{number}", text)
