"""`triptych evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from pretrain.bound import DRAWS, evaluate_bound
from pretrain.checkpoint_reader import load_trained_model
from pretrain.commands.choices import print_choices
from pretrain.commands.console import plain_console
from pretrain.commands.options import flag
from pretrain.errors import UserError
from pretrain.evaluation import Watch, evaluate, evaluate_own, evaluate_task
from pretrain.json_text import to_json
from pretrain.run_data import TASK_ROWS
from pretrain.run_folder import find_run

if TYPE_CHECKING:
    from data_pipelines.stream.batch import Batch
    from pretrain.checkpoint_reader import TrainedModel
    from pretrain.commands.evaluate_options import EvaluateOptions

CHOICE_DRAWS = 128


def print_evaluation_of(
    run: str, what: EvaluateOptions, *, step: int | None, device: str, json_output: bool
) -> None:
    """What the options ask for: answers to questions, accuracy on a synthetic task, or the loss on data."""
    shared: dict[str, Any] = {"step": step, "device": device, "json_output": json_output}
    if what.choices is not None:
        _refuse(what, ("data", "rows", "length"), "with --choices, which brings its own questions")
        print_choices(run, what.choices, what.by or "elbo", draws=what.draws or CHOICE_DRAWS, **shared)
        return
    _refuse(what, ("by",), "without --choices")
    if what.length or (not what.data and find_run(run).trains_a_task()):
        print_task_accuracy(run, what.length or [], rows=what.rows, **shared)
        return
    print_evaluation(run, what.data, what.split, rows=what.rows, draws=what.draws, **shared)


def _refuse(what: EvaluateOptions, names: tuple[str, ...], where: str) -> None:
    for name in names:
        if getattr(what, name):
            raise UserError(f"{flag(name)}: means nothing {where}; leave it out")


def print_task_accuracy(
    run: str, lengths: list[int], *, rows: int | None, step: int | None, device: str, json_output: bool
) -> None:
    """Accuracy of a model of a synthetic task, at each length; by default at those of its config."""
    trained = load_trained_model(find_run(run), step, device)
    config = trained.config
    if config.data.task is None:
        raise UserError(
            f"{run}: --length is for synthetic tasks, and this run learned from data.{config.data.named_by}"
        )
    own = [config.data.sequence_length, config.monitor.evaluate_length]
    lengths = lengths or [length for length in own if length is not None]
    count = rows or config.monitor.evaluate_rows or TASK_ROWS
    results = {
        length: evaluate_task(trained, length, rows=count, watch=_progress(f"length {length}"))
        for length in lengths
    }
    if json_output:
        accuracies = {length: dataclasses.asdict(accuracy) for length, accuracy in results.items()}
        print(to_json({"run": run, "step": trained.step, "rows": count, "accuracy": accuracies}))
        return
    table = Table("length", "token", "last", "sequence", title=f"{config.data.task['name']}, {count:,} rows")
    for length, accuracy in results.items():
        shares = (accuracy.token, accuracy.last, accuracy.sequence)
        table.add_row(f"{length:,}", *(f"{100 * share:.2f} %" for share in shares))
    plain_console().print(table)


def _progress(label: str) -> Watch:
    def watch(batches: Iterator[Batch], count: int) -> Iterable[Batch]:
        return track(batches, label, total=count, console=Console(stderr=True), transient=True)

    return watch


def print_evaluation(
    run: str,
    paths: list[str] | None,
    split: str,
    *,
    rows: int | None,
    step: int | None,
    device: str,
    json_output: bool,
    draws: int | None,
) -> None:
    trained = load_trained_model(find_run(run), step, device)
    paths = paths or [source.path for source in trained.config.data.sources]
    own = trained.config.data.own if not paths else None
    if trained.modalities is not None:
        _print_bounds(run, trained, paths, split, rows=rows, draws=draws or DRAWS, json_output=json_output)
        return
    if draws is not None:
        raise UserError(
            f"--draws {draws}: draws masks, and {run} is no run of masked diffusion; leave it out"
        )
    watch = _progress("evaluating")
    if own is not None:
        if rows is not None or split != "validation":
            raise UserError(
                f"{run}: data.own says itself what it validates with; leave --rows and --split out"
            )
        result, paths = evaluate_own(trained, watch=watch), [str(own["name"])]
    else:
        result = evaluate(trained, paths, split, limit_rows=rows, watch=watch)
    facts = {"run": run, "step": trained.step, "data": paths, "split": split, **dataclasses.asdict(result)}
    facts["perplexity"] = result.perplexity
    if json_output:
        print(to_json(facts))
        return
    print(f"{run}, step {trained.step}, {split} split of {', '.join(paths)}: {result.tokens:,} tokens")
    per_byte = "" if result.bits_per_byte is None else f"   {result.bits_per_byte:.4f} bits/byte"
    print(f"{result.nats_per_token:.4f} nats/token   perplexity {result.perplexity:.2f}{per_byte}")


def _print_bounds(
    run: str,
    trained: TrainedModel,
    paths: list[str],
    split: str,
    *,
    rows: int | None,
    draws: int,
    json_output: bool,
) -> None:
    """The likelihood bound of a run of masked diffusion, by modality and task."""
    watch = _progress("evaluating")
    bounds = evaluate_bound(trained, paths, split, draws=draws, limit_rows=rows, watch=watch)
    if json_output:
        values = {name: dataclasses.asdict(bound) for name, bound in bounds.items()}
        facts = {"run": run, "step": trained.step, "data": paths, "split": split, "draws": draws}
        print(to_json({**facts, "bounds": values}))
        return
    title = f"{run}, step {trained.step}, {split} split, {draws} mask draws per row"
    table = Table("nats per target token", "bound", "95 % interval", "tokens", title=title)
    for name, bound in bounds.items():
        half = "one draw" if bound.half_interval is None else f"+- {bound.half_interval:.4f}"
        table.add_row(name, f"{bound.nats_per_token:.4f}", half, f"{bound.tokens:,}")
    console = plain_console()
    console.print(table)
    console.print("the interval is of the mask draws: other documents would differ by more", soft_wrap=True)
