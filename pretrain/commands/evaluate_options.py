"""The options of `triptych evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure."""

    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", help="Dataset folder; default: the run's.")
    ] = None
    split: Annotated[str, typer.Option(help="train or validation.")] = "validation"
    rows: Annotated[int | None, typer.Option(min=1, help="At most this many rows.")] = None
    length: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Synthetic tasks: length of the sequences; may be repeated."),
    ] = None
    draws: Annotated[
        int | None,
        typer.Option(min=1, help="Masked diffusion: mask draws per row, default 8; per answer, default 128."),
    ] = None
    choices: Annotated[
        str | None,
        typer.Option(
            help="Masked diffusion: a JSON Lines file of questions with task, condition or prompt, choices, answer."
        ),
    ] = None
    by: Annotated[
        str | None,
        typer.Option(help="--choices: elbo (the default) or confidence picks the answer."),
    ] = None
