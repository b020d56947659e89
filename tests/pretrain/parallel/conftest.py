"""Small datasets, built once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.corpus import build_corpus
from tests.e2e.pairs import TASKS, build_pairs
from tests.pretrain.parallel.runs import Curve, Datasets, train_in

Alone = Callable[[str, int], Curve]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised text of this project's own sources, bytes as tokens, 60 documents."""
    return build_corpus(tmp_path_factory.mktemp("corpus"), documents=30)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Datasets:
    folder = tmp_path_factory.mktemp("data")
    build_pairs(folder / "pairs")
    return Datasets(corpus, tuple(folder / "pairs" / n for n in ("text", *TASKS)))


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Datasets) -> Alone:
    """How a model trains in one process, ZeRO 0, for so many steps."""
    known: dict[tuple[str, int], Curve] = {}

    def curve(model: str, steps: int) -> Curve:
        if (model, steps) not in known:
            known[model, steps] = train_in(tmp_path_factory.mktemp(model), data, model, 1, [], steps)
        return known[model, steps]

    return curve
