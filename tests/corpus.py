"""A small dataset of this project's own sources, built by the real command's code."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.prepare.text import BuildOptions, build


def build_corpus(folder: Path, documents: int) -> Path:
    """Tokenised text, bytes as tokens; returns the dataset's folder."""
    texts = folder / "texts"
    texts.mkdir()
    for number, source in enumerate(sorted(Path("pretrain").rglob("*.py"))[:documents]):
        (texts / f"{number:03d}.txt").write_text(source.read_text())
    build(texts, folder / "data", BuildOptions(tokenizer="bytes"))
    return folder / "data"
