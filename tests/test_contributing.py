"""CONTRIBUTING.md, followed to the letter: each recipe's blocks are written where it says, its commands are run, in a
copy of the project; what they train is small."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.corpus import build_corpus

ROOT = Path(__file__).parents[1]
COPIED = ("kernels", "models", "data_pipelines", "pretrain", "launch", "configs", "examples")
SMALL = (
    "run.steps=2 optim.warmup_steps=1 data.sequence_length=32 data.global_batch_rows=2 monitor.evaluate_rows=2 "
    "monitor.log_every_steps=1 monitor.sample_tokens=1"
)
SECTION = re.compile(r"^### A?n? ?(\w+)\n(.*?)(?=^### |\Z)", flags=re.M | re.S)
BLOCK = re.compile(r"(.*?)```(\w+)\n(.*?)```", flags=re.S)
PLACE = re.compile(r"`([\w./]+\.(?:py|yaml))`[^`]*\Z")

RECIPES = dict(SECTION.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))


def blocks_of(recipe: str) -> Iterator[tuple[str, str, str]]:
    """(the text before it, its language, its content) of each block."""
    yield from BLOCK.findall(recipe)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus"), documents=20)


@pytest.fixture
def project(tmp_path: Path, corpus: Path) -> Path:
    """A copy of the project with a small dataset, some pictures, and commands that train little."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for page in ("README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / page, tmp_path / page)
    shutil.copytree(corpus, tmp_path / "data" / "demo")
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        picture = np.random.default_rng(number).integers(256, size=(8, 8), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    script(tmp_path / "bin" / "python", f'exec {sys.executable} "$@"')
    script(
        tmp_path / "bin" / "triptych",
        f'case "$1" in train) small="{SMALL}" ;; esac\nexec {sys.executable} -m launch.cli "$@" ${{small:-}}',
    )
    return tmp_path


def script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def followed(project: Path, recipe: str) -> str:
    """What its commands print."""
    commands = []
    for before, language, content in blocks_of(recipe):
        if language == "sh":
            commands.append(content)
            continue
        (place,) = PLACE.findall(before)
        with (project / place).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{content}")
    assert commands, "a recipe without a command"
    environment = {**os.environ, "PATH": f"{project / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


WANTED = {
    "mixer": "validation loss:",
    "objective": "validation loss:",
    "Data": "validation loss:",
    "hook": "validation loss:",
    "codec": "8 x 8 points of 16 grey levels",
    "cell": "validation loss:",
    "cluster": "#SBATCH --partition=gpu",
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_works_to_the_letter(name: str, project: Path) -> None:
    assert WANTED[name] in followed(project, RECIPES[name])
