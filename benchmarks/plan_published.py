"""The planner's step time against published training runs, and its constants fitted to them. Needs no GPU.

    python -m benchmarks.plan_published                    fit on half of the models, predict the others
    python -m benchmarks.plan_published --rows runs.csv    predict other rows, with the shipped constants
    python -m benchmarks.plan_published --write            fit on all, and renew pretrain/plan/constants.json

The rows are `benchmarks/published/runs.csv`, whose README tells sources and columns. Each is fed to the planner as a
job: its layers' work, its messages, its layout. Rows of quality C, whose layout is not wholly known, are predicted
and listed, but neither fitted nor counted. The last line is that of the rows that were not fitted.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares  # type: ignore[import-untyped]  # has none

from benchmarks.published.collectives import Collective, predicted_bandwidth, read_collectives
from benchmarks.published.jobs import tokens_per_second
from benchmarks.published.rows import RUNS, Row, RowsError, read_rows
from pretrain.json_text import to_json
from pretrain.plan.constants import PATH, Constants, constants, read

SOFTWARE: Mapping[str, str] = {
    "llm-foundry": "llm-foundry",
    "dgxc-nemo": "megatron",
    "korthikanti2022": "megatron",
    "megatron-core": "megatron",
    "narayanan2021": "megatron",
}
"""Whose attention a source ran; PyTorch's where it is not here."""
START: Mapping[str, float] = {
    "products_hopper": 0.76,
    "products_ampere": 0.86,
    "softmax_hopper": 0.40,
    "softmax_ampere": 0.35,
    "softmax_hopper@llm-foundry": 0.19,
    "softmax_hopper@megatron": 0.35,
    "memory": 0.76,
    "unfused": 2.0,
    "fused": 1.2,
    "logits": 20.0,
    "attention_ramp": 300.0,
    "narrow_heads": 0.85,
    "contention": 0.29,
    "straggling": 0.015,
    "tensor_messages": 1.5,
    "tensor_overlap": 0.4,
    "context_overlap": 0.5,
}
"""What is fitted, and what is expected of it before: shares that others report of such kernels. llm-foundry's attention
is of 2023: kernels made for the A100, which on the H100 reach a tenth more than half of their share."""
TRUST, NOISE = 0.25, 0.04
"""Deviations of a constant from its start, and of a row from its prediction, both as logarithms: the fit's weights."""
WORST = 12
COUNTED = ("A", "A-", "B")
SHIPPED: Mapping[str, float] = {}
"""In place of a fit: the constants as they are."""


@dataclass(frozen=True)
class Judged:
    """Relative errors of rows: predicted / measured - 1."""

    rows: Sequence[Row]
    errors: Sequence[float]

    def line(self) -> str:
        sizes = sorted(abs(error) for error in self.errors)
        median, tail = statistics.median(sizes), float(np.quantile(sizes, 0.9))
        return f"median {median:.1%}, 90th percentile {tail:.1%}, worst {sizes[-1]:.1%} over {len(sizes)} rows".replace(
            "%", " %"
        )

    def figures(self) -> dict[str, float]:
        sizes = [abs(error) for error in self.errors]
        tail = float(np.quantile(sizes, 0.9))
        return {"median": statistics.median(sizes), "p90": tail, "worst": max(sizes), "rows": len(sizes)}


