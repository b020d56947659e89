"""The options of `triptych generate`. None is no choice: the default depends on the run and on what is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True)
class WhatOptions:
    """What to make."""

    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="A text: to continue, or the condition; [MASK] is a token to fill in. May be repeated.",
        ),
    ] = None
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="New tokens: at most so many (128) of a causal model; of masked diffusion exactly."
        ),
    ] = None
    task: Annotated[
        str | None,
        typer.Option(
            help="Masked diffusion: text (the default), text-to-image, image-to-text, text-to-audio, audio-to-text."
        ),
    ] = None
    image: Annotated[
        str | None,
        typer.Option(help="The picture, for image-to-text; turned by its EXIF, transparent parts on white."),
    ] = None
    audio: Annotated[
        str | None, typer.Option(help="The sound, a WAV, FLAC, Ogg or MP3 file, for audio-to-text.")
    ] = None
    count: Annotated[int | None, typer.Option(min=1, help="Masked diffusion: samples per prompt.")] = None
    out: Annotated[
        str | None,
        typer.Option(help="The .png or .wav to write; of several samples out-0.png, out-1.png ..."),
    ] = None
    sheet: Annotated[
        bool, typer.Option("--sheet", help="Several pictures on one contact sheet, the file of --out.")
    ] = False


@dataclass(frozen=True)
class HowOptions:
    """How to sample."""

    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="0 is greedy. Causal: 0.8; masked diffusion: 1, and 0 for answers in text."
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1.0, help="Nucleus sampling. Causal: 0.95; masked diffusion: 1 (off)."),
    ] = None
    seed: Annotated[int, typer.Option(help="Same seed, same samples.")] = 0
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Masked diffusion: ancestral (the default for images and free text), first_hitting or confidence "
            "(the default for sounds and answers)."
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps. confidence: one per token, up to 64 (sounds: 8), more only with --remask; "
            "ancestral: 256, of which those in which no token appears cost nothing."
        ),
    ] = None
    schedule: Annotated[
        str | None, typer.Option(help="linear (the default) or cosine: the share still masked after a step.")
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            help="w in l = u + w (c - u), c the logits given the condition, u with the condition all [MASK]: 1 is "
            "none. Default: 1.5 for images where the run has objective.condition_dropout, else 1. Papers that write "
            "(1 + g) c - g u have w = 1 + g."
        ),
    ] = None
    score: Annotated[
        str | None,
        typer.Option(
            help="confidence: max_probability (the default), margin, entropy or random decides what stays."
        ),
    ] = None
    gumbel: Annotated[
        float | None,
        typer.Option(help="confidence: noise on the scores, falling linearly to 0; default 0."),
    ] = None
    block: Annotated[
        int | None, typer.Option(help="Make so many tokens at a time, from the left. Default: all.")
    ] = None
    remask: Annotated[
        float | None, typer.Option(help="Probability that a made token is masked again in a step; default 0.")
    ] = None


DIFFUSION_ONLY: tuple[str, ...] = (
    "task",
    "image",
    "audio",
    "count",
    "out",
    "sampler",
    "steps",
    "schedule",
    "guidance",
    "score",
    "gumbel",
    "block",
    "remask",
)
"""What a causal run refuses."""
