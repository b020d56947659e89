"""Tables that `triptych data stats` prints."""

from __future__ import annotations

from rich.table import Table

from data_pipelines.inspection.stats import PERCENTILES, SplitFigures

BAR_WIDTH = 40


def split_table(splits: list[SplitFigures]) -> Table:
    """The figures of all splits, a column for each."""
    table = Table(show_edge=False)
    table.add_column("")
    for split in splits:
        table.add_column(split.name, justify="right")
    table.add_row("shards", *(f"{s.shards:,}" for s in splits))
    table.add_row("documents", *(f"{s.documents:,}" for s in splits))
    table.add_row("tokens", *(f"{s.tokens:,}" for s in splits))
    table.add_row("bytes of text", *(f"{s.text_bytes:,}" for s in splits))
    table.add_row("bytes per token", *(f"{s.bytes_per_token:.2f}" for s in splits))
    for kind in dict.fromkeys(kind for s in splits for kind in s.tasks):
        table.add_row(f"documents: {kind}", *(f"{s.tasks.get(kind, 0):,}" for s in splits))
    for kind in dict.fromkeys(kind for s in splits for kind in s.modality_tokens):
        table.add_row(f"tokens: {kind}", *(f"{s.modality_tokens.get(kind, 0):,}" for s in splits))
    for percent in PERCENTILES:
        label = f"{percent} % of documents up to" if percent < 100 else "longest document"
        table.add_row(f"{label} (tokens)", *(f"{s.length_percentiles[percent]:,}" for s in splits))
    return table


def histogram_table(split: SplitFigures) -> Table:
    """How many documents there are of each length, in powers of two."""
    table = Table(title=f"{split.name}: documents by length in tokens", title_justify="left", show_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    table.add_column("")
    most = max(count for _, _, count in split.histogram)
    for low, high, count in split.histogram:
        table.add_row(f"{low:,} to {high - 1:,}", f"{count:,}", "█" * -(-count * BAR_WIDTH // most))
    return table