def main(arguments: list[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, help="predict these rows with the shipped constants")
    parser.add_argument(
        "--write", action="store_true", help="fit on all rows and renew the shipped constants"
    )
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--plot", type=Path, help="also draw predicted against measured")
    options = parser.parse_args(arguments)
    if options.rows and options.write:
        parser.error("--write fits the shipped rows; it does not go with --rows")
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        rows, left_out = read_rows(options.rows or RUNS)
    except RowsError as error:
        sys.exit(f"error: {error}")
    for message in left_out:
        console.print(f"left out: {message}", markup=False)
    if left_out:
        console.print(f"{len(left_out)} of {len(left_out) + len(rows)} rows left out")
    counted = [row for row in rows if row.quality in COUNTED]
    if not counted:
        sys.exit("error: all rows are of quality C, whose layouts are not wholly known: nothing to count")
    if options.rows:
        judged = judge(counted, SHIPPED)
        print_result(console, judged, judge(_of_quality_c(rows), SHIPPED))
    else:
        judged = cross(console, counted, _of_quality_c(rows))
        print_collectives(console, read_collectives())
        if options.write:
            write_constants(fit(counted))
            console.print(f"{PATH}: renewed from all {len(counted)} rows")
    if options.plot:
        draw(judged, options.plot)
    if options.out:
        errors = {row.id: round(error, 4) for row, error in zip(judged.rows, judged.errors, strict=True)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(to_json({"held_out": judged.figures(), "errors": errors}, indent=1) + "\n")
    console.print(judged.line(), highlight=False)


def cross(console: Console, counted: Sequence[Row], others: Sequence[Row]) -> Judged:
    """Half of the models predict the others, and the reverse; the first is shown in full."""
    first, second = halves(counted)
    found = fit(second)
    judged = judge(first, found)
    print_result(console, judged, judge(others, found))
    console.print(f"fitted rows:          {judge(second, found).line()}", highlight=False)
    console.print(f"halves exchanged:     {judge(second, fit(first)).line()}", highlight=False)
    return judged


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """By model, each source's from small to large in turn."""
    ordered = sorted({(row.source, row.layers * row.width**2, row.model) for row in rows})
    models = list(dict.fromkeys(model for _, _, model in ordered))
    chosen = set(models[::2])
    return [row for row in rows if row.model in chosen], [row for row in rows if row.model not in chosen]


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """The constants by name, those of one software as name@software."""
    names = list(START)
    start = np.log([START[name] for name in names])

    def residuals(logs: np.ndarray) -> np.ndarray:
        found = dict(zip(names, np.exp(logs).tolist(), strict=True))
        errors = [math.log1p(error) for error in judge(rows, found).errors]
        return np.concatenate((np.array(errors) / NOISE, (logs - start) / TRUST))

    # A row that something else made slow pulls with its size, not with its square.
    solved = least_squares(residuals, start, loss="soft_l1")
    return dict(zip(names, np.exp(solved.x).tolist(), strict=True))


def judge(rows: Sequence[Row], found: Mapping[str, float]) -> Judged:
    known = {software: _constants(found, software) for software in {*SOFTWARE.values(), "pytorch"}}
    predicted = [tokens_per_second(row, known[SOFTWARE.get(row.source, "pytorch")]) for row in rows]
    return Judged(rows, [speed / row.tok_s_gpu - 1 for speed, row in zip(predicted, rows, strict=True)])


def _constants(found: Mapping[str, float], software: str) -> Constants:
    """The shipped ones with these in their place."""
    common = {name: value for name, value in found.items() if "@" not in name}
    own = {name.split("@")[0]: value for name, value in found.items() if name.endswith(f"@{software}")}
    return dataclasses.replace(constants(software), **(common | own))


def _of_quality_c(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.quality not in COUNTED]


def write_constants(found: Mapping[str, float]) -> None:
    """Beside what is measured and assumed."""
    table = read()
    source = "python -m benchmarks.plan_published --write"
    for name, value in found.items():
        plain, _, software = name.partition("@")
        place = table["software"].setdefault(software, {}) if software else table["constants"]
        place[plain] = {"value": float(f"{value:.4g}"), "kind": "fitted", "source": source}
    PATH.write_text(to_json(table, indent=2) + "\n")
    constants.cache_clear()


def print_result(console: Console, judged: Judged, others: Judged) -> None:
    table = Table("source", title="predicted / measured tokens per second, by source", title_justify="left")
    for heading in ("rows", "mean error", "median", "90th percentile", "worst"):
        table.add_column(heading, justify="right")
    for source in sorted({row.source for row in judged.rows}):
        errors = [
            error for row, error in zip(judged.rows, judged.errors, strict=True) if row.source == source
        ]
        figures = Judged((), errors).figures()
        shares = (f"{figures[key]:.1%}" for key in ("median", "p90", "worst"))
        table.add_row(source, str(len(errors)), f"{statistics.mean(errors):+.1%}", *shares)
    console.print(table)
    _print_worst(console, f"the {WORST} worst rows", judged, WORST)
    if others.rows:
        _print_worst(
            console, "not counted: quality C, of a layout that is not wholly known", others, len(others.rows)
        )


def _print_worst(console: Console, title: str, judged: Judged, count: int) -> None:
    table = Table("row", "gpu", title=title, title_justify="left")
    for heading in ("gpus", "measured", "predicted", "error"):
        table.add_column(heading, justify="right")
    paired = sorted(zip(judged.rows, judged.errors, strict=True), key=lambda pair: -abs(pair[1]))
    for row, error in paired[:count]:
        speeds = (f"{row.tok_s_gpu:,.0f}", f"{row.tok_s_gpu * (1 + error):,.0f}")
        table.add_row(row.id, row.gpu, str(row.gpus), *speeds, f"{error:+.1%}")
    console.print(table)


def print_collectives(console: Console, measured: Sequence[Collective]) -> None:
    table = Table("collective", "gpu", title="bus bandwidth of collectives, GB/s", title_justify="left")
    for heading in ("gpus", "nodes", "MB", "measured", "predicted", "error"):
        table.add_column(heading, justify="right")
    for one in measured:
        predicted = predicted_bandwidth(one, constants())
        sizes = (str(one.gpus), str(one.nodes), f"{one.size_bytes / 1e6:,.0f}")
        speeds = (f"{one.busbw_gb_s:.4g}", f"{predicted:.4g}", f"{predicted / one.busbw_gb_s - 1:+.0%}")
        table.add_row(one.collective, one.gpu, *sizes, *speeds)
    console.print(table)


def draw(judged: Judged, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6))
    for source in sorted({row.source for row in judged.rows}):
        pairs = [
            (row.tok_s_gpu, row.tok_s_gpu * (1 + error))
            for row, error in zip(judged.rows, judged.errors, strict=True)
            if row.source == source
        ]
        measured, predicted = zip(*pairs, strict=True)
        axes.scatter(measured, predicted, s=14, label=source)
    ends = [min(row.tok_s_gpu for row in judged.rows), max(row.tok_s_gpu for row in judged.rows)]
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    for factor in (0.88, 1.12):
        axes.plot(ends, [factor * end for end in ends], color="grey", linewidth=0.5, linestyle="--")
    axes.set(
        xscale="log", yscale="log", xlabel="published tokens/s per GPU", ylabel="predicted (dashed: 12 % off)"
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
