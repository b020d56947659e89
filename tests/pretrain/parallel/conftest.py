"""One small corpus for the tests of layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import build_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised text of this project's own sources, bytes as tokens, 60 documents."""
    return build_corpus(tmp_path_factory.mktemp("corpus"), documents=30)
