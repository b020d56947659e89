"""`triptych generate` and `triptych evaluate`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from pretrain.checkpoint_reader import load_trained_model
from pretrain.evaluation import evaluate
from pretrain.generation import generate
from pretrain.run_folder import find_run

if TYPE_CHECKING:
    from data_pipelines.batch import Batch
    from pretrain.generation import Sampling


def print_generated(run: str, prompts: list[str], sampling: Sampling, *, step: int | None, device: str) -> None:
    trained = load_trained_model(find_run(run), step, device)
    for prompt in prompts:
        print(*generate(trained.model, trained.tokenizer, [prompt], sampling, trained.device))


def print_evaluation(
    run: str,
    paths: list[str] | None,
    split: str,
    *,
    rows: int | None,
    step: int | None,
    device: str,
    json_output: bool,
) -> None:
    trained = load_trained_model(find_run(run), step, device)
    paths = paths or [source.path for source in trained.config.data.sources]

    def watch(batches: Iterator[Batch], count: int) -> Iterable[Batch]:
        return track(batches, "evaluating", total=count, console=Console(stderr=True), transient=True)

    result = evaluate(trained, paths, split, limit_rows=rows, watch=watch)
    facts = {"run": run, "step": trained.step, "data": paths, "split": split, **dataclasses.asdict(result)}
    facts["perplexity"] = result.perplexity
    if json_output:
        print(json.dumps(facts))
        return
    print(f"{run}, step {trained.step}, {split} split of {', '.join(paths)}: {result.tokens:,} tokens")
    print(f"{result.nats_per_token:.4f} nats/token   perplexity {result.perplexity:.2f}   {result.bits_per_byte:.4f} bits/byte")
