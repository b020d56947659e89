"""One cluster for all drills, and one run that nothing happened to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus import build_corpus
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.drill import Drill, Losses


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_programs()
    for item in items:
        if missing and {"cluster", "network_cluster"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(
                pytest.mark.skip(reason=f"a real Slurm needs {', '.join(missing)}; see launch/README.md")
            )


def open_cluster(*, network: bool) -> Iterator[Cluster]:
    # Not pytest's folder: munge refuses one that others could have changed, and sockets need short paths.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder, network=network)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    yield from open_cluster(network=False)


@pytest.fixture(scope="session")
def network_cluster() -> Iterator[Cluster]:
    """One whose nodes have a network of their own, with links that can be cut."""
    yield from open_cluster(network=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenised dataset."""
    return build_corpus(tmp_path_factory.mktemp("corpus"), documents=20)


def open_drill(drill: Drill) -> Iterator[Drill]:
    try:
        yield drill
    finally:
        drill.end()


@pytest.fixture
def drill(cluster: Cluster, corpus: Path, tmp_path: Path) -> Iterator[Drill]:
    """A folder and a config for one drill; its jobs end with it."""
    yield from open_drill(Drill(cluster, corpus, tmp_path))


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The losses of a run that nothing happened to, on the same layout."""
    drill = Drill(cluster, corpus, tmp_path_factory.mktemp("undisturbed"))
    run = drill.launch()
    drill.wait_finished(run)
    return drill.losses(run)


@pytest.fixture
def network_drill(network_cluster: Cluster, corpus: Path, tmp_path: Path) -> Iterator[Drill]:
    """The same on nodes whose links can be cut."""
    yield from open_drill(Drill(network_cluster, corpus, tmp_path))
