"""Small datasets, built once, and what one process makes of them, trained once."""

from __future__ import annotations

import pytest

from tests.pretrain.parallel.runs import Datasets, References, build_datasets, import_megatron


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    import_megatron()
    return build_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Datasets) -> References:
    return References(tmp_path_factory.mktemp("alone"), data)
