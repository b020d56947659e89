"""What the model makes while it learns: text, and pictures and sounds of masked diffusion."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines.codecs.base import AudioCodec
from data_pipelines.rows.cut_rows import Source, open_sources
from data_pipelines.rows.pair_lengths import target_lengths
from data_pipelines.tokens.vocabulary import TASKS
from pretrain.config.objective import MaskedDiffusionSection
from pretrain.generate.canvas import canvas
from pretrain.generate.causal import Sampling, generate
from pretrain.generate.denoiser import model_denoiser
from pretrain.generate.diffusion import Sampler
from pretrain.generate.documents import Document, documents_of
from pretrain.generate.lengths import count_lengths, save_lengths
from pretrain.generate.media import contact_sheet
from pretrain.generate.requests import FREE_TEXT
from pretrain.generate.settings import settings_for
from pretrain.hooks.base import Hook, Setup, due
from pretrain.run_data import DiffusionData

if TYPE_CHECKING:
    from data_pipelines.tokens.tokenizer import Tokenizer
    from pretrain.engine.base import StepReport
    from pretrain.run import Run

logger = logging.getLogger(__name__)

EXAMPLES = 9
"""Of each task."""
LENGTH_ROWS_AT_ONCE, LENGTH_BATCHES = 8, 64
"""Rows of the validation split from which examples are taken."""


class PeriodicSamples(Hook):
    """Every `every` steps and at the end."""

    name = "samples"

    def __init__(self, every: int | None) -> None:
        self._every = every

    def after_step(self, run: Run, report: StepReport) -> None:
        if due(run.clock.step, self._every) and not run.clock.done:
            self._write(run)

    def after_training(self, run: Run) -> None:
        if run.clock.done:
            self._write(run)

    @abstractmethod
    def _write(self, run: Run) -> None:
        """Sample and report. All ranks make the same samples, for under ZeRO 3 every forward pass is collective."""


class SampleHook(PeriodicSamples):
    """Text of a causal model."""

    @classmethod
    def of(cls, setup: Setup) -> Self | None:
        monitor, data = setup.config.monitor, setup.data
        if data.tokenizer is None or data.vocabulary is not None or not setup.config.model.causal:
            return None
        return cls(data.tokenizer, monitor.sample_every_steps, data.prompts, monitor.sample_tokens)

    def __init__(
        self, tokenizer: Tokenizer, every: int | None, prompts: tuple[str, ...], tokens: int
    ) -> None:
        super().__init__(every)
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._sampling = Sampling(tokens=tokens)

    def _write(self, run: Run) -> None:
        # Rounding may differ between ranks, so rank 0's token counts: else one could end its text while the others
        # wait for it.
        def agree(token: int) -> int:
            chosen = torch.tensor([token])
            dist.broadcast(chosen, src=0, group=run.mesh.control)
            return int(chosen)

        with run.engine.inference() as model:
            texts = generate(model, self._tokenizer, self._prompts, self._sampling, run.device, agree)
        for number, text in enumerate(texts):
            run.reporter.text(run.clock.step, f"samples/{number}", text)


class DiffusionSampleHook(PeriodicSamples):
    """Targets of the first documents of the validation split, made anew from their conditions; texts of the lengths
    that are there. Also keeps in the run's folder how long targets are in all of the split, for `triptych generate`."""

    @classmethod
    def of(cls, setup: Setup) -> Self | None:
        if not isinstance(setup.config.objective, MaskedDiffusionSection):
            return None
        assert isinstance(setup.data, DiffusionData)
        return cls(setup.data, setup.config.monitor.sample_every_steps)

    def __init__(self, data: DiffusionData, every: int | None) -> None:
        super().__init__(every)
        self._modalities = data.modalities
        self._sources, self._sequence_length = data.config.data.sources, data.config.data.sequence_length
        self._objective = cast(MaskedDiffusionSection, data.config.objective)
        batches = islice(data.validation.batches(LENGTH_ROWS_AT_ONCE), LENGTH_BATCHES)
        documents = list(documents_of(batches, data.vocabulary))
        self._lengths = count_lengths(documents)
        shown = {"text", *(name for name in ("image", "audio") if getattr(data.modalities, name) is not None)}
        self._examples = {
            task: [one for one in documents if one.task == task][:EXAMPLES]
            for task in sorted(self._lengths)
            if _made(task) in shown
        }
        self._hidden = sorted(self._lengths.keys() - self._examples.keys())

    def before_training(self, run: Run) -> None:
        if not run.ranks.is_main:
            return
        sources = open_sources([Source(one.path) for one in self._sources], split="validation")
        row = self._sequence_length
        save_lengths(target_lengths(sources, self._modalities.vocabulary, row), run.folder.tokenizer)
        if self._hidden:
            logger.warning(
                "no samples of %s: the data holds codes, and no codec to decode them with",
                ", ".join(self._hidden),
            )

    def _write(self, run: Run) -> None:
        def agree(tokens: Tensor) -> Tensor:
            agreed = tokens.clone()
            dist.broadcast(agreed, src=0, group=run.mesh.control)
            return agreed

        vocabulary = self._modalities.vocabulary
        with run.engine.inference() as model:
            denoiser = model_denoiser(model, vocabulary)
            for task, examples in self._examples.items():
                settings = settings_for("free text" if task == FREE_TEXT else _made(task), self._objective)
                sampler = Sampler(denoiser, vocabulary, settings, run.device, agree=agree)
                filled = sampler([canvas(vocabulary, one.blank(vocabulary.mask)) for one in examples])
                if run.ranks.is_main:
                    made = [
                        document_like(one, filled_T) for one, filled_T in zip(examples, filled, strict=True)
                    ]
                    self._report(run, task, examples, made)

    def _report(self, run: Run, task: str, examples: list[Document], made: list[Document]) -> None:
        step, name, modality = run.clock.step, f"samples/{task}", _made(task)
        samples = [self._modalities.sample(modality, one.target.numpy()) for one in made]
        if task == FREE_TEXT:
            run.reporter.text(step, name, _lines(samples))
            return
        given = TASKS[task][0]
        if modality == "text":
            true = [self._modalities.sample("text", one.target.numpy()) for one in examples]
            pairs = zip(samples, true, strict=True)
            run.reporter.text(step, name, _lines([f"{made} (true: {told})" for made, told in pairs]))
        elif modality == "image":
            run.reporter.image(step, name, contact_sheet(samples))
        else:
            rate = cast(AudioCodec, self._modalities.codec("audio")).sample_rate
            for number, sound in enumerate(samples):
                run.reporter.sound(step, f"{name}/{number}", sound, rate)
        if modality != "text" and given == "text":
            prompts = [self._modalities.sample("text", one.condition.numpy()) for one in examples]
            run.reporter.text(step, f"{name}/prompts", ", ".join(prompts))


def document_like(document: Document, tokens_T: Tensor) -> Document:
    """The same parts with other tokens."""
    return replace(document, tokens_T=tokens_T)


def _made(task: str) -> str:
    return "text" if task == FREE_TEXT else TASKS[task][1]


def _lines(texts: list[str]) -> str:
    # Two spaces: TensorBoard shows Markdown, which joins lines otherwise.
    return "  \n".join(texts)
