"""Run fuzzers and print what they found; exit code 1 for any finding.

python -m tests.fuzz                          all, 1,000 cases each
python -m tests.fuzz tars captions --cases 50
python -m tests.fuzz tars --first 17 --cases 1    one case again
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.fuzz import FUZZERS
from tests.fuzz.base import Tally, run_case

SHOWN = 5


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Fuzzers. Default: all.")] = None,
    cases: Annotated[int, typer.Option(min=1, help="Of each fuzzer.")] = 1000,
    first: Annotated[int, typer.Option(min=0, help="Seed of the first case.")] = 0,
) -> None:
    """Run fuzzers."""
    for name in names or []:
        if name not in FUZZERS:
            raise typer.BadParameter(f"{name}: one of {', '.join(FUZZERS)}")
    tallies = [Tally(name) for name in names or FUZZERS]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for tally in tallies:
            task = bar.add_task(tally.name, total=cases)
            for seed in range(first, first + cases):
                tally.add(run_case(FUZZERS[tally.name], seed))
                bar.advance(task)
    _print(tallies)
    sys.exit(1 if any(tally.findings for tally in tallies) else 0)


def _print(tallies: list[Tally]) -> None:
    console, table = Console(), Table("fuzzer", "cases", "taken", "refused", "findings", "slowest")
    for tally in tallies:
        taken = tally.cases - tally.refused - sum(not one.refusal for one in tally.findings)
        cells = (tally.cases, taken, tally.refused, len(tally.findings))
        table.add_row(tally.name, *(f"{cell:,}" for cell in cells), f"{tally.slowest:.2f} s")
    console.print(table)
    for tally in tallies:
        for one in tally.findings[:SHOWN]:
            console.rule(f"{tally.name}, case {one.seed}", align="left")
            console.print(escape(one.finding), highlight=False)
        if len(tally.findings) > SHOWN:
            seeds = ", ".join(str(one.seed) for one in tally.findings[SHOWN : SHOWN + 40])
            console.print(f"{tally.name}: {len(tally.findings) - SHOWN} more: cases {seeds}")


if __name__ == "__main__":
    typer.run(main)
