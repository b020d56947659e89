"""`triptych generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from data_pipelines.tokens.modalities import Modalities
from data_pipelines.tokens.vocabulary import TASKS
from pretrain.checkpoint_reader import TrainedModel, load_trained_model
from pretrain.commands.generate_options import DIFFUSION_ONLY, HowOptions, WhatOptions
from pretrain.commands.options import flag, given
from pretrain.errors import UserError
from pretrain.generate.causal import Sampling, generate
from pretrain.generate.denoiser import model_denoiser
from pretrain.generate.diffusion import Sampler
from pretrain.generate.lengths import load_caption_lengths, load_lengths
from pretrain.generate.media import (
    check_image_name,
    check_sound_name,
    contact_sheet,
    write_image,
    write_sound,
)
from pretrain.generate.prompts import check_prompts
from pretrain.generate.requests import FREE_TEXT, MASK, Requests
from pretrain.generate.settings import SamplerSettings, learns_without_condition, settings_for
from pretrain.run_folder import find_run

if TYPE_CHECKING:
    from pretrain.config.objective import MaskedDiffusionSection
    from pretrain.generate.canvas import Canvas

CAUSAL_TOKENS = 128
SOURCES = {"text": "prompt", "image": "image", "audio": "audio"}
"""By modality of the condition: the option that gives it."""


def print_generated(run: str, what: WhatOptions, how: HowOptions, *, step: int | None, device: str) -> None:
    """Make what was asked for, and print or write it. Raises UserError for options that do not fit the run."""
    folder = find_run(run)
    trained = load_trained_model(folder, step, device)
    if trained.modalities is None:
        _print_continued(trained, what, how)
    else:
        requests = Requests(
            trained.modalities,
            load_lengths(folder.tokenizer),
            trained.config.data.sequence_length,
            load_caption_lengths(folder.tokenizer),
        )
        _Diffusion(trained, trained.modalities, requests, what, how).run()


def _print_continued(trained: TrainedModel, what: WhatOptions, how: HowOptions) -> None:
    """Text of a causal model."""
    chosen = given(what) | given(how)
    for name in DIFFUSION_ONLY:
        if name in chosen:
            raise UserError(
                f"{flag(name)}: for runs of masked diffusion; this one is of family {trained.config.model.family}"
            )
    if what.sheet:
        raise UserError("--sheet: for pictures, which only runs of masked diffusion make")
    settings = {key: chosen[key] for key in ("temperature", "top_p") if key in chosen}
    sampling = Sampling(tokens=what.tokens or CAUSAL_TOKENS, seed=how.seed, **settings)
    prompts = what.prompt or [""]
    check_prompts(prompts, trained.tokenizer)
    together = getattr(trained.model, "constant_state", False)
    for batch in [prompts] if together else [[prompt] for prompt in prompts]:
        for text in generate(trained.model, trained.tokenizer, batch, sampling, trained.device):
            print(text)


@dataclass(frozen=True)
class _Diffusion:
    """One command on a run of masked diffusion."""

    trained: TrainedModel
    modalities: Modalities
    requests: Requests
    what: WhatOptions
    how: HowOptions

    @property
    def task(self) -> str:
        return self.what.task or FREE_TEXT

    @property
    def made(self) -> str:
        """The modality that is made."""
        return "text" if self.task == FREE_TEXT else TASKS[self.task][1]

    def run(self) -> None:
        self._refuse_what_does_not_fit()
        check_prompts((one.replace(MASK, " ") for one in self.what.prompt or []), self.modalities.tokenizer)
        modalities, vocabulary = self.modalities, self.modalities.vocabulary
        requests = self.requests
        canvases = self._canvases(requests)
        denoiser = model_denoiser(self.trained.model, vocabulary)
        sampler = Sampler(denoiser, vocabulary, self._settings(), self.trained.device)
        samples = [requests.sample(filled) for filled in sampler(canvases)]
        if self.made == "text":
            for text in samples:
                print(text)
            return
        rate = None if self.made == "image" else modalities.codec("audio").sample_rate  # type: ignore[attr-defined]
        self._write(samples, rate)

    def _refuse_what_does_not_fit(self) -> None:
        if self.task != FREE_TEXT and self.task not in TASKS:
            raise UserError(f"--task {self.task}: one of {', '.join((FREE_TEXT, *TASKS))}")
        source = "prompt" if self.task == FREE_TEXT else SOURCES[TASKS[self.task][0]]
        for name in SOURCES.values():
            if name != source and getattr(self.what, name) is not None:
                raise UserError(f"--{name}: {self.task} takes --{source} instead")
        if self.task != FREE_TEXT and getattr(self.what, source) is None:
            raise UserError(f"--{source}: missing; it is what {self.task} begins from")
        if self.made == "text" and self.what.out is not None:
            raise UserError(f"--out: {self.task} makes text, which is printed; redirect it into a file")
        if self.made != "text" and self.what.out is None:
            suffix = "png" if self.made == "image" else "wav"
            raise UserError(f"--out: missing; name the .{suffix} file to write")
        if self.what.out is not None:
            self._refuse_out(Path(self.what.out))
        if self.what.sheet and self.made != "image":
            raise UserError(f"--sheet: for pictures; {self.task} makes {self.made}")

    def _refuse_out(self, out: Path) -> None:
        """Before anything is made, which may take long."""
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out {out}: there is no such folder; make it first")
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder; name a file")
        (check_image_name if self.made == "image" else check_sound_name)(out)
        self.modalities.codec(self.made)

    def _settings(self) -> SamplerSettings:
        kind = "free text" if self.task == FREE_TEXT else self.made
        objective = cast("MaskedDiffusionSection", self.trained.config.objective)
        settings = settings_for(kind, objective, **given(self.how))
        refuse_vain_guidance(settings, self.task, objective)
        return settings

    def _canvases(self, requests: Requests) -> list[Canvas]:
        count, tokens = self.what.count or 1, self.what.tokens
        if self.task == FREE_TEXT:
            prompts = [prompt for prompt in self.what.prompt or [""] for _ in range(count)]
            seeds = ((self.how.seed, number) for number in range(len(prompts)))
            return [requests.text(prompt, tokens, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        source = getattr(self.what, SOURCES[TASKS[self.task][0]])
        sources = source if isinstance(source, list) else [source]
        wanted = [one for one in sources for _ in range(count)]
        return [
            requests.pair(self.task, one, tokens, (self.how.seed, number))
            for number, one in enumerate(wanted)
        ]

    def _write(self, samples: Sequence[Any], sample_rate: int | None) -> None:
        assert self.what.out is not None
        out = Path(self.what.out)
        if self.what.sheet:
            _write_one(out, contact_sheet(samples), None)
            return
        for path, sample in zip(numbered(out, len(samples)), samples, strict=True):
            _write_one(path, sample, sample_rate)


def refuse_vain_guidance(settings: SamplerSettings, task: str, objective: MaskedDiffusionSection) -> None:
    """Raises UserError for guidance where there is no condition, or where the model never saw one masked whole."""
    if settings.guidance == 1:
        return
    if task == FREE_TEXT:
        raise UserError(
            f"--guidance {settings.guidance:g}: free text has no condition to be guided by; leave it out"
        )
    if not learns_without_condition(objective):
        key = "condition_dropout" if objective.condition == "clean" else "whole_modality"
        raise UserError(
            f"--guidance {settings.guidance:g}: this run has objective.{key} = 0, so it never learned to do without "
            f"its condition; leave it out, or train with {key} 0.1"
        )


def numbered(out: Path, count: int) -> list[Path]:
    """out.png for one sample, out-0.png, out-1.png ... for several."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(count)]


def _write_one(path: Path, sample: Any, sample_rate: int | None) -> None:
    if sample_rate is None:
        write_image(path, sample)
    else:
        write_sound(path, sample, sample_rate)
    print(path)
