"""The options of `triptych data pairs` that say how captions, images and sounds become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class EncodingOptions:
    """As `data_pipelines.prepare.pair_options.PairOptions` has them; `tasks` with commas."""

    image_codec: Annotated[
        str | None,
        typer.Option(
            help="A codec's folder, patch:CODES:SIZE, or codes:CODES:ROWSxCOLUMNS for given codes. Default: "
            "patch:256:2, in colour if any image is."
        ),
    ] = None
    audio_codec: Annotated[
        str | None,
        typer.Option(
            help="A codec's folder, spectral:CODES[:CODEBOOKS[:SAMPLE_RATE]], or codes:CODES[:CODEBOOKS] for given "
            "codes. Default: spectral:256:2 (fewer codes for few sounds) at the most common sample rate."
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        typer.Option(help="bytes, bpe:N, a tokenizer.json, or a dataset folder. Default: bpe:8192."),
    ] = None
    end_of_text: Annotated[
        str | None,
        typer.Option(
            help="The special token of a tokenizer.json that ends a text. Default: a usual name for it."
        ),
    ] = None
    tasks: Annotated[
        str, typer.Option(help="text-to-image,image-to-text ... Default: all that the samples allow.")
    ] = ""
    text_slot: Annotated[
        int | None,
        typer.Option(help="Tokens of a text that is to be made. Default: the longest caption + 1."),
    ] = None
    vocabulary: Annotated[
        Path | None, typer.Option(help="A dataset whose vocabulary, tokenizer and codecs are taken.")
    ] = None
    delay: Annotated[bool, typer.Option("--delay", help="Delay pattern for several audio codebooks.")] = False
