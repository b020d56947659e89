"""One small corpus for all end-to-end tests, built by the real command's code."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.build import BuildOptions, build


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised text of this project's own sources, bytes as tokens, 60 documents."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "texts"
    texts.mkdir()
    for number, source in enumerate(sorted(Path("pretrain").rglob("*.py"))[:30]):
        (texts / f"{number:03d}.txt").write_text(source.read_text())
    build(texts, folder / "data", BuildOptions(tokenizer="bytes"))
    return folder / "data"
